"""A small share of what `python -m tests.faults` injects."""

import os
from pathlib import Path

import pytest

from llm_core import loop, trainer
from tests.faults import damage, disk, forks, kills
from tests.faults.report import Tally

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("TEXTMILL_FAULT_SEED", "20260101"))


@pytest.fixture(autouse=True)
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "measure_peak_flops", loop.measure_peak_flops)  # `prepare` replaces it
    forks.prepare()


def assert_nothing_lost(tally: Tally) -> None:
    assert tally.injected
    assert not tally.losses, f"seed {tally.seed}: {tally.losses}"


def test_a_training_that_is_killed_at_random_moments_ends_with_the_same_bits(processed_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(kills.kill_the_training_process(processed_dir, tmp_path, 15, SEED))


def test_ranks_and_torchrun_killed_at_random_leave_no_orphan_and_lose_nothing(processed_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(kills.kill_two_ranks(processed_dir, tmp_path, 2, SEED))


def test_a_damaged_file_gives_the_right_result_or_a_refusal_that_names_it(corpus_dir: Path, tmp_path: Path) -> None:
    damage.prepare_home(corpus_dir, tmp_path / "home")
    assert_nothing_lost(damage.damage_files(tmp_path / "home", tmp_path / "trials", 1, SEED))


def test_a_disk_that_refuses_leaves_the_state_before_and_the_next_run_succeeds(corpus_dir: Path, tmp_path: Path) -> None:
    assert_nothing_lost(disk.fail_the_nth_call(corpus_dir, tmp_path, every=40))


def test_a_full_disk_is_said_and_the_next_run_succeeds(corpus_dir: Path, tmp_path: Path) -> None:
    if not disk.can_mount(tmp_path / "probe"):
        pytest.skip("needs root, to mount a small file system")
    assert_nothing_lost(disk.fill_the_disk(corpus_dir, tmp_path))


def test_the_suite_notices_what_is_lost(processed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checkpoint that forgets the optimizer's moments, a kill changes the result, and the tally says so."""
    monkeypatch.setattr(trainer, "load_optimizer_state", lambda optimizer, state: None)
    tally = kills.kill_the_training_process(processed_dir, tmp_path, 20, SEED)
    assert tally.losses
