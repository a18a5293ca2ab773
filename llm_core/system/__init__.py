"""Files, locks, processes, hardware and versions, used by every other package."""

from llm_core.system.files import (
    DISK_FULL,
    ID_LENGTH,
    InnerPath,
    atomic_writer,
    content_id,
    explain_disk_full,
    free_bytes,
    fsync_path,
    inside,
    is_unicode,
    iter_rows,
    now,
    parquet_bytes,
    parse_record,
    read_json,
    read_parquet,
    read_pointer,
    read_record,
    sha256_file,
    verify_file,
    write_json,
)
from llm_core.system.hardware import Gpu, cpu_has_bf16, cpu_name, gpu, has_fast_bf16
from llm_core.system.locks import held, in_use, is_without_locks, lock_file, no_locks, preparing, unused
from llm_core.system.processes import (
    available_cores,
    die_with_parent,
    infrequent_garbage_collection,
    keep_freed_memory,
    leave_pandas_out,
    restrict_umask,
)
from llm_core.system.temporary import abandoned, delete_marks, mark_in_use, temporary_folder
from llm_core.system.version import code_version, git_commit, release

__all__ = [
    "DISK_FULL", "ID_LENGTH", "Gpu", "InnerPath", "abandoned", "atomic_writer", "available_cores", "code_version",
    "content_id", "cpu_has_bf16", "cpu_name", "delete_marks", "die_with_parent", "explain_disk_full", "free_bytes",
    "fsync_path", "git_commit", "gpu", "has_fast_bf16", "held", "in_use", "infrequent_garbage_collection", "inside",
    "is_unicode", "is_without_locks", "iter_rows", "keep_freed_memory", "leave_pandas_out", "lock_file", "mark_in_use",
    "no_locks", "now", "parquet_bytes", "parse_record", "preparing", "read_json", "read_parquet", "read_pointer",
    "read_record", "release", "restrict_umask", "sha256_file", "temporary_folder", "unused", "verify_file", "write_json",
]  # fmt: skip
