"""Which held-out text is read: all of it by its share, and the same bytes by every model."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_core import data_prep_tool
from llm_core.checkpoint.state import load_checkpoint, save_checkpoint
from llm_core.config import EvaluateConfig, TrainConfig
from llm_core.dataset import kept_documents, load_manifest
from llm_core.distributed.ranks import Ranks
from llm_core.errors import UserError
from llm_core.evaluation import by_source, compare, evaluator, metric, read_documents, read_evaluation
from llm_core.evaluation.excerpts import HeldOutText, choose_windows, windows_by_share
from llm_core.evaluation.held_out import evaluate
from llm_core.layout import RunFolder
from llm_core.tokenizer import Tokenizer, coverage
from llm_core.training.loop import TrainingLoop
from tests.support.training import make_trainer

SIZES = st.lists(st.tuples(st.integers(0, 4), st.integers(2, 400)), min_size=1, max_size=60)


def share_of(windows: np.ndarray, sources: np.ndarray, counts: np.ndarray, length: int) -> np.ndarray:
    """The targets of each source in these windows."""
    source_of_target = np.repeat(sources, counts)[1:]
    read = np.concatenate([source_of_target[window * length : (window + 1) * length] for window in windows.tolist()])
    return np.bincount(read, minlength=int(sources.max()) + 1)


@given(SIZES, st.integers(8, 64), st.integers(1, 80))
@settings(max_examples=300, deadline=None)
def test_each_source_is_read_by_its_share_and_at_least_once(documents: list[tuple[int, int]], length: int, count: int) -> None:
    sources, counts = (np.array(column, dtype=np.int64) for column in zip(*documents, strict=True))
    windows = -(-(int(counts.sum()) - 1) // length)
    count = min(count, windows)
    chosen = windows_by_share(sources, counts, length, count)
    assert len(np.unique(chosen)) == count == len(chosen)
    assert (chosen >= 0).all() and (chosen < windows).all() and (np.diff(chosen) > 0).all()
    read = share_of(chosen, sources, counts, length)
    present = np.unique(np.repeat(sources, counts)[1:])
    if count >= len(present):
        assert (read[present] > 0).all(), "every source is read"


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_order_of_the_text_does_not_matter(interleaved: bool) -> None:
    """Sources of 900, 90 and 10 documents: the first of them in alphabetical order are not read first."""
    sources = np.repeat([0, 1, 2], [900, 90, 10])
    if interleaved:
        sources = np.random.default_rng(0).permutation(sources)
    counts = np.full(1000, 256)
    chosen = windows_by_share(sources, counts, 64, 400)
    read = share_of(chosen, sources, counts, 64)
    assert read / read.sum() == pytest.approx([0.9, 0.09, 0.01], abs=0.003)
    if not interleaved:
        assert set(np.diff(chosen)) <= {9, 10, 11}, "one of ten, everywhere"


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Prepares a text of two alphabets in two sources, each time with other options."""
    folder = tmp_path_factory.mktemp("two_alphabets")
    for number, text in enumerate(islice(topics.values(), 40)):
        path = folder / "raw" / ("even" if number % 4 else "odd") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Characters of three bytes, too rare for tokens of their own: most windows would cut one in two.
        rare = "".join(chr(0x4E00 + place * 7919 % 20000) for place in range(number, number + 500))
        path.write_text(text[:2000] if number % 3 else rare + " naïve café <|endoftext|>")

    def prepare(**options: Any) -> Path:
        options = {"val_fraction": 0.4, "max_length": 32, "vocab_size": 300} | options
        arguments = [f"--{name}={value}" for name, value in options.items()]
        data_prep_tool.main([f"--input_dir={folder / 'raw'}", f"--output_dir={folder / 'processed'}", *arguments])
        return folder / "processed"

    return prepare


