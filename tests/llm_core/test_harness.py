"""An exported model on tasks of EleutherAI's lm-eval: the figures are those of the model, and errors say what to do."""

import json
import sys
from pathlib import Path

import pytest
import torch

from llm_core.checkpoint import load_model
from llm_core.config import HarnessConfig
from llm_core.errors import UserError
from llm_core.evaluation_file import read_evaluation, task_figures
from llm_core.export import export_checkpoint
from llm_core.harness import evaluate_tasks, main
from llm_core.model import Transformer
from llm_core.tokenizer import Tokenizer
from tests.llm_core.training import run_train

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
    (folder / "endings.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    return folder


@pytest.fixture(scope="module")
def exported(processed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    folder = tmp_path_factory.mktemp("exported")
    run_train(processed_dir, folder / "run", max_steps=20)
    checkpoint = folder / "run/checkpoint_step_20.pt"
    export_checkpoint(checkpoint, processed_dir, folder / "model", None, "test")
    return checkpoint, folder / "model"


def test_without_the_extra_the_error_names_it(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r'pip install -c constraints.txt -e "\.\[lm-eval\]"'):
        evaluate_tasks(exported[1], HarnessConfig(lm_eval_tasks=["hellaswag"]))


@pytest.mark.slow
def test_the_figures_are_those_of_the_model(
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
    assert 0 < sum(right) < 10, "the questions can tell a right answer from a wrong one"
    output = tmp_path / "figures.json"
    arguments = {"model_dir": directory, "tasks": "endings", "task_dir": task_dir, "output_file": output}
    monkeypatch.setattr(
        sys, "argv", ["harness", *(str(part) for name, value in arguments.items() for part in (f"--{name}", value))]
    )
    main()
    (figure,) = task_figures(read_evaluation(output))
    assert (figure["task"], figure["metric"], figure["examples"]) == ("endings", "acc", 10)
    assert figure["value"] == pytest.approx(sum(right) / 10)
    assert figure["standard_error"] > 0
    assert "endings" in capsys.readouterr().out


@torch.no_grad()
def likeliest(model: Transformer, tokenizer: Tokenizer, start: str, ends: list[str]) -> int:
    """The end that the model finds likeliest after the start of a document."""
    scores = []
    for end in ends:
        begun = [tokenizer.eot_id, *tokenizer.encode(start).tolist()]
        whole = [tokenizer.eot_id, *tokenizer.encode(start + end).tolist()]
        log_probabilities = model.logits(torch.tensor([whole]))[0].log_softmax(-1)
        scores.append(sum(log_probabilities[place - 1, whole[place]].item() for place in range(len(begun), len(whole))))
    return scores.index(max(scores))


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
def test_a_task_that_cannot_be_tried_is_named(
    options: dict[str, object], message: str, exported: tuple[Path, Path], task_dir: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    (task_dir / "broken.yaml").write_text(TASK.format(folder="/nowhere").replace("endings", "broken"))
    with pytest.raises(UserError, match=message):
        evaluate_tasks(exported[1], HarnessConfig.model_validate({"lm_eval_task_dir": str(task_dir)} | options))
