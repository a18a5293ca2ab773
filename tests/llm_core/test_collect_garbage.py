"""Garbage collection removes only what no kept dataset needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core.collect_garbage import collect, find_garbage
from llm_core.config import CorpusConfig, ShardConfig, TokenizerConfig
from llm_core.corpus import load_snapshot, take_snapshot
from llm_core.dataset import DatasetManifest, build_dataset, load_manifest, token_slices
from llm_core.errors import UserError
from llm_core.tokenizer import prepare_tokenizer
from tests.support.records import run_record


class Place:
    """A folder of text that changes, and its prepared data."""

    def __init__(self, corpus_dir: Path, root: Path) -> None:
        self.raw, self.processed, self.runs = root / "raw", root / "processed", root / "runs"
        self.runs.mkdir()
        shutil.copytree(corpus_dir, self.raw)

    def prepare(self, vocab_size: int = 512) -> DatasetManifest:
        snapshot = take_snapshot(self.raw, self.processed, CorpusConfig(max_document_bytes=2048))
        artifact = prepare_tokenizer(snapshot, self.raw, self.processed, TokenizerConfig(vocab_size=vocab_size))
        return build_dataset(snapshot, artifact, self.raw, self.processed, ShardConfig(max_length=64, num_workers=1)).manifest

    def collect(self, keep: int = 1, min_age_hours: float = 0, dry_run: bool = False) -> str:
        return collect(self.processed, [self.runs], keep, min_age_hours, dry_run)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.processed)) for path in self.processed.rglob("[!.]*") if path.is_file()}

    def opens(self, dataset_id: str | None = None) -> bool:
        manifest = load_manifest(self.processed, dataset_id)
        return all(token_slices(self.processed, manifest, split) != [[]] for split in ("train", "val"))


@pytest.fixture
def place(corpus_dir: Path, tmp_path: Path) -> Place:
    return Place(corpus_dir, tmp_path)


def test_the_current_tokenizer_is_kept_before_it_has_a_dataset(place: Place) -> None:
    place.prepare()
    snapshot = take_snapshot(place.raw, place.processed, CorpusConfig(max_document_bytes=2048))
    newer = prepare_tokenizer(snapshot, place.raw, place.processed, TokenizerConfig(vocab_size=600))
    place.collect()
    again = prepare_tokenizer(snapshot, place.raw, place.processed, TokenizerConfig(vocab_size=600))
    assert again.reused and again.tokenizer_id == newer.tokenizer_id
    (place.raw / "new.txt").write_text("Newer text that makes another snapshot. " * 30)
    place.prepare()
    place.collect()
    load_snapshot(place.processed, snapshot.snapshot_id)  # drift is measured against this text


def test_an_old_dataset_is_removed_with_everything_only_it_needs(place: Place) -> None:
    first = place.prepare()
    second = place.prepare(vocab_size=600)
    before = place.files()
    text = place.collect()
    gone = before - place.files()
    assert f"manifests/{first.dataset_id}.json" in gone
    assert {shard.file for shard in first.shards} | {shard.index_file for shard in first.shards} <= gone
    assert f"tokenizers/{first.tokenizer.tokenizer_id}.json" in gone
    assert place.opens()
    assert load_manifest(place.processed) == second
    assert place.prepare(vocab_size=600) == second, "nothing is built again"
    assert f"{'manifests':<20} {1:>8}" in text


def test_the_dataset_of_a_run_is_kept(place: Place) -> None:
    first = place.prepare()
    (place.runs / "run").mkdir()
    run_record(dataset_id=first.dataset_id).write(place.runs / "run")
    place.prepare(vocab_size=600)
    place.collect()
    assert place.opens(first.dataset_id)
    (place.runs / "run/run.json").rename(place.runs / "run.json")  # --save_dir of the training tool is itself a run folder
    place.collect()
    assert place.opens(first.dataset_id)


def test_the_snapshot_of_a_run_is_kept(place: Place) -> None:
    first = place.prepare()
    (place.raw / "moved").mkdir()
    moved = next(place.raw.glob("*.txt"))
    moved.rename(place.raw / "moved" / moved.name)
    second = place.prepare()
    assert second.dataset_id == first.dataset_id, "the same documents, in other files"
    assert second.snapshot_id != first.snapshot_id
    (place.runs / "run").mkdir()
    run_record(dataset_id=first.dataset_id, snapshot_id=second.snapshot_id).write(place.runs / "run")
    place.prepare(vocab_size=600)
    (place.raw / "new.txt").write_text("A new text, and not a short one.\n" * 400)
    place.prepare(vocab_size=600)
    place.collect()
    assert load_snapshot(place.processed, second.snapshot_id).snapshot_id == second.snapshot_id


def test_the_newest_datasets_are_kept(place: Place) -> None:
    datasets = [place.prepare(vocab_size=size) for size in (512, 600, 700)]
    for age, dataset in enumerate(reversed(datasets)):
        path = place.processed / "manifests" / f"{dataset.dataset_id}.json"
        os.utime(path, (path.stat().st_mtime - 1000 * age,) * 2)
    place.collect(keep=2)
    assert place.opens(datasets[1].dataset_id)
    assert not (place.processed / "manifests" / f"{datasets[0].dataset_id}.json").exists()


def test_shards_shared_with_the_current_dataset_are_kept(place: Place) -> None:
    first = place.prepare()
    (place.raw / "new.txt").write_text("A new text, and not a short one.\n" * 400)
    second = place.prepare()
    assert {shard.file for shard in first.shards} & {shard.file for shard in second.shards}
    place.collect()
    assert place.opens()


def test_a_dry_run_removes_nothing_and_young_or_unknown_files_are_kept(place: Place) -> None:
    place.prepare()
    place.prepare(vocab_size=600)
    (place.processed / "dataset/notes.txt").write_text("mine")
    before = place.files()
    assert "not written by textmill, kept: dataset/notes.txt" in place.collect(dry_run=True)
    assert place.files() == before
    place.collect(min_age_hours=1)
    assert place.files() == before
    place.collect()
    assert "dataset/notes.txt" in place.files()


def test_a_removal_interrupted_at_any_file_is_completed_by_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place.prepare()
    place.prepare(vocab_size=600)
    backup = tmp_path / "backup"
    shutil.copytree(place.processed, backup)
    total = sum(len(paths) for paths in find_garbage(place.processed, [place.runs], 1, 0).by_kind.values())
    assert total > 5
    original = Path.unlink
    for stop_at in range(total):
        shutil.rmtree(place.processed)
        shutil.copytree(backup, place.processed)
        done = 0

        def unlink(path: Path, missing_ok: bool = False, stop_at: int = stop_at) -> None:
            nonlocal done
            if done == stop_at:
                raise KeyboardInterrupt
            done += 1
            original(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            with pytest.raises(KeyboardInterrupt):
                place.collect()
        for manifest in (place.processed / "manifests").glob("*.json"):
            assert place.opens(manifest.stem), "every manifest that is left can be read"
        place.collect()
        assert not any(find_garbage(place.processed, [place.runs], 1, 0).by_kind.values())
        assert place.opens()


def test_the_tool_prints_a_table_and_refuses_a_missing_folder_of_runs(place: Place) -> None:
    place.prepare()
    command = [sys.executable, "-m", "llm_core.collect_garbage", "--data_dir", str(place.processed), "--runs"]
    done = subprocess.run([*command, str(place.runs), "--dry_run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "shards" in done.stdout and "nothing was removed" in done.stdout
    with pytest.raises(UserError, match=r"--runs .*nowhere: no such folder"):
        collect(place.processed, [place.runs / "nowhere"], 1, 0, True)
