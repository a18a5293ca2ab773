"""Text generation and its tool."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_core.model.generation import generate, sample
from tests.llm_core.model.test_transformer import build
from tests.support.training import run_train


def test_greedy_decoding_equals_argmax_without_a_cache() -> None:
    model = build(num_kv_heads=2).eval()
    prompt = [5, 6, 7]
    tokens = [model.eot_id, *prompt]
    for token in generate(model, prompt, 10, temperature=0):
        assert token == int(model.logits(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == 14


def test_generation_continues_beyond_the_context() -> None:
    model = build(length=16).eval()
    assert len(list(generate(model, list(range(1, 40)), 30, seed=1))) == 30


def test_the_seed_determines_the_samples() -> None:
    model = build().eval()
    samples = [list(generate(model, [1], 12, temperature=1.5, top_k=0, seed=seed)) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


def test_generation_ends_at_end_of_text() -> None:
    model = build().eval()
    with torch.no_grad():
        model.norm.weight.zero_()  # all scores are equal, so argmax takes the first token, end-of-text
    assert list(generate(model, [1], 5, temperature=0)) == []


@pytest.mark.parametrize(
    ("top_k", "top_p", "possible"), [(0, 1.0, {0, 1, 2, 3}), (2, 1.0, {0, 1}), (0, 0.6, {0, 1}), (1, 1.0, {0}), (0, 0.01, {0})]
)
def test_top_k_and_top_p_limit_the_tokens_that_can_be_sampled(top_k: int, top_p: float, possible: set[int]) -> None:
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    assert {sample(scores, 1.0, top_k, top_p, generator) for _ in range(300)} == possible


def test_the_tool_continues_a_prompt(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, max_steps=2)
    command = [sys.executable, "-m", "llm_core.generate", "--checkpoint", str(tmp_path / "checkpoint_step_2.pt")]
    command += ["--data_dir", str(data_dir), "--prompt", "The class", "--max_new_tokens", "5", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The class")
    nothing = subprocess.run(command[:3], capture_output=True, text=True)
    assert nothing.returncode == 2
    assert "--checkpoint: missing" in nothing.stderr


def test_a_wrong_path_is_reported_with_its_remedy(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "run", max_steps=1)
    generate = [sys.executable, "-m", "llm_core.generate", "--prompt", "The", "--max_new_tokens", "2"]

    def output(**options: object) -> str:
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        done = subprocess.run([*generate, *arguments], capture_output=True, text=True)
        return done.stderr if done.returncode else done.stdout

    checkpoint = tmp_path / "run/checkpoint_step_1.pt"
    assert "nope.pt: no such file; name a checkpoint_step_<N>.pt" in output(checkpoint="nope.pt", data_dir=data_dir)
    assert "no intact checkpoint in this folder" in output(checkpoint=tmp_path, data_dir=data_dir)
    assert "with --data_dir" in output(checkpoint=checkpoint, data_dir=tmp_path)
    by_file = output(checkpoint=checkpoint, data_dir=data_dir)
    assert by_file.startswith("The") and output(checkpoint=tmp_path / "run", data_dir=data_dir) == by_file
