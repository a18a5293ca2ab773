"""What code made an artifact."""

import hashlib
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def release() -> str:
    """The installed version; "0" for a checkout that is not installed."""
    try:
        return version("textmill")
    except PackageNotFoundError:
        return "0"


@cache
def code_version() -> str:
    """Package version and a hash of this package's sources, so that an edited checkout never passes for a release."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{release()}+src.{digest.hexdigest()[:8]}"


@cache
def git_commit() -> str | None:
    """The commit of the checkout this code runs from; None outside a git checkout."""
    try:
        run = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
