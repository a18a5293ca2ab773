"""Held-out metrics against values computed independently."""

import lzma
import math
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm_core import data_prep_tool, evaluate_text
from llm_core.corpus import load_snapshot, source_of
from llm_core.dataset import load_manifest
from llm_core.dataset.windows import TokenStream, Windows, token_bytes
from llm_core.distributed.ranks import Ranks
from llm_core.evaluation import by_source, metric, read_evaluation
from llm_core.evaluation.held_out import HeldOut, evaluate, evaluate_pieces, unigram_baseline, xz_bits_per_byte
from llm_core.tokenizer import Tokenizer
from tests.llm_core.model.test_transformer import build
from tests.support.training import run_train

EOT = 0
ALONE = Ranks.alone("cpu", 1)


def stream_of(length: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(1, 300, length).astype(np.uint16)
    tokens[::10] = EOT
    return tokens


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_rule_23_bits_per_byte_counts_only_text(batch_size: int) -> None:
    tokens = stream_of(100)
    sizes = torch.arange(300).double() % 5 + 1
    sizes[EOT] = 0
    model = build(length=16).eval()
    held_out = evaluate(model, Windows([TokenStream([tokens])], 16, 0, EOT), sizes, batch_size=batch_size, ranks=ALONE)
    nll = 0.0
    text = []
    for start in range(0, 99, 16):  # each window has only its own context
        tokens_of_window = torch.from_numpy(tokens[start : start + 17].astype(np.int64))
        with torch.no_grad():
            losses = F.cross_entropy(model.logits(tokens_of_window[None, :-1])[0], tokens_of_window[1:], reduction="none")
        nll += losses.sum().item()
        text += [
            (loss, sizes[token])
            for loss, token in zip(losses.tolist(), tokens_of_window[1:].tolist(), strict=True)
            if token != EOT
        ]
    assert held_out.targets == 99
    assert held_out.loss == pytest.approx(nll / 99, rel=1e-5)
    assert held_out.perplexity == pytest.approx(math.exp(nll / 99), rel=1e-4)
    bits = sum(loss for loss, _ in text) / math.log(2) / sum(size for _, size in text)
    assert held_out.bits_per_byte == pytest.approx(float(bits), rel=1e-5)


def test_the_text_of_a_split_is_all_of_its_bytes(data_dir: Path) -> None:
    """Byte lengths of tokens add up to the bytes of the documents: nothing is counted twice or lost."""
    manifest = load_manifest(data_dir)
    tokenizer = Tokenizer.load(data_dir / manifest.tokenizer.file)
    windows = Windows.open(data_dir, manifest, "val", 32, 0)
    held_out = evaluate(build(vocab_size=512), windows, token_bytes(tokenizer, manifest), batch_size=64, ranks=ALONE)
    assert held_out.text_bytes == manifest.splits["val"].bytes
    assert held_out.targets == manifest.splits["val"].tokens - 1


def test_each_token_counts_for_its_piece_of_the_text() -> None:
    tokens = stream_of(100)
    pieces = np.array([15, 20, 7, 38, 20])  # they end inside windows
    piece_of_token = np.repeat(np.arange(5), pieces)
    sizes = torch.arange(300).double() % 5 + 1
    sizes[EOT] = 0
    model, windows = build(length=16).eval(), Windows([TokenStream([tokens])], 16, 0, EOT)
    progress: list[tuple[int, int]] = []
    report = lambda done, windows: progress.append((done, windows))  # noqa: E731
    sums = evaluate_pieces(model, windows, sizes, pieces, batch_size=3, ranks=ALONE, on_progress=report)
    assert progress == [(0, 7), (3, 7), (6, 7), (7, 7)]
    total, groups = evaluate(model, windows, sizes, batch_size=3, ranks=ALONE), [HeldOut.of(row) for row in sums]
    expected = [[0.0, 0, 0.0, 0.0] for _ in groups]
    for start in range(0, 99, 16):
        tokens_of_window = torch.from_numpy(tokens[start : start + 17].astype(np.int64))
        with torch.no_grad():
            losses = F.cross_entropy(
                model.logits(tokens_of_window[None, :-1])[0], tokens_of_window[1:], reduction="none"
            ).tolist()
        for offset, (loss, token) in enumerate(zip(losses, tokens_of_window[1:].tolist(), strict=True), start=1):
            sums = expected[piece_of_token[start + offset]]
            sums[0] += loss
            sums[1] += 1
            sums[2] += loss if token != EOT else 0.0
            sums[3] += float(sizes[token])
    for group, (nll, targets, text_nll, text_bytes) in zip(groups, expected, strict=True):
        assert (group.targets, group.text_bytes) == (targets, text_bytes)
        assert group.nll == pytest.approx(nll, rel=1e-5)
        assert group.text_nll == pytest.approx(text_nll, rel=1e-5)
    assert sum(group.targets for group in groups) == total.targets
    assert sum(group.nll for group in groups) == pytest.approx(total.nll)


def test_xz_is_measured_in_bits_per_byte_of_the_text() -> None:
    text = b"abcd" * 10_000
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / 40_000


def test_targets_without_text_have_no_bits_per_byte() -> None:
    assert math.isnan(HeldOut(nll=2.0, targets=1, text_nll=0.0, text_bytes=0.0).bits_per_byte)
    assert math.isnan(xz_bits_per_byte(b""))


def test_a_checkpoint_is_evaluated_by_source_and_compared_with_xz(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, data_dir = tmp_path / "raw", tmp_path / "processed"
    for number, text in enumerate(islice(topics.values(), 40)):
        path = raw / ("even" if number % 2 == 0 else "odd") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text[:2000])
    prepare = ["--input_dir", str(raw), "--output_dir", str(data_dir), "--vocab_size", "300", "--max_length", "32"]
    data_prep_tool.main([*prepare, "--val_fraction", "0.4"])
    run_train(data_dir, tmp_path / "run", max_steps=4, save_interval=4)
    checkpoint = tmp_path / "run" / "checkpoint_step_4.pt"
    capsys.readouterr()
    monkeypatch.setattr(
        "sys.argv", ["evaluate_text", f"--checkpoint={checkpoint}", f"--data_dir={data_dir}", "--sample_tokens=2"]
    )
    evaluate_text.main()
    (path,) = checkpoint.parent.glob("evaluation_*.json")
    result = read_evaluation(path)
    rows = {row["source"]: row for row in by_source(result)}
    documents = load_snapshot(data_dir, load_manifest(data_dir).snapshot_id).kept_documents().to_pylist()
    held_out = [row for row in documents if row["split"] == "val"]
    assert rows.keys() == {source_of(row["path"]) for row in held_out} == {"even", "odd"}
    for source, row in rows.items():
        assert row["bytes"] == sum(document["bytes"] for document in held_out if source_of(document["path"]) == source)
    assert sum(row["tokens"] for row in rows.values()) == metric(result, "tokens")
    bits = sum(row["bits_per_byte"] * row["bytes"] for row in rows.values())
    assert bits / metric(result, "bytes") == pytest.approx(metric(result, "bits_per_byte"))
    assert metric(result, "share_of_text") == 1.0
    assert 0 < metric(result, "xz_bits_per_byte") < 8
    printed = capsys.readouterr().out
    assert "xz_bits_per_byte" in printed
    assert all(f"{source} " in printed for source in rows)


def test_the_unigram_baseline_is_the_entropy_of_token_frequencies() -> None:
    tokens = stream_of(1000)
    sizes = torch.ones(300).double()
    sizes[EOT] = 0
    baseline = unigram_baseline(TokenStream([tokens]), tokens[1:], sizes)
    counts = np.bincount(tokens, minlength=300) + 1
    cost = -np.log(counts / counts.sum())[tokens[1:]]
    assert baseline.loss == pytest.approx(cost.mean())
    text = tokens[1:] != EOT
    assert baseline.bits_per_byte == pytest.approx(cost[text].sum() / math.log(2) / text.sum())
