"""A small share of the faults that `python -m tests.faults` injects."""

import os
from pathlib import Path

import pytest

from llm_core.training import trainer
from tests.faults import damage, disk, kills
from tests.faults.forks import in_new_process
from tests.faults.report import Tally

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("TEXTMILL_FAULT_SEED", "20260101"))


def assert_nothing_lost(tally: Tally) -> None:
    assert tally.injected
    assert not tally.losses, f"seed {tally.seed}: {tally.losses}"


def test_a_training_killed_at_random_moments_ends_with_the_same_bits(data_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(in_new_process(kills.kill_the_training_process, data_dir, tmp_path, 15, SEED))


def test_killed_ranks_and_torchrun_leave_no_orphan_and_lose_nothing(data_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(kills.kill_two_ranks(data_dir, tmp_path, 1, SEED))


def test_a_damaged_file_gives_the_correct_result_or_an_error_that_names_it(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(in_new_process(_damage_a_new_home, corpus_dir, tmp_path))


def _damage_a_new_home(corpus_dir: Path, folder: Path) -> Tally:
    damage.prepare_home(corpus_dir, folder / "home")
    return damage.damage_files(folder / "home", folder / "trials", 1, SEED)


def test_a_failing_disk_keeps_the_previous_state_and_the_next_run_succeeds(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(in_new_process(disk.fail_the_nth_call, corpus_dir, tmp_path, 80))


def test_a_full_disk_is_reported_and_the_next_run_succeeds(corpus_dir: Path, tmp_path: Path) -> None:
    if not disk.can_mount(tmp_path / "probe"):
        pytest.skip("needs root to mount a small file system")
    assert_nothing_lost(in_new_process(disk.fill_the_disk, corpus_dir, tmp_path, (0.5,)))


def test_the_suite_detects_a_loss(data_dir: Path, tmp_path: Path) -> None:
    """A resume that does not load the optimizer state changes the result after a kill."""
    losses = in_new_process(_kill_without_optimizer_state, data_dir, tmp_path).losses
    assert losses
    assert all("the weights or the logged losses differ" in loss for loss in losses)


def _kill_without_optimizer_state(data_dir: Path, folder: Path) -> Tally:
    trainer.load_optimizer_state = lambda optimizer, state, ranks: None
    return kills.kill_the_training_process(data_dir, folder, 20, SEED)
