"""Mixtures of document groups: weighted sources, the cap on repetition, and replay of old text."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llm_core.checkpoint.state import load_checkpoint
from llm_core.config import CorpusConfig, ShardConfig, TokenizerConfig, TrainConfig
from llm_core.corpus import load_snapshot, take_snapshot
from llm_core.dataset import SHARE_UNITS, DocumentGroups, build_dataset, groups_by_source, kept_documents, load_manifest
from llm_core.errors import UserError
from llm_core.system import read_json
from llm_core.tokenizer import prepare_tokenizer
from llm_core.training.mixture import Mixture, final_shares
from llm_core.training.run_data import TrainingData
from tests.support.training import SMALL, make_trainer, run_train

SOURCES = [".", "more"]


def mixture(*shares: float) -> Mixture:
    names = [f"group{number}" for number in range(len(shares))]
    return Mixture(DocumentGroups(names, lambda ids: np.zeros(len(ids), np.int64)), [*shares])


def open_data(processed: Path, **options: Any) -> TrainingData:
    manifest = load_manifest(processed)
    config = TrainConfig(**(SMALL | options)).resolved(manifest.max_length, manifest.stride)
    return TrainingData.open(processed, manifest, config, None)


@pytest.fixture
def grown(corpus_dir: Path, data_dir: Path, tmp_path: Path) -> Path:
    """The prepared corpus after a run of 6 steps, and then with 30 new documents in their own source."""
    raw, processed = tmp_path / "raw", tmp_path / "processed"
    shutil.copytree(corpus_dir, raw)
    shutil.copytree(data_dir, processed)
    run_train(processed, tmp_path / "parent", max_steps=6, save_interval=3)
    (raw / "news").mkdir()
    for number in range(30):
        text = "\n".join(f"Today, on day {number}, the price of item {row} rose to {row * number} crowns." for row in range(20))
        (raw / "news" / f"{number}.txt").write_text(text)
    snapshot = take_snapshot(raw, processed, CorpusConfig(max_document_bytes=2048))
    artifact = prepare_tokenizer(snapshot, raw, processed, TokenizerConfig(vocab_size=512))
    build_dataset(snapshot, artifact, raw, processed, ShardConfig(max_length=64, num_workers=1, shard_bytes=1 << 16))
    return processed


def test_shares_equal_the_weights_below_the_repetition_cap() -> None:
    units = final_shares(mixture(0.75, 0.25), [1000, 1000], windows=100, max_source_epochs=1)
    assert units == [SHARE_UNITS * 3 // 4, SHARE_UNITS // 4]


def test_the_excess_over_the_repetition_cap_goes_to_the_other_groups_in_proportion() -> None:
    # Half of 1000 windows would read the 50 windows of the first group 10 times; 4 times is a share of 0.2.
    units = final_shares(mixture(0.5, 0.3, 0.2), [50, 1000, 1000], windows=1000, max_source_epochs=4)
    assert [unit / SHARE_UNITS for unit in units] == pytest.approx([0.2, 0.48, 0.32], abs=1e-5)
    assert sum(units) == SHARE_UNITS
    # A group that this pushes over its own cap is cut too.
    units = final_shares(mixture(0.5, 0.3, 0.2), [50, 110, 1000], windows=1000, max_source_epochs=4)
    assert [unit / SHARE_UNITS for unit in units] == pytest.approx([0.2, 0.44, 0.36], abs=1e-5)


def test_a_run_longer_than_the_repetition_cap_allows_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        UserError, match=r'--max_steps: the run reads 1,000 windows, more than "group0", "group1" can give .*epochs 4'
    ) as caught:
        final_shares(mixture(0.5, 0.5), [50, 60], windows=1000, max_source_epochs=4)
    windows, epochs = re.findall(r"--batch_size to (\d+), raise --max_source_epochs to ([\d.]+)", str(caught.value))[0]
    assert int(windows) == 440, "the advice works, and is no lower than needed"
    assert sum(final_shares(mixture(0.5, 0.5), [50, 60], windows=440, max_source_epochs=4)) == SHARE_UNITS
    assert sum(final_shares(mixture(0.5, 0.5), [50, 60], windows=1000, max_source_epochs=float(epochs))) == SHARE_UNITS
    with pytest.raises(UserError, match=r"epochs 4; give other sources a weight$"):
        final_shares(mixture(1.0, 0.0), [0, 60], windows=10, max_source_epochs=4)


def test_sources_are_the_top_level_folders_and_are_read_by_weight(data_dir: Path) -> None:
    data = open_data(data_dir, source_weights={".": 1, "more": 3}, max_source_epochs=100)
    assert data.groups is not None and data.groups.names == SOURCES
    shares = {usage.group: usage.share for usage in data.mixture(TrainConfig(batch_size=8, max_steps=100))}
    assert shares == {".": pytest.approx(0.25, abs=0.01), "more": pytest.approx(0.75, abs=0.01)}
    # The tokens of each stream are those of its source's documents.
    documents = {row["document_id"]: row["path"] for row in kept_rows(data_dir)}
    for group, (ids, counts) in enumerate(kept_documents(data_dir, data.manifest, "train", data.groups)):
        assert len(data.train.streams[group]) == counts.sum()
        assert {documents[i].startswith("more/") for i in ids.to_pylist()} == {SOURCES[group] == "more"}
        assert data.train.streams[group].read(0, 1).tolist() == [data.tokenizer.eot_id]


def kept_rows(processed: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = load_snapshot(processed, load_manifest(processed).snapshot_id).kept_documents().to_pylist()
    return rows


def test_a_run_with_a_mixture_resumes_bit_for_bit(data_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"source_weights": '{".": 1, "*": 1}', "max_source_epochs": 50, "max_steps": 6, "save_interval": 3}
    done = run_train(data_dir, tmp_path / "whole", keep_checkpoints=5, **options)
    assert "50.0% more" in done.stderr
    run_train(data_dir, tmp_path / "other", checkpoint=tmp_path / "whole/checkpoint_step_3.pt", **options)
    endings = [(tmp_path / run / "checkpoint_step_6.pt").read_bytes() for run in ("whole", "other")]
    assert endings[0] == endings[1]
    usages = json.loads((tmp_path / "whole/run.json").read_text())["mixture"]
    assert [usage["windows_read"] for usage in usages] == [24, 24]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({".": 1, "moor": 1}, 'no source "moor" in this text; it has ".", "more"$'),
        ({".": 1}, r'no weight for "more"; add one \(0 omits a source\) or "\*" for all others'),
        ({"*": 0}, "every weight is 0"),
    ],
)
def test_weights_that_do_not_match_the_sources_are_refused(weights: dict[str, float], message: str, data_dir: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_data(data_dir, source_weights=weights)


def test_negative_weights_are_refused(data_dir: Path, tmp_path: Path) -> None:
    done = run_train(data_dir, tmp_path, check=False, source_weights='{"more": -1}')
    assert done.returncode == 2
    assert "--source_weights.more -1" in done.stderr


def test_document_steps_records_the_step_that_first_reads_each_document(data_dir: Path, tmp_path: Path) -> None:
    """Replays a tiny run window by window, and compares the documents of its targets with the file."""
    trainer = make_trainer(data_dir, source_weights={".": 1, "more": 1}, max_source_epochs=50, max_steps=8, batch_size=4)
    data, config = trainer.data, trainer.config
    first: dict[str, int] = {}
    rows_of_tokens = [
        np.repeat(np.arange(len(ids)), counts) for ids, counts in kept_documents(data_dir, data.manifest, "train", data.groups)
    ]
    ids = [group_ids.to_pylist() for group_ids, _ in kept_documents(data_dir, data.manifest, "train", data.groups)]
    for step in range(config.max_steps):
        for window in data.order.windows_of_step(step, config.batch_size):
            group, local = (0, window) if window < data.train.sizes[0] else (1, window - data.train.sizes[0])
            rows = rows_of_tokens[group][local * 64 + 1 : local * 64 + 65]
            targets = data.train.streams[group].read(int(local) * 64 + 1, int(local) * 64 + 65)
            for row, token in zip(rows, targets, strict=True):
                if token != data.tokenizer.eot_id:
                    first.setdefault(ids[group][row], step)
    data.write_usage(tmp_path, data_dir, config)
    written = pq.read_table(tmp_path / "document_steps.parquet").to_pylist()
    assert {row["document_id"]: row["first_step"] for row in written} == first


def test_a_continued_run_starts_from_the_weights_with_a_new_warm_up(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "parent", max_steps=4)
    parent = load_checkpoint(tmp_path / "parent/checkpoint_step_4.pt")
    trainer = make_trainer(data_dir, init_from=str(tmp_path / "parent"), warmup_steps=5)
    assert trainer.data.parent_checkpoint_id is not None
    assert trainer.run_id != make_trainer(data_dir, warmup_steps=5).run_id, "the parent is part of the id"
    trainer.start_from(tmp_path, parent)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    assert all(before[name].equal(weight) for name, weight in parent["model"].items())
    assert trainer.train_step().learning_rate == pytest.approx(1e-2 / 5)
    assert trainer.step == 1


def test_a_run_starts_from_the_weights_of_a_checkpoint_file(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "parent", max_steps=2, save_interval=1)
    run_train(data_dir, tmp_path / "child", max_steps=1, init_from=tmp_path / "parent/checkpoint_step_1.pt")
    run = json.loads((tmp_path / "child/run.json").read_text())
    assert run["parent_step"] == 1


def test_a_continued_run_replays_a_share_of_what_its_parent_has_read(grown: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"init_from": tmp_path / "parent", "replay_share": 0.25, "max_steps": 5, "save_interval": 2}
    done = run_train(grown, tmp_path / "child", **options)
    assert "weights from" in done.stderr
    run = json.loads((tmp_path / "child/run.json").read_text())
    assert (run["parent_run_id"], run["parent_step"]) == (json.loads((tmp_path / "parent/run.json").read_text())["run_id"], 6)
    windows_read = {usage["group"]: usage["windows_read"] for usage in run["mixture"]}
    assert windows_read == {"seen before": 10, "new": 30}
    # The group "seen before" has exactly the documents that the parent has read.
    seen = pq.read_table(tmp_path / "parent/document_steps.parquet")["document_id"].to_pylist()
    assert set(pq.read_table(tmp_path / "child/known_documents.parquet")["document_id"].to_pylist()) == set(seen)
    # A child of the child knows what both have read.
    read_by_child = pq.read_table(tmp_path / "child/document_steps.parquet")["document_id"].to_pylist()
    run_train(grown, tmp_path / "grandchild", init_from=tmp_path / "child", max_steps=1)
    known = pq.read_table(tmp_path / "grandchild/known_documents.parquet")["document_id"].to_pylist()
    assert set(known) == set(seen) | set(read_by_child)


def test_a_continued_run_resumes_bit_for_bit(grown: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"init_from": tmp_path / "parent", "replay_share": 0.25, "max_steps": 4, "save_interval": 2}
    run_train(grown, tmp_path / "whole", keep_checkpoints=5, **options)
    run_train(grown, tmp_path / "other", checkpoint=tmp_path / "whole/checkpoint_step_2.pt", **options)
    endings = [(tmp_path / run / "checkpoint_step_4.pt").read_bytes() for run in ("whole", "other")]
    assert endings[0] == endings[1]
    done = run_train(grown, tmp_path / "no_parent", check=False, checkpoint=tmp_path / "whole/checkpoint_step_2.pt", max_steps=4)
    assert done.returncode == 2
    assert "parent_checkpoint_id is" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_share": 0.1}, "replay_share 0.1 needs init_from"),
        ({"init_from": "nowhere.pt"}, "--init_from nowhere.pt: no such file; name a checkpoint_step_<N>.pt"),
        ({"init_from": "."}, "--init_from .: no intact checkpoint in this folder"),
        ({"init_from": "parent", "hidden_size": 64}, "hidden_size is 32 in the checkpoint and 64 now"),
    ],
)
def test_a_parent_that_does_not_fit_is_refused(options: dict[str, Any], message: str, data_dir: Path, tmp_path: Path) -> None:
    if options.get("init_from") == "parent":
        run_train(data_dir, tmp_path / "parent", max_steps=1)
        options = options | {"init_from": tmp_path / "parent"}
    done = run_train(data_dir, tmp_path / "child", check=False, **options)
    assert done.returncode == 2
    assert message in done.stderr


def test_without_new_text_all_is_replayed_and_without_a_record_of_the_old_replay_is_refused(
    data_dir: Path, tmp_path: Path
) -> None:
    run_train(data_dir, tmp_path / "parent", max_steps=200, batch_size=8)
    options: dict[str, Any] = {"init_from": tmp_path / "parent", "replay_share": 0.1, "max_steps": 1}
    # When files were only removed, nothing is new, and an automatic training must not fail.
    run_train(data_dir, tmp_path / "again", **options)
    shares = {usage["group"]: usage["share"] for usage in read_json(tmp_path / "again/run.json")["mixture"]}
    assert shares == {"seen before": 1.0, "new": 0.0}
    (tmp_path / "parent/document_steps.parquet").unlink()
    done = run_train(data_dir, tmp_path / "child", check=False, **options)
    assert done.returncode == 2
    assert "no record of what that run has read" in done.stderr


def test_a_wsd_run_keeps_the_checkpoint_before_its_decay_and_is_continued_from_there(data_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr_schedule": "wsd", "decay_fraction": 0.5, "max_steps": 20, "save_interval": 3}
    run_train(data_dir, tmp_path / "parent", **options)
    kept = sorted(path.name for path in (tmp_path / "parent").glob("*.pt"))
    assert kept == ["checkpoint_step_18.pt", "checkpoint_step_20.pt", "checkpoint_step_9.pt"]
    child = make_trainer(data_dir, init_from=str(tmp_path / "parent"))
    assert child.data.parent is not None and child.data.parent.step == 9


def test_moving_a_file_to_another_source_changes_the_run_but_not_the_dataset(corpus_dir: Path, tmp_path: Path) -> None:
    raw, processed = tmp_path / "raw", tmp_path / "processed"
    shutil.copytree(corpus_dir, raw)
    ids = []
    for _ in range(2):
        snapshot = take_snapshot(raw, processed, CorpusConfig(max_document_bytes=2048))
        artifact = prepare_tokenizer(snapshot, raw, processed, TokenizerConfig(vocab_size=512))
        dataset = build_dataset(snapshot, artifact, raw, processed, ShardConfig(max_length=64, num_workers=1)).manifest
        weighted = make_trainer(processed, source_weights={"*": 1}, max_source_epochs=50)
        ids.append((dataset.dataset_id, make_trainer(processed).run_id, weighted.run_id))
        assert groups_by_source(snapshot.kept_documents()).names == SOURCES
        (file := min(raw.glob("*.txt"))).rename(raw / "more" / file.name)
    assert ids[0][:2] == ids[1][:2]
    assert ids[0][2] != ids[1][2]
