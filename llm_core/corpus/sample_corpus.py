"""A corpus of English technical prose that comes with every Python: the language reference and docstrings."""

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from llm_core.errors import DataError
from llm_core.system import atomic_writer, is_unicode

# Read in this order until there is enough text. textmill depends on these packages, so they are installed.
_PACKAGES = ("torch", "numpy", "pyarrow", "dagster", "pydantic", "matplotlib", "tokenizers", "duckdb")
_SHORTEST = 200  # characters


def write_sample_corpus(directory: Path, at_least_bytes: int) -> tuple[int, int]:
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
