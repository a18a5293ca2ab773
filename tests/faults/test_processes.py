"""A small share of the faults that `python -m tests.faults` injects into concurrent and stopped processes."""

import os
from pathlib import Path

import pytest

from tests.faults import cancel, catalog_disk, concurrency, damage, silence, steps
from tests.faults.forks import in_new_process
from tests.faults.test_faults import assert_nothing_lost

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("TEXTMILL_FAULT_SEED", "20260102"))


def test_a_dagster_run_killed_and_run_again_ends_like_an_undisturbed_one(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(steps.kill_dagster_steps(corpus_dir, tmp_path, 1, SEED))


def test_a_cancelled_dagster_run_saves_on_a_slow_disk_despite_a_second_signal(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(cancel.cancel_dagster_steps(corpus_dir, tmp_path, 1, SEED))


def test_two_cancelled_ranks_save_and_leave_no_process(data_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(cancel.cancel_torchrun(data_dir, tmp_path, 2, SEED))


def test_a_stopped_rank_ends_the_run_within_the_collective_timeout(data_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(silence.stop_a_rank(data_dir, tmp_path, 1, SEED))


def test_only_one_of_two_trainings_runs_in_a_folder(data_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(concurrency.two_trainings_in_one_folder(data_dir, tmp_path, 1, SEED))


def test_preparations_and_a_garbage_collection_take_turns(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(concurrency.two_preparations(corpus_dir, tmp_path, 1, SEED))


def test_a_growing_file_is_read_completely_in_the_end(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(concurrency.file_that_grows(corpus_dir, tmp_path, 1, SEED))


def test_two_dagster_runs_four_writers_a_reader_and_the_sensor_share_a_home(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(concurrency.two_dagster_runs(corpus_dir, tmp_path, 1, SEED))


def test_a_disk_that_fails_the_catalog_keeps_the_previous_state(corpus_dir: Path, tmp_path: Path) -> None:
    if not catalog_disk.can_trace():
        pytest.skip("needs the command strace")
    in_new_process(damage.prepare_home, corpus_dir, tmp_path / "home")
    (tmp_path / "trials").mkdir()
    assert_nothing_lost(catalog_disk.fail_the_nth_call_of_the_catalog(tmp_path / "home", tmp_path / "trials", every=3))
