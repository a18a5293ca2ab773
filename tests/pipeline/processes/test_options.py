"""Options on their way from the launchpad to a tool: configuration, command line and back."""

from collections.abc import Iterator
from typing import Any, get_args

import dagster as dg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llm_core.cli import parse_options
from llm_core.config import CorpusConfig, EvaluateConfig, ShardConfig, StageConfig, TasksConfig, TokenizerConfig, TrainConfig
from llm_core.errors import UserError
from pipeline.assets.checkpoint import CheckpointConfig
from pipeline.assets.evaluation import EvaluationConfig
from pipeline.assets.raw_text import RawTextConfig
from pipeline.assets.tokenized_shards import TokenizedShardsConfig
from pipeline.assets.trained_tokenizer import TrainedTokenizerConfig
from pipeline.automation import run_config
from pipeline.definitions import defs
from pipeline.processes.tools import option_list

# The stages of an asset, and its launchpad.
STAGES: list[tuple[type[StageConfig], str, type[dg.Config]]] = [
    (CorpusConfig, "raw_text", RawTextConfig),
    (TokenizerConfig, "trained_tokenizer", TrainedTokenizerConfig),
    (ShardConfig, "tokenized_shards", TokenizedShardsConfig),
    (TrainConfig, "checkpoint", CheckpointConfig),
    (EvaluateConfig, "evaluation", EvaluationConfig),
    (TasksConfig, "evaluation", EvaluationConfig),
]
NEEDED = {"tiktoken_ranks": {"tokenizer_type": "tiktoken"}, "replay_share": {"init_from": "run"}}

TEXT = st.one_of(
    st.sampled_from(
        ["null", "None", "", "-x", "--seed", "a,b", "[1]", '["a"', '{"a": 1}', 'it\'s "q"', "two\nlines", "München 文"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
)
NAME = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0,"), min_size=1).filter(
    lambda text: text == text.strip()
)


def values_of(name: str, annotation: Any) -> st.SearchStrategy[Any] | None:
    """Values of an option that is a text, a list, a dictionary, or may be missing; None for other options."""
    text = str(annotation)
    if name == "profile":
        return st.sampled_from([None, "1:3"])
    if "list[" in text:
        return st.lists(NAME if name == "lm_eval_tasks" else TEXT, min_size=1)
    if "dict[" in text:
        return st.dictionaries(TEXT, st.floats(0, 1e300))
    if annotation is str or annotation == str | None:
        return TEXT if annotation is str else st.none() | TEXT
    if type(None) in get_args(annotation):
        return st.sampled_from([None, 8, 64, 0.5, 1e-4])
    return None


def options_to_try() -> Iterator[Any]:
    for stage, asset, launchpad in STAGES:
        for name, field in stage.model_fields.items():
            if (values := values_of(name, field.annotation)) is not None:
                yield pytest.param(stage, asset, launchpad, name, values, id=f"{stage.__name__}.{name}")


@pytest.mark.parametrize(("stage", "asset", "launchpad", "name", "values"), list(options_to_try()))
def test_an_option_reaches_the_tool_unchanged(
    stage: type[StageConfig],
    asset: str,
    launchpad: type[dg.Config],
    name: str,
    values: st.SearchStrategy[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = defs.resolve_job_def("pretrain")
    monkeypatch.setattr(
        run_config, "_combinations", lambda configs: ()
    )  # such as a file that an option names and that is missing
    tried = []

    @settings(max_examples=25, deadline=None)
    @given(values)
    def try_value(value: Any) -> None:
        options = NEEDED.get(name, {}) | {name: value}
        try:
            expected = stage(**options)
        except ValidationError:
            return  # out of the bounds of this option
        config = dg.validate_run_config(job, {"ops": {asset: {"config": options}}})["ops"][asset]["config"]
        launched = launchpad(**config).stage(stage)
        assert launched == expected
        assert parse_options(stage, "tool", option_list(launched.model_dump(exclude_defaults=True))) == expected
        tried.append(value)

    try_value()
    assert any(value is not None for value in tried)


def test_a_value_that_is_too_long_for_a_command_line_is_refused_by_name() -> None:
    assert option_list({"sample_prompts": ["x" * 100_000]})
    with pytest.raises(UserError, match=r"sample_prompts: 200,0\d\d bytes are too long for a command line, at most 131,071"):
        option_list({"sample_prompts": ["x" * 200_000]})


@pytest.mark.parametrize(
    ("launchpad", "options"),
    [
        (EvaluationConfig, {"sample_prompts": ["caf\udce9"]}),
        (CheckpointConfig, {"source_weights": {"caf\udce9": 1.0}}),
        (CheckpointConfig, {"init_from": "caf\udce9"}),
        (CheckpointConfig, {"init_from": "a\0b"}),
    ],
)
def test_a_text_that_no_file_or_command_line_can_hold_is_refused(launchpad: type[dg.Config], options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"not UTF-8|contains a NUL character"):
        launchpad(**options)
