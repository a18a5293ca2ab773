"""The command line of the tools: a value is taken as it is, and what cannot be taken is refused in one line."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from llm_core.cli import parse_options
from llm_core.collect_garbage import GarbageOptions
from llm_core.config import StageConfig, TasksConfig
from llm_core.data_prep_tool import DataPrepOptions
from llm_core.evaluate_tasks import EvaluateTasksOptions
from llm_core.evaluate_text import EvaluateTextOptions
from llm_core.export import ExportOptions
from llm_core.generate import GenerateOptions
from llm_core.train import TrainOptions

TOOLS = [
    *(DataPrepOptions, TrainOptions, GenerateOptions, EvaluateTextOptions),
    *(EvaluateTasksOptions, ExportOptions, GarbageOptions),
]
# Each option of a tool that is any text.
TEXT_OPTIONS = [
    (tool, name)
    for tool in TOOLS
    for name, field in tool.model_fields.items()
    if field.annotation in (str, str | None) and name != "profile"
]
NEEDED = {"checkpoint": ["--checkpoint=c"], "model_dir": ["--model_dir=m"], "output_dir": ["--output_dir=o"]}

TEXTS = [
    "null",
    "None",
    "",
    "-x",
    "--- a/file",
    "--",
    "a,b",
    '["a"',
    '{"a": 1}',
    'it\'s "q"',
    "two\nlines",
    "München 文 🙂",
    "@f",
    "$HOME",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


class Options(StageConfig):
    """Some options."""

    text: str = Field("", description="A text.")
    names: list[str] = Field([], description="Names, 5 % of them long.")
    weights: dict[str, float] = Field({}, description="Weights.")
    flag: bool = Field(False, description="A flag.")
    size: int | None = Field(None, gt=0, description="A size.")


@pytest.mark.parametrize(("tool", "name"), TEXT_OPTIONS)
def test_a_text_is_the_argument_that_follows_its_flag(tool: type[StageConfig], name: str) -> None:
    needed = [part for other, parts in NEEDED.items() if other in tool.model_fields for part in parts]
    if name == "tiktoken_ranks":
        needed += ["--tokenizer_type", "tiktoken"]
    for text in TEXTS if name != "text_field" else filter(None, TEXTS):
        for arguments in ([f"--{name}", text], [f"--{name}={text}"]):
            assert getattr(parse_options(tool, "tool", [*needed, *arguments]), name) == text


@given(TEXT, st.lists(TEXT), st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False)))
@example("--size", ["[", "a,b", "null"], {"": 1.0, "*": 0.5})
def test_any_text_list_and_dictionary_is_read_back(text: str, names: list[str], weights: dict[str, float]) -> None:
    lists = [part for name in names for part in ("--names", json.dumps([name]))]
    parsed = parse_options(Options, "tool", [f"--text={text}", *lists, "--weights", json.dumps(weights), "--flag", "--size", "3"])
    assert parsed == Options(text=text, names=names, weights=weights, flag=True, size=3)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--names", "a,b", "--names", "-c"], ["a,b", "-c"]),
        (["--names", '["a", "b"]', "--names=c"], ["a", "b", "c"]),
        (["--names", "[]"], []),
        (["--names="], [""]),
    ],
)
def test_a_list_takes_an_item_each_time_or_all_as_json(arguments: list[str], names: list[str]) -> None:
    assert parse_options(Options, "tool", arguments).names == names


@pytest.mark.parametrize("arguments", [["--tasks", "a,b"], ["--lm_eval_tasks", "a", "--tasks", " b"], ["--tasks", '["a", "b"]']])
def test_names_of_tasks_are_separated_by_commas_too(arguments: list[str]) -> None:
    assert parse_options(TasksConfig, "tool", arguments).lm_eval_tasks == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text"], "--text: its value is missing"),
        (["--text", "--size", "3"], "--text: its value is missing; if --size is its value, write --text=--size"),
        (["--text", "--help"], "--text: its value is missing; if --help is its value, write --text=--help"),
        (["text"], "text: no flag precedes this value; --help lists them all"),
        (["-x"], "-x: no flag precedes this value; --help lists them all"),
        (["--txet", "a"], "--txet: no such option; did you mean --text? --help lists them all"),
        (
            ["--names", "[a"],
            '--names: not readable as JSON (Expecting value: line 1 column 2 (char 1)); write it like ["one", "two"]',
        ),
        (
            ["--weights", "a=1"],
            '--weights: not readable as JSON (Expecting value: line 1 column 1 (char 0)); write it like {"name": 1}',
        ),
        (["--weights", "[" * 100_000], "--weights: not readable as JSON (maximum recursion depth exceeded"),
        (["--weights", "3"], "--weights 3: Input should be a valid dictionary"),
        (["--flag=no"], "--flag=no: takes no value; write --flag or --no-flag"),
        (["--size", "null"], "--size null: Input should be a valid integer"),
        (["--size", "0"], "--size 0: Input should be greater than 0"),
        (["--text", "caf\udce9"], "--text caf\\udce9: not UTF-8; write it in UTF-8, or rename the file or folder"),
        (["--names", "caf\udce9"], "--names ['caf\\udce9']: not UTF-8"),
        (["--names", '["\\ud800"]'], "--names ['\\ud800']: not UTF-8"),
        (["--weights", '{"\\ud800": 1}'], "--weights {'\\ud800': 1}: not UTF-8"),
        (["--text", "two\nlines\udce9"], "--text two\\nlines\\udce9: not UTF-8"),
        (["--\udce9"], "--\\udce9: no such option"),
        (["--text", "x" * 100_000 + "\udce9"], "--text " + "x" * 200 + "...: not UTF-8"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        parse_options(Options, "tool", arguments)
    error = capsys.readouterr().err
    assert exited.value.code == 2
    assert error.startswith(f"tool: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_help_lists_every_flag_with_its_default(tool: type[StageConfig], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parse_options(tool, "tool", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exited.value.code is None
    for name, field in tool.model_fields.items():
        assert f"--{name}" in shown
        default: Any = field.default
        assert (
            field.is_required()
            or default in (None, "", [])
            or isinstance(default, list | dict)
            or f"(default: {default})" in shown
        )
