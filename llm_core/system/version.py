"""Which code made an artifact."""

import hashlib
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def release() -> str:
    """The installed version; "0" for a checkout that is not installed."""
    try:
        return version("textmill")
    except PackageNotFoundError:
        return "0"


@cache
def code_version() -> str:
    """Package version and a hash of the sources, so that an edited checkout never passes for a release."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{release()}+src.{digest.hexdigest()[:8]}"


@cache
def git_commit() -> str | None:
    """The commit of the checkout that this code runs from; None outside a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_PACKAGE, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
