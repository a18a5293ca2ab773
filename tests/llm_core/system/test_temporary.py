"""Temporary folders are deleted at the end, and those of killed processes by the next process."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_core.errors import UserError
from llm_core.system import temporary, temporary_folder

_OWNER = """
import sys
from llm_core.system import temporary_folder
with temporary_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def owner() -> Iterator["subprocess.Popen[str]"]:
    """A process that uses a temporary folder."""
    process = subprocess.Popen([sys.executable, "-c", _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_a_folder_is_deleted_at_the_end_and_after_an_error(directory: Path) -> None:
    with pytest.raises(FileExistsError), temporary_folder() as folder:
        folder.mkdir()
    assert list(directory.iterdir()) == []


def test_a_folder_of_a_killed_process_is_deleted_by_the_next_and_one_in_use_is_kept(
    owner: "subprocess.Popen[str]", directory: Path
) -> None:
    directory.joinpath("textmill-of-another-program").mkdir()
    assert owner.stdout is not None
    left = Path(owner.stdout.readline().strip())
    with temporary_folder():
        assert left.is_dir()
    owner.kill()
    owner.wait()
    assert left.is_dir()
    with temporary_folder():
        assert not left.exists()
    assert [path.name for path in directory.iterdir()] == ["textmill-of-another-program"]


def test_a_temporary_directory_without_flock_is_named_with_the_remedy(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(temporary.fcntl, "flock", unsupported)
    with (
        pytest.raises(UserError, match=rf"TMPDIR {directory}: its file system has no flock .* set TMPDIR to"),
        temporary_folder(),
    ):
        pytest.fail("a folder without the lock that PyTorch's ranks need")
    assert list(directory.iterdir()) == []
