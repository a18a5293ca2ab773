"""A small share of what `python -m tests.faults` does to processes that work together and to those that are stopped."""

import os
from pathlib import Path

import pytest

from tests.faults import cancel, catalog_disk, concurrency, damage, silence, steps
from tests.faults.forks import in_new_process
from tests.faults.test_faults import assert_nothing_lost

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("TEXTMILL_FAULT_SEED", "20260102"))


def test_a_dagster_run_that_is_killed_and_given_again_ends_as_if_it_had_not_been(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(steps.kill_dagster_steps(corpus_dir, tmp_path, 1, SEED))


def test_a_cancelled_dagster_run_saves_on_a_slow_disk_whatever_else_it_is_told(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(cancel.cancel_dagster_steps(corpus_dir, tmp_path, 1, SEED))


def test_two_ranks_that_are_cancelled_save_and_leave_no_process(processed_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(cancel.cancel_torchrun(processed_dir, tmp_path, 2, SEED))


def test_a_stopped_rank_ends_the_run_within_the_collective_timeout(processed_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(silence.stop_a_rank(processed_dir, tmp_path, 1, SEED))


def test_two_trainings_of_one_folder_are_one(processed_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(concurrency.two_trainings_in_one_folder(processed_dir, tmp_path, 1, SEED))


def test_preparations_and_a_garbage_collection_take_turns(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(concurrency.two_preparations(corpus_dir, tmp_path, 1, SEED))


def test_a_file_that_grows_is_read_whole_in_the_end(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(concurrency.file_that_grows(corpus_dir, tmp_path, 1, SEED))


def test_two_runs_of_one_home_four_writers_a_reader_and_the_sensor_get_along(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(concurrency.two_dagster_runs(corpus_dir, tmp_path, 1, SEED))


def test_a_disk_that_refuses_the_catalog_leaves_the_state_before(corpus_dir: Path, tmp_path: Path) -> None:
    if not catalog_disk.can_trace():
        pytest.skip("needs the command strace")
    in_new_process(damage.prepare_home, corpus_dir, tmp_path / "home")
    (tmp_path / "trials").mkdir()
    assert_nothing_lost(catalog_disk.fail_the_nth_call_of_the_catalog(tmp_path / "home", tmp_path / "trials", every=2))
