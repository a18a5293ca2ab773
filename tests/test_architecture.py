"""The shape of the house: one direction of imports, and an orchestrator that starts fast."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports_of(path: Path) -> set[str]:
    """Top-level names of every module that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "llm_core").rglob("*.py")), ids=lambda path: path.name)
def test_the_library_knows_neither_the_pipeline_nor_its_tools(path: Path) -> None:
    assert not imports_of(path) & {"pipeline", "dagster", "dagster_pipes", "duckdb", "tests"}


def test_sql_stands_in_the_catalog_alone() -> None:
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "llm_core").rglob("*.py")]:
        if "catalog" not in path.parts:
            assert "duckdb" not in imports_of(path), path


def test_the_orchestrator_never_loads_pytorch_and_matplotlib_only_to_draw() -> None:
    heavy = ("torch", "transformers", "matplotlib", "pandas")
    code = f"import sys, pipeline.definitions, pipeline.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_rule_has_a_test_that_bears_its_number() -> None:
    names = re.findall(
        r"def test_rule_((?:\d+_|and_)+)", "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    )
    assert {int(number) for name in names for number in re.findall(r"\d+", name)} == set(range(1, 38))
