"""A preloaded library that takes locks, and fsync of folders, away from the file system, as network mounts do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>

static int fails(const char *variable) {
    const char *value = getenv(variable);
    if (value == NULL) return 0;
    errno = atoi(value);
    return 1;
}

int flock(int fd, int operation) {
    if (fails("FAIL_FLOCK")) return -1;
    return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(fd, operation);
}

int fsync(int fd) {
    struct stat status;
    if (fstat(fd, &status) == 0 && S_ISDIR(status.st_mode) && fails("FAIL_FSYNC")) return -1;
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}

static int is_lock(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_GETLK || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}

#define LOCKLESS(name) \
    int name(int fd, int command, ...) { \
        va_list arguments; \
        va_start(arguments, command); \
        void *argument = va_arg(arguments, void *); \
        va_end(arguments); \
        if (is_lock(command) && fails("FAIL_FCNTL")) return -1; \
        return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, #name))(fd, command, argument); \
    }
LOCKLESS(fcntl)
LOCKLESS(fcntl64)
"""


def without(folder: Path, **errors: int) -> dict[str, str]:
    """The environment of processes whose `flock`, `fcntl` locks or `fsync` of folders fail with an error number."""
    library = folder / "lockless.so"
    if not library.exists():
        if (compiler := shutil.which("cc")) is None:
            pytest.skip("needs a C compiler")
        subprocess.run([compiler, "-shared", "-fPIC", "-xc", "-", "-o", library, "-ldl"], input=_SOURCE, text=True, check=True)
    return os.environ | {"LD_PRELOAD": str(library)} | {f"FAIL_{name.upper()}": str(number) for name, number in errors.items()}
