"""Which artifact of a stage is the current one, in small files: a run of a part of the lineage starts from these."""

from pathlib import Path

from llm_core.errors import UserError
from llm_core.files import inside, read_json, write_json


def set_current(pointer: Path, path: Path) -> None:
    """Makes the file or folder `path` the current one; it must lie in the pointer's folder."""
    if find_current(pointer) != path:
        write_json(pointer, {"path": str(path.relative_to(pointer.parent))})


def get_current(pointer: Path, asset: str) -> Path:
    """Raises UserError naming the asset to materialize where there is none yet."""
    path = find_current(pointer)
    if path is None:
        raise UserError(f"{pointer}: no such file; materialize the asset {asset!r} first")
    return path


def find_current(pointer: Path) -> Path | None:
    """The current file or folder, None where there is none yet."""
    return inside(pointer.parent, read_json(pointer)["path"]) if pointer.exists() else None
