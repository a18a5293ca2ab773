"""The architecture: which package may import which, who may import PyTorch, and where paths are spelled."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# An import leads from a higher number to a lower one, or stays inside a package.
RANKS = {
    "llm_core": {
        **dict.fromkeys(("errors", "interrupts", "recipe", "config", "layout", "cli", "system"), 0),
        **dict.fromkeys(("corpus", "model"), 1),
        "tokenizer": 2,
        "dataset": 3,
        "artifact_ids": 4,
        **dict.fromkeys(("distributed", "checkpoint"), 5),
        "evaluation": 6,
        **dict.fromkeys(("training", "huggingface"), 7),
        "tools": 8,
    },
    "pipeline": {
        "catalog": 0,
        "resources": 1,
        **dict.fromkeys(("presentation", "failures"), 2),
        "processes": 3,
        "artifacts": 4,
        "assets": 5,
        "automation": 6,
        **dict.fromkeys(("definitions", "cli"), 7),
    },
}
PACKAGES = sorted(path.parent.name for path in (ROOT / "llm_core").glob("*/__init__.py"))
NEED_PYTORCH = {
    *("llm_core.model", "llm_core.distributed", "llm_core.evaluation", "llm_core.training", "llm_core.huggingface"),
    *("llm_core.dataset.windows", "llm_core.checkpoint.state", "llm_core.checkpoint.async_writer", "llm_core.checkpoint.resume"),
    *("llm_core.train", "llm_core.generate", "llm_core.export", "llm_core.evaluate_text", "llm_core.evaluate_tasks"),
}


def modules(package: str) -> dict[str, Path]:
    """Every module of a top-level package by its dotted name; a face has the name of its package."""
    paths = (ROOT / package).rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


ALL_MODULES = modules("llm_core") | modules("pipeline")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, inside functions too; the name is empty for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield (submodule, "") if submodule in ALL_MODULES else (node.module, alias.name)


def room(module: str) -> str:
    """The part of a package that has a rank; each tool of llm_core is in the room `tools`."""
    top, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    return name if name in RANKS[top] else "tools"


@pytest.mark.parametrize("package", ["llm_core", "pipeline"])
def test_imports_run_one_way(package: str) -> None:
    upwards = [
        f"{module} -> {target}"
        for module, path in modules(package).items()
        for target, _ in imports(path)
        if module != package
        and target.startswith(f"{package}.")
        and room(target) != room(module)
        and RANKS[package][room(target)] > RANKS[package][room(module)]
    ]
    assert upwards == []


def test_imports_form_no_circle() -> None:
    graph = {module: {target for target, _ in imports(path) if target in ALL_MODULES} for module, path in ALL_MODULES.items()}
    # A face imports the modules of its package, and they do not import it.
    TopologicalSorter({module: targets - {module} for module, targets in graph.items()}).prepare()


def test_the_library_knows_neither_the_pipeline_nor_its_tools() -> None:
    for path in modules("llm_core").values():
        assert not {module.split(".")[0] for module, _ in imports(path)} & {
            "pipeline",
            "dagster",
            "dagster_pipes",
            "duckdb",
            "tests",
        }


def test_pytorch_is_imported_only_where_it_is_allowed() -> None:
    importing = {module for module, path in ALL_MODULES.items() for target, _ in imports(path) if target.split(".")[0] == "torch"}
    assert [
        module for module in sorted(importing) if not any((module + ".").startswith(allowed + ".") for allowed in NEED_PYTORCH)
    ] == []


def test_faces_and_the_orchestrator_load_without_pytorch_and_matplotlib() -> None:
    faces = ", ".join(f"llm_core.{package}" for package in PACKAGES)
    heavy = ("torch", "transformers", "matplotlib", "pandas")
    code = f"import sys, {faces}, pipeline.definitions, pipeline.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_package_is_entered_by_its_face() -> None:
    """Or by a module that the face names because it needs PyTorch."""
    faces = {package: exported(ROOT / "llm_core" / package / "__init__.py") for package in PACKAGES}
    besides = []
    for module, path in ALL_MODULES.items():
        for target, name in imports(path):
            parts = target.split(".")
            if parts[0] != "llm_core" or len(parts) < 2 or parts[1] not in faces or module.startswith(f"llm_core.{parts[1]}"):
                continue
            entered = parts[2] if len(parts) > 2 else name
            if entered not in faces[parts[1]] or name.startswith("_"):
                besides.append(f"{module}: from {target} import {name}")
    assert besides == []


def exported(face: Path) -> set[str]:
    """The names in `__all__`."""
    for node in ast.parse(face.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{face} names nothing")


def test_the_map_has_a_line_for_each_package_and_tool() -> None:
    rooms = {module.split(".")[1] for module in modules("llm_core") if "." in module}
    for text in (
        ast.get_docstring(ast.parse((ROOT / "llm_core/__init__.py").read_text())),
        (ROOT / "CONTRIBUTING.md").read_text(),
    ):
        assert text is not None
        assert {name for name in rooms if not re.search(rf"^\W*{name}\b", text, re.MULTILINE)} == set()


def test_names_on_disk_are_spelled_in_the_layout_alone() -> None:
    joined = [
        f"{module}: {ast.unparse(node)}"
        for module, path in ALL_MODULES.items()
        if module != "llm_core.layout"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and is_name(node.right)
    ]
    assert joined == []


def is_name(node: ast.expr) -> bool:
    """Whether what a path is joined with is a literal with a suffix, such as "run.json"."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_sql_is_in_the_catalog_alone() -> None:
    for module, path in ALL_MODULES.items():
        if not module.startswith("pipeline.catalog"):
            assert "duckdb" not in {target.split(".")[0] for target, _ in imports(path)}, module


def test_every_rule_has_a_test_that_bears_its_number() -> None:
    names = re.findall(
        r"def test_rule_((?:\d+_|and_)+)", "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    )
    written = {int(number) for number in re.findall(r"^(\d+)\. ", (ROOT / "tests/RULES.md").read_text(), re.MULTILINE)}
    assert {int(number) for name in names for number in re.findall(r"\d+", name)} == written == set(range(1, 38))
