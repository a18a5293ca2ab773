"""The fairy tales that come with textmill."""

import hashlib
import io
import lzma
import socket
import tarfile
from importlib.resources import files
from pathlib import Path

import pytest

from llm_core.corpus import has_earlier_text, write_sample_corpus
from llm_core.errors import DataError

BOOKS = {"grimm", *(f"{color}_fairy_book" for color in ("blue", "red", "green", "yellow", "violet", "crimson"))}
TALES, BYTES = 276, 3_697_046
# Another text gives other tokenizers, datasets and figures: change it on purpose only.
CONTENT = "841fa1bcfaa2255e9d6242f50be1430221beab861eb59906317f41c024743849"


def texts(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.txt")}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tales")
    assert write_sample_corpus(folder) == (TALES, BYTES)
    return folder


def test_all_tales_are_written_by_default_with_the_same_bytes_everywhere(everything: Path) -> None:
    written = texts(everything)
    digest = hashlib.sha256()
    for name, content in written.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    assert (len(written), sum(map(len, written.values()))) == (TALES, BYTES)
    assert digest.hexdigest() == CONTENT


def test_a_tale_is_its_title_and_paragraphs_in_plain_ascii(everything: Path) -> None:
    assert {path.parent.name for path in everything.rglob("*.txt")} == BOOKS
    for name, content in texts(everything).items():
        text = content.decode("ascii")
        title, *paragraphs = text.removesuffix("\n").split("\n\n")
        assert 0 < len(title) < 80 and not title.endswith("."), name
        assert len(text) > 1000 and all(paragraph.strip() == paragraph != "" for paragraph in paragraphs), name
        assert not set("[]{}<>*_~|\\#@\t\r") & set(text) and "Gutenberg" not in text, name


def test_the_archive_is_packed_the_same_way_by_everyone() -> None:
    packed = files("llm_core.corpus").joinpath("fairy_tales.tar.xz").read_bytes()
    unpacked, again = lzma.decompress(packed), io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(unpacked)) as archive,
        tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as other,
    ):
        for name in sorted(archive.getnames()):
            member = tarfile.TarInfo(name)  # a file of user and group 0 with mode 0644 at time 0
            member.size = archive.getmember(name).size
            other.addfile(member, archive.extractfile(name))
    assert unpacked == again.getvalue()
    assert len(packed) < 1_100_000


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert write_sample_corpus(tmp_path, 100_000)[1] >= 100_000


def test_a_part_has_whole_tales_from_several_books(everything: Path, tmp_path: Path) -> None:
    count, size = write_sample_corpus(tmp_path, 100_000)
    part = texts(tmp_path)
    assert (len(part), sum(map(len, part.values()))) == (count, size)
    assert 100_000 <= size < 150_000
    assert part.items() <= texts(everything).items()
    assert len({name.partition("/")[0] for name in part}) >= 5


def test_text_that_is_there_is_kept_and_completed(everything: Path, tmp_path: Path) -> None:
    part = write_sample_corpus(tmp_path, 200_000)
    before = modified(tmp_path)
    assert write_sample_corpus(tmp_path, 200_000) == write_sample_corpus(tmp_path, 100_000) == part
    assert modified(tmp_path) == before
    for _ in range(2):
        assert write_sample_corpus(tmp_path) == (TALES, BYTES)
        assert texts(tmp_path) == texts(everything)
        (tmp_path / "grimm/rapunzel.txt").unlink()


@pytest.mark.parametrize("folder", ["reference", "library", "packages/torch"])
@pytest.mark.parametrize("at_least_bytes", [None, 100_000, 20_000_000])
def test_the_text_of_an_earlier_version_is_not_touched(folder: str, at_least_bytes: int | None, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "page.txt").write_text("a docstring")
    assert has_earlier_text(tmp_path)
    assert write_sample_corpus(tmp_path, at_least_bytes) == (1, 11)
    assert texts(tmp_path) == {f"{folder}/page.txt": b"a docstring"}


def test_tales_are_not_taken_for_the_text_of_an_earlier_version(everything: Path, tmp_path: Path) -> None:
    assert not has_earlier_text(everything)
    assert not has_earlier_text(tmp_path / "missing")


def test_more_text_than_there_is_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"at_least_bytes {BYTES + 1}: the fairy tales have {BYTES} bytes; give {BYTES} or less"):
        write_sample_corpus(tmp_path, BYTES + 1)
    assert not texts(tmp_path)
