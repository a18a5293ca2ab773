"""A corpus of English fairy tales that comes with textmill, for a first run without a download.

`fairy_tales.tar.xz` has one file per tale, in plain ASCII: Grimms' Fairy Tales, translated by Edgar Taylor and Marian Edwardes,
and the Blue (1889), Red (1890), Green (1892), Yellow (1894), Violet (1901) and Crimson (1903) Fairy Books, edited by Andrew Lang.
All are in the public domain. The text follows the transcriptions of Project Gutenberg, without prefaces, notes, attributions and
headings within a tale, and with a few misprints corrected. Tales that insult peoples or use abusive words are left out.
"""

import hashlib
import tarfile
from importlib.resources import files
from pathlib import Path

from llm_core.errors import DataError
from llm_core.system import atomic_writer

_FOLDERS_OF_EARLIER_VERSIONS = ("reference", "library", "packages")


def write_sample_corpus(directory: Path, at_least_bytes: int | None = None) -> tuple[int, int]:
    """Writes one .txt file per tale until there are `at_least_bytes`, by default all.

    Does nothing if the folder has that much text already, or the text of an earlier version.

    Returns:
        Number of files and their bytes.

    Raises:
        DataError: the tales have less text, or the disk is full.
    """
    tales = _tales()
    available = sum(len(content) for content in tales.values())
    wanted = available if at_least_bytes is None else at_least_bytes
    present = [path.stat().st_size for path in directory.rglob("*.txt")]
    if sum(present) >= wanted or has_earlier_text(directory):
        return len(present), sum(present)
    if wanted > available:
        raise DataError(f"at_least_bytes {wanted}: the fairy tales have {available} bytes; give {available} or less")
    count = written = 0
    for name, content in tales.items():
        if written >= wanted:
            break
        with atomic_writer(directory / name) as file:
            file.write(content)
        count, written = count + 1, written + len(content)
    return count, written


def has_earlier_text(directory: Path) -> bool:
    """Whether the folder has the sample text of an earlier version: documentation of Python instead of fairy tales."""
    return any((directory / name).is_dir() for name in _FOLDERS_OF_EARLIER_VERSIONS)


def _tales() -> dict[str, bytes]:
    """The content of each tale by its path, in the order in which they are written."""
    tales = {}
    with files("llm_core.corpus").joinpath("fairy_tales.tar.xz").open("rb") as packed, tarfile.open(fileobj=packed) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None, "the archive has files only"
            tales[member.name] = content.read()
    # By a hash: the first few tales are from several books, with different styles, and always the same.
    return dict(sorted(tales.items(), key=lambda tale: hashlib.sha256(tale[0].encode()).digest()))
