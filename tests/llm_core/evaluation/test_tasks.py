"""An exported model on tasks of EleutherAI's lm-eval: the results are those of the model, and errors name the remedy."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from llm_core.checkpoint.state import load_model
from llm_core.config import TasksConfig
from llm_core.errors import UserError
from llm_core.evaluate_tasks import main
from llm_core.evaluation import read_task_results, task_figures
from llm_core.evaluation.tasks import evaluate_tasks
from llm_core.huggingface.directory import export_checkpoint
from llm_core.model.transformer import Transformer
from llm_core.system import write_json
from llm_core.tokenizer import Tokenizer
from tests.support.training import run_train

TASK = """
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/endings.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/endings.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{start}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
"""
STARTS = [
    "The class statement",
    "An expression",
    "If the",
    "For a",
    "Names",
    "The value of",
    "Calls",
    "It is",
    "See also",
    "A list",
]
EXAMPLES = [
    {"start": start, "ends": [" of the object", " xylophone!", "?? 17"], "right": number % 3}
    for number, start in enumerate(STARTS)
]


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of ten questions that needs no network."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "endings.yaml").write_text(TASK.format(folder=folder))
    (folder / "texts.yaml").write_text(ROLLING.format(folder=folder))
    (folder / "endings.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    return folder


@pytest.fixture(scope="module")
def exported(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    folder = tmp_path_factory.mktemp("exported")
    run_train(data_dir, folder / "run", max_steps=20)
    checkpoint = folder / "run/checkpoint_step_20.pt"
    export_checkpoint(checkpoint, data_dir, folder / "model", None, "test")
    return checkpoint, folder / "model"


def test_a_missing_lm_eval_extra_is_reported_with_the_command_to_install_it(
    exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r'pip install -c constraints.txt -e "\.\[lm-eval\]"'):
        evaluate_tasks(exported[1], "checkpoint", "run", 1, TasksConfig(lm_eval_tasks=["hellaswag"]))


@pytest.mark.slow
def test_results_equal_those_computed_from_the_logits(
    exported: tuple[Path, Path],
    task_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    checkpoint, directory = exported
    model, _ = load_model(checkpoint)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    chosen = [likeliest(model.eval(), tokenizer, example["start"], example["ends"]) for example in EXAMPLES]
    right = [choice == example["right"] for choice, example in zip(chosen, EXAMPLES, strict=True)]
    assert 0 < sum(right) < 10, "some answers are right and some are wrong"
    output = tmp_path / "figures.json"
    arguments = {"model_dir": directory, "tasks": "endings,texts", "task_dir": task_dir, "output_file": output}
    monkeypatch.setattr(sys, "argv", ["evaluate_tasks", *(f"--{name}={value}" for name, value in arguments.items())])
    main()
    figure, *rolling = task_figures(read_task_results(output))
    bits = sum(bits_of(model, tokenizer, text) for text in STARTS) / sum(len(text.encode()) for text in STARTS)
    assert {row["metric"]: row["value"] for row in rolling} == {
        "bits_per_byte": pytest.approx(bits, rel=1e-4),
        "byte_perplexity": pytest.approx(2**bits, rel=1e-4),
    }
    assert (figure["task"], figure["metric"], figure["examples"]) == ("endings", "acc", 10)
    assert figure["value"] == pytest.approx(sum(right) / 10)
    assert figure["standard_error"] > 0
    assert "endings" in capsys.readouterr().out


@torch.no_grad()
def likeliest(model: Transformer, tokenizer: Tokenizer, start: str, ends: list[str]) -> int:
    """The index of the most likely end, after a start at the beginning of a document."""
    scores = []
    for end in ends:
        prefix = [tokenizer.eot_id, *tokenizer.encode(start).tolist()]
        tokens = [tokenizer.eot_id, *tokenizer.encode(start + end).tolist()]
        log_probabilities = model.logits(torch.tensor([tokens]))[0].log_softmax(-1)
        scores.append(sum(log_probabilities[place - 1, tokens[place]].item() for place in range(len(prefix), len(tokens))))
    return scores.index(max(scores))


@torch.no_grad()
def bits_of(model: Transformer, tokenizer: Tokenizer, text: str) -> float:
    """Bits of a text, after the end-of-text token that a document begins with; that token itself is not predicted."""
    tokens = [tokenizer.eot_id, *tokenizer.encode(text).tolist()]
    log_probabilities = model.logits(torch.tensor([tokens]))[0].log_softmax(-1)
    return -sum(log_probabilities[place - 1, tokens[place]].item() for place in range(1, len(tokens))) / math.log(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm_eval_tasks": ["endigns"]}, r"--lm_eval_tasks endigns: no such task; did you mean endings"),
        ({"lm_eval_tasks": ["endings"], "lm_eval_task_dir": "nowhere"}, r"--lm_eval_task_dir nowhere: no such folder"),
        ({"lm_eval_tasks": ["broken"]}, r"--lm_eval_tasks broken: cannot be loaded \(FileNotFoundError"),
        ({"lm_eval_tasks": []}, r"--lm_eval_tasks \[\]: name at least one"),
    ],
)
def test_a_task_that_cannot_be_run_is_reported_by_its_option(
    options: dict[str, object], message: str, exported: tuple[Path, Path], task_dir: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    (task_dir / "broken.yaml").write_text(TASK.format(folder="/nowhere").replace("endings", "broken"))
    with pytest.raises(UserError, match=message):
        evaluate_tasks(
            exported[1], "checkpoint", "run", 1, TasksConfig.model_validate({"lm_eval_task_dir": str(task_dir)} | options)
        )


def test_results_of_format_1_are_read_as_task_results(tmp_path: Path) -> None:
    common = {"evaluation_id": "e", "checkpoint_id": "c", "run_id": "r", "step": 4, "config": {}, "created_at": "now"}
    figures = [("acc", 0.5), ("acc_stderr", 0.1), ("examples", 10.0)]
    metrics = [{"metric": name, "split": "test", "source": "endings", "value": value} for name, value in figures]
    old = {"format_version": 1, "dataset_id": "lm_eval", "snapshot_id": "", "metrics": metrics, "samples": []}
    write_json(tmp_path / "old.json", common | old)
    results = read_task_results(tmp_path / "old.json")
    assert results == common | {
        "format_version": 2,
        "figures": [{"task": "endings", "split": "test", "metric": name, "value": value} for name, value in figures],
    }
    (row,) = task_figures(results)
    assert row == {"task": "endings", "metric": "acc", "value": 0.5, "standard_error": 0.1, "examples": 10.0}
    write_json(tmp_path / "new.json", results)
    assert read_task_results(tmp_path / "new.json") == results
