"""Small files that name the current artifact of a stage, from which a run of part of the lineage starts."""

from collections.abc import Iterator
from pathlib import Path

from llm_core.errors import UserError
from llm_core.layout import Home
from llm_core.system import read_pointer, write_json


def set_current(pointer: Path, path: Path) -> None:
    """Makes the file or folder `path` the current one; it must be in the folder of the pointer."""
    if find_current(pointer) != path:
        write_json(pointer, {"path": str(path.relative_to(pointer.parent))})


def get_current(pointer: Path, asset: str) -> Path:
    """The current file or folder. Raises UserError naming the asset to materialize if there is none."""
    path = find_current(pointer)
    if path is None:
        raise missing(pointer, asset)
    return path


def missing(path: Path, asset: str) -> UserError:
    """The error of a step whose input does not exist yet."""
    return UserError(f"{path}: no such file; materialize the asset {asset!r} first")


def find_current(pointer: Path) -> Path | None:
    """The current file or folder; None if there is none."""
    return read_pointer(pointer) if pointer.exists() else None


def released_directories(home: Home) -> Iterator[tuple[str, Path]]:
    """The release lines, each with the directory of its released model; the line without a name is "default"."""
    for line, pointer in home.release_lines().items():
        if (directory := find_current(pointer)) is not None:
            yield line or "default", directory
