"""A run configuration is checked as a whole before a run exists: each mistake is one line, and all are reported at once."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from pipeline.automation.jobs import LINEAGE
from pipeline.automation.run_config import STAGES, RunConfigError, find_mistakes
from pipeline.definitions import defs
from pipeline.resources import CatalogResource, Storage, Torchrun


def mistakes(config: str, job: str = "pretrain") -> list[str]:
    """What is wrong with a run configuration in YAML, as in the file of `dagster job execute -c`."""
    return find_mistakes(defs.resolve_job_def(job), yaml.safe_load(config))


def test_all_mistakes_of_all_stages_are_reported_at_once() -> None:
    config = """
    ops:
      trained_tokenizer: {config: {vocab_size: 100}}
      tokenized_shards: {config: {max_length: 64, stride: 64}}
      checkpoint: {config: {dropout: 5, learning_rat: 1.0e-3, num_layers: 0}}
    resources:
      catalog: {config: {wait_seconds: 0}}
    """
    assert mistakes(config) == [
        "trained_tokenizer.vocab_size 100: Input should be greater than or equal to 258",
        "tokenized_shards: stride 64 must be smaller than max_length 64",
        "checkpoint.num_layers 0: Input should be greater than 0",
        "checkpoint.dropout 5: Input should be less than 1",
        "checkpoint.learning_rat: no such option; did you mean learning_rate?",
        "catalog.wait_seconds 0: Input should be greater than 0",
    ]


@pytest.mark.parametrize(
    ("options", "mistake"),
    [
        # Types: YAML reads some numbers as text.
        (
            "checkpoint: {config: {learning_rate: 1e-3}}",
            "learning_rate 1e-3: .* valid number; YAML reads it as text, write 1.0e-3",
        ),
        ("checkpoint: {config: {grad_clip: 1.5E2}}", r"grad_clip 1.5E2: .* valid number; YAML reads it as text, write 1.5e\+2"),
        ("checkpoint: {config: {max_steps: 1e5}}", "max_steps 1e5: .* valid integer; write 100000"),
        ("checkpoint: {config: {max_steps: 1.0e+5}}", "max_steps 100000.0: .* valid integer; write 100000"),
        ("checkpoint: {config: {dropout: '0.1'}}", "dropout 0.1: .* valid number; remove the quotes"),
        ("checkpoint: {config: {dropout: much}}", "dropout much: Input should be a valid number$"),
        ("checkpoint: {config: {tie_embeddings: 1}}", "tie_embeddings 1: Input should be a valid boolean"),
        ("raw_text: {config: {text_field: 2024-01-01}}", "text_field 2024-01-01: .* valid string; put it in quotes"),
        ("checkpoint: {config: {model: tinny}}", "model tinny: Input should be 'auto', 'tiny', 'small'"),
        ("checkpoint: {config: {source_weights: {books: -1}}}", "source_weights.books -1: .* greater than or equal to 0"),
        ("evaluation: {config: {sample_prompts: [a, 5]}}", "sample_prompts 5: .* valid string; put it in quotes"),
        ("checkpoint: {config: {dropout: null}}", "dropout None: Input should be a valid number"),
        # Names and structure.
        ("checkpoint: {config: {val_fraction: 0.1}}", "val_fraction: no such option; it is an option of raw_text$"),
        ("evaluation: {config: {tasks: [arc_easy]}}", "tasks: no such option"),
        ("chekpoint: {config: {dropout: 0.1}}", "^chekpoint: no such asset; did you mean checkpoint?"),
        ("checkpoint: {dropout: 0.1}", r"^checkpoint .*: write its options as checkpoint: \{config: \{OPTION: VALUE\}\}"),
        ("checkpoint: {config: [5]}", r"^checkpoint .*: write its options as checkpoint: \{config: \{OPTION: VALUE\}\}"),
        ('"a\\e[31m": {}', r"no such asset"),
        # Options that do not fit together.
        ("checkpoint: {config: {hidden_size: 64, num_heads: 5}}", "^checkpoint: num_heads 5 must divide hidden_size 64"),
        ("checkpoint: {config: {replay_share: 0.1}}", "^checkpoint: replay_share 0.1 needs init_from"),
        ("checkpoint: {config: {nproc_per_node: 3}}", "^checkpoint: batch_size 16 does not divide among 3 ranks"),
        (
            "checkpoint: {config: {batch_size: 5, micro_batch_size: 2}}",
            "^checkpoint: batch_size 5 is not a multiple of micro_batch",
        ),
        ("checkpoint: {config: {init_from: nowhere}}", "^checkpoint: init_from nowhere: no such checkpoint or run folder"),
        (
            "{tokenized_shards: {config: {stride: 32}}, checkpoint: {config: {max_length: 16}}}",
            "^checkpoint: stride 32 must be small",
        ),
        ("trained_tokenizer: {config: {special_tokens: [the]}}", "^trained_tokenizer: special_tokens 'the': ordinary text"),
        (
            "evaluation: {config: {lm_eval_tasks: [a], lm_eval_task_dir: /no/where}}",
            "^evaluation: lm_eval_task_dir /no/where: no su",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_option_the_value_and_the_remedy(options: str, mistake: str) -> None:
    (line,) = mistakes(f"ops:\n  {options}" if not options.startswith("{") else f"ops: {options}")
    assert re.search(mistake, line), line
    assert line.isprintable()


@pytest.mark.parametrize(
    ("config", "mistake"),
    [
        ("op: {checkpoint: {}}", "op: no such section; did you mean ops?"),
        ("ops: checkpoint", "ops checkpoint: write the options of each as ops: {NAME: {config: {...}}}"),
        ("resources: {stroage: {}}", "stroage: no such resource; did you mean storage?"),
        ("resources: {storage: {config: {hom: /tmp}}}", "storage.hom: no such option; did you mean home?"),
        ("resources: {torchrun: {config: {stop_seconds: soon}}}", "torchrun.stop_seconds soon: Input should be a valid number"),
        (
            "resources: {storage: {config: {raw_text_dir: /no/where}}}",
            "storage: raw_text_dir /no/where: no such folder; create it or name another",
        ),
        (
            "resources: {storage: {config: {raw_text_dir: /dev/null}}}",
            "storage: raw_text_dir /dev/null: is a file; name the folder that",
        ),
        (
            "resources: {storage: {config: {release_line: a b}}}",
            "storage: release_line a b: not a name; use letters, digits, '.', ",
        ),
    ],
)
def test_sections_and_resources_are_checked_too(config: str, mistake: str) -> None:
    (line,) = mistakes(config)
    assert line.startswith(mistake)


def test_options_of_an_asset_that_the_job_does_not_contain_are_refused_in_one_line() -> None:
    (line,) = mistakes("ops: {checkpoint: {config: {dropout: 0.1}}, raw_text: {}}", "prepare_data")
    assert line == ("checkpoint: not in the job prepare_data; leave out its options, or launch an asset or job that uses them")


def test_no_more_sample_text_can_be_asked_for_than_there_is() -> None:
    (line,) = mistakes("ops: {sample_corpus: {config: {at_least_bytes: 3600001}}}", "quickstart")
    assert line == "sample_corpus.at_least_bytes 3600001: Input should be less than or equal to 3600000"
    assert mistakes("ops: {sample_corpus: {config: {at_least_bytes: null}}}", "quickstart") == []


def test_an_environment_variable_stands_for_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    config = "ops: {checkpoint: {config: {max_steps: {env: STEPS}}}}\nresources: {storage: {config: {home: {env: PLACE}}}}"
    monkeypatch.setenv("PLACE", "/somewhere")
    (unset,) = mistakes(config)
    assert unset.startswith("ops.checkpoint.config.max_steps of the run configuration refers to the environment variable STEPS: ")
    monkeypatch.setenv("STEPS", "0")
    assert mistakes(config) == ["checkpoint.max_steps 0: Input should be greater than 0"]
    monkeypatch.setenv("STEPS", "10")
    assert mistakes(config) == []


def test_every_option_may_be_given_with_its_default_and_none_with_nonsense() -> None:
    job = defs.resolve_job_def("quickstart")
    assert set(STAGES) == {node.name for node in job.nodes}
    defaults = {name: {"config": stage().model_dump()} for name, stage in STAGES.items()}
    assert find_mistakes(job, {"ops": defaults}) == []
    for name, stage in STAGES.items():
        for option in stage.model_fields:
            (line,) = find_mistakes(job, {"ops": {name: {"config": {option: {"a": "b"}}}}})
            assert line.startswith(f"{name}.{option}"), line


BAD: dict[str, Any] = {"ops": {"checkpoint": {"config": {"dropout": 5}}}}


def launch_a_job(instance: dg.DagsterInstance) -> None:
    defs.resolve_job_def("pretrain").execute_in_process(BAD, instance=instance)


def launch_assets(instance: dg.DagsterInstance) -> None:
    resources = {"storage": Storage(), "catalog": CatalogResource(), "torchrun": Torchrun()}
    dg.materialize(LINEAGE, selection="checkpoint+", instance=instance, resources=resources, run_config=BAD)


def launch_a_part_of_a_job(instance: dg.DagsterInstance) -> None:
    defs.resolve_job_def("pretrain").execute_in_process(
        BAD, instance=instance, asset_selection=[dg.AssetKey("checkpoint"), dg.AssetKey("evaluation")]
    )


@pytest.mark.parametrize("launch", [launch_a_job, launch_assets, launch_a_part_of_a_job])
def test_a_mistake_leaves_no_run_and_no_file(
    launch: Callable[[dg.DagsterInstance], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(RunConfigError, match=r"does not fit .*:\ncheckpoint.dropout 5: Input should be less than 1"):
            launch(instance)
        assert instance.get_runs() == []
    assert list(tmp_path.iterdir()) == []


def test_options_of_assets_that_a_part_of_the_job_does_not_run_need_not_fit_together() -> None:
    config = {"ops": {"tokenized_shards": {"config": {"stride": 32}}, "checkpoint": {"config": {"max_length": 16}}}}
    job = defs.resolve_job_def("pretrain")
    assert len(find_mistakes(job, config)) == 1
    assert find_mistakes(job.get_subset(asset_selection={dg.AssetKey("checkpoint")}), config) == []


def test_the_raw_text_folder_must_exist_only_for_assets_that_read_it() -> None:
    job = defs.resolve_job_def("pretrain")

    def found(folder: str, *assets: str) -> list[str]:
        selected = job.get_subset(asset_selection={dg.AssetKey(asset) for asset in assets})
        return find_mistakes(selected, {"resources": {"storage": {"config": {"raw_text_dir": folder}}}})

    assert len(found("/no/where", "trained_tokenizer")) == 1
    assert found("/no/where", "checkpoint", "evaluation") == []
    assert found("s3://no/where", "raw_text") == [], "a request would take too long"
