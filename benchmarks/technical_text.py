"""English technical prose of the Python installation: `python -m benchmarks.technical_text FOLDER` writes it.

The language reference and the docstrings of the standard library and of packages. It was the text of the quickstart before the
fairy tales, and figures that were measured on it stay comparable only on the same text.
"""

import argparse
import ast
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from llm_core.errors import DataError
from llm_core.system import atomic_writer, is_unicode

SIZE = 6_000_000  # bytes, as in the quickstart
# Of SIZE bytes with CPython 3.11.7, the versions of constraints.txt and the CPU build of PyTorch; others have other docstrings.
DIGEST = "4ed4215545b9cf3698438a812d6831eba413a65067b2aed63086b0ceb9e9a9c2"

# Read in this order until there is enough text. textmill depends on these packages, so they are installed.
_PACKAGES = ("torch", "numpy", "pyarrow", "dagster", "pydantic", "matplotlib", "tokenizers", "duckdb")
_SHORTEST = 200  # characters


def write_technical_text(directory: Path, at_least_bytes: int = SIZE) -> tuple[int, int]:
    """Writes one .txt file per page until there are `at_least_bytes`; does nothing if the folder has that much already.

    Returns:
        Number of files and their bytes.

    Raises:
        DataError: this Python installation has less text.
    """
    present = [path.stat().st_size for path in directory.rglob("*.txt")]
    if sum(present) >= at_least_bytes:
        return len(present), sum(present)
    files = written = 0
    for name, text in _pages():
        if written >= at_least_bytes:
            return files, written
        content = text.encode()
        with atomic_writer(directory.joinpath(f"{name}.txt")) as file:
            file.write(content)
        files, written = files + 1, written + len(content)
    if written < at_least_bytes:
        raise DataError(
            f"at_least_bytes {at_least_bytes}: this Python has {written} bytes of documentation; give {written} or less"
        )
    return files, written


def text_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of the .txt files below a folder, sorted by name."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(directory).as_posix(), path) for path in directory.rglob("*.txt")):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def report_difference(directory: Path) -> None:
    """Prints a line if the folder does not have the text on which earlier figures were measured."""
    if (digest := text_digest(directory)) != DIGEST:
        print(f"{directory}: SHA-256 {digest}, not {DIGEST}: do not compare figures on this text with earlier ones")


def _pages() -> Iterator[tuple[str, str]]:
    for topic, text in sorted(topics.items()):
        if len(text) >= _SHORTEST:
            yield f"reference/{topic}", text
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    yield from _docstring_pages(standard_library, "library")
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            yield from _docstring_pages(Path(spec.submodule_search_locations[0]), f"packages/{package}")


def _docstring_pages(root: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """One page per documented module: its docstrings with the names they belong to."""
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("")
        if "site-packages" in module.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # the standard library's tests include broken files
        text = "\n\n".join(_docstrings(tree, ".".join(module.parts)))
        if len(text) >= _SHORTEST and is_unicode(text):
            yield f"{prefix}/{'.'.join(module.parts)}", text + "\n"


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"{name}\n\n{docstring}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.technical_text", description="Writes technical prose.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--at_least_bytes", type=int, default=SIZE)
    options = parser.parse_args()
    files, size = write_technical_text(options.folder, options.at_least_bytes)
    print(f"{files:,} files, {size:,} bytes")
    if options.at_least_bytes == SIZE:
        report_difference(options.folder)


if __name__ == "__main__":
    main()