@pytest.fixture(scope="module")
def checkpoints(prepare: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that differ in tokenizer or context."""
    folder = tmp_path_factory.mktemp("runs")
    trained = {}
    for name, vocab_size, length in (("other tokenizer", 300, 32), ("short", 400, 20), ("long", 400, 48), ("own", 400, 32)):
        trainer = make_trainer(prepare(vocab_size=vocab_size), max_length=length, seed=length)
        for _ in range(3):
            trainer.train_step()
        (folder / name).mkdir()
        trained[name] = save_checkpoint(folder / name, trainer.state(), None).path
    return trained


def text_of(path: Path) -> dict[str, float]:
    return {row["document_id"]: row["bytes"] for row in read_documents(path).to_pylist()}


def evaluation_file(checkpoint: Path, result: Any) -> Path:
    return RunFolder(checkpoint.parent).evaluation(result["step"], result["evaluation_id"])


def test_models_with_another_tokenizer_or_context_read_the_same_bytes_of_the_same_documents(
    prepare: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    data_dir = prepare(vocab_size=400)
    config = EvaluateConfig(max_eval_tokens=300, eval_window=32, sample_tokens=1)
    results = {name: evaluator.evaluate_checkpoint(path, data_dir, config) for name, path in checkpoints.items()}
    files = {name: evaluation_file(path, results[name]) for name, path in checkpoints.items()}
    expected = text_of(files["own"])
    val = load_manifest(data_dir).splits["val"]
    assert sum(expected.values()) == metric(results["own"], "bytes")
    assert sum(expected.values()) == pytest.approx(300 * val.bytes / val.tokens, rel=0.3)
    for name, result in results.items():
        assert text_of(files[name]) == expected, name
        assert result["text_id"] == results["own"]["text_id"]
        for baseline in ("xz_bits_per_byte", "unigram_bits_per_byte", "share_of_text"):
            assert metric(result, baseline) == metric(results["own"], baseline), "the same for every model"
        difference = compare(read_documents(files["own"]), read_documents(files[name]))
        expected_difference = metric(result, "bits_per_byte") - metric(results["own"], "bits_per_byte")
        assert difference.improvement == pytest.approx(expected_difference, abs=1e-9)
        assert {row["source"] for row in by_source(result)} == {"even", "odd"}
    assert metric(results["own"], "tokens") <= metric(results["short"], "tokens"), "the same tokens"
    assert read_evaluation(files["own"])["precision"] == "fp32"


def test_a_checkpoint_with_another_tokenizer_gets_the_result_of_its_own_dataset(
    prepare: Callable[..., Path], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same documents in the same order and tokens as in its own dataset: equal bit for bit."""
    every = EvaluateConfig(max_eval_tokens=0, sample_tokens=2)
    path = checkpoints["other tokenizer"]
    own = evaluator.evaluate_checkpoint(path, prepare(vocab_size=300), every)
    other = evaluator.evaluate_checkpoint(path, prepare(vocab_size=400), every)
    assert other["dataset_id"] != own["dataset_id"]
    model = ("loss", "bits_per_byte", "tokens", "bytes")
    assert [metric(other, name) for name in model] == [metric(own, name) for name in model]
    assert by_source(other) == by_source(own)
    assert other["samples"] == own["samples"]
    # The baselines belong to the dataset.
    assert metric(other, "xz_bits_per_byte") == metric(own, "xz_bits_per_byte")
    assert metric(other, "unigram_bits_per_byte") != metric(own, "unigram_bits_per_byte")
    monkeypatch.setattr(coverage, "MAX_UNKNOWN", 1)
    wordpiece = prepare(tokenizer_type="wordpiece", vocab_size=400)
    with pytest.raises(UserError, match="WordPiece does not give the text back"):
        evaluator.evaluate_checkpoint(path, wordpiece, every)


def test_windows_that_do_not_fit_an_excerpt_overlap_and_no_target_counts_twice(
    prepare: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    data_dir = prepare(vocab_size=400)
    manifest = load_manifest(data_dir)
    own = Tokenizer.stored(data_dir, manifest.tokenizer.tokenizer_id)
    other = Tokenizer.stored(data_dir, load_checkpoint(checkpoints["other tokenizer"])["tokenizer_id"])
    ((_, counts),) = kept_documents(data_dir, manifest, "val")
    text = HeldOutText.open(data_dir, manifest, own, 32, choose_windows(data_dir, manifest, 32, 300))
    assert 5 < len(text.bounds) <= 10, "a window without a place between two characters is left out"
    for tokenizer, length in ((own, 20), (own, 48), (other, 32)):
        reading = text.read_by(tokenizer, length, counts)
        targets = [len(stream) - 1 for stream in reading.windows.streams]
        assert all(count % length == 0 or count < length for count in targets), "no short window after a whole one"
        assert reading.sizes.sum() == sum(targets) + len(targets)
        sizes = tokenizer.token_bytes()
        read = np.concatenate([stream.read(0, len(stream)) for stream in reading.windows.streams])
        is_target = np.ones(len(read), dtype=bool)
        is_target[np.cumsum([0, *(count + 1 for count in targets[:-1])])] = False
        counted = is_target & (np.repeat(reading.documents, reading.sizes) >= 0)
        assert sizes[read[counted]].sum() == own.token_bytes()[text.targets()].sum()


def test_training_and_evaluation_read_the_same_text_with_any_batches_and_ranks(
    prepare: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    data_dir = prepare(vocab_size=400)
    config = EvaluateConfig(max_eval_tokens=300, sample_tokens=1)
    result = evaluator.evaluate_checkpoint(checkpoints["own"], data_dir, config)
    trainer = make_trainer(data_dir, max_length=32, seed=32, eval_tokens=300)
    trainer.restore(checkpoints["own"], load_checkpoint(checkpoints["own"]))
    validated = TrainingLoop(trainer, tmp_path, None).validate()
    assert (validated.targets, validated.text_bytes) == (metric(result, "tokens"), metric(result, "bytes"))
    assert validated.loss == pytest.approx(metric(result, "loss"), rel=1e-6)
    assert validated.bits_per_byte == pytest.approx(metric(result, "bits_per_byte"), rel=1e-6)
    for batch_size, world_size in ((1, 1), (3, 1), (4, 3)):
        ranks = [LonelyRank(rank, world_size, trainer.ranks.device, 1) for rank in range(world_size)]
        parts = [
            evaluate(trainer.model, trainer.data.val, trainer.data.token_bytes, batch_size=batch_size, ranks=rank)
            for rank in ranks
        ]
        assert sum(part.targets for part in parts) == validated.targets
        assert sum(part.nll for part in parts) == pytest.approx(validated.nll, rel=1e-6)


class LonelyRank(Ranks):
    """One of several ranks, without the sums of the others."""

    def sum(self, tensor: Any) -> Any:
        return tensor


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"max_steps": 1600, "batch_size": 4, "eval_interval": 200}, 120),  # 0.15 x 200 steps of 4 windows
        ({"max_steps": 1000, "batch_size": 8, "eval_interval": 0}, 1200),
        ({"max_steps": 150, "batch_size": 20, "eval_interval": 100}, 225),  # two validations in 150 steps, not in 200
        ({"max_steps": 10, "batch_size": 4, "eval_interval": 1}, 1),  # at least one
        ({"max_steps": 100_000, "batch_size": 512, "eval_interval": 1000}, 4096),  # at most 1 Mi tokens
        ({"max_steps": 10, "batch_size": 4, "eval_interval": 1, "eval_tokens": 1000}, 1000 / 256),  # as given
    ],
)
def test_validations_take_5_percent_of_the_training_unless_an_option_says_otherwise(
    options: dict[str, Any], windows: float
) -> None:
    config = TrainConfig(**options)
    assert config.resolved(256, 0).eval_tokens == 256 * windows
    assert "eval_tokens" not in config.identity()
