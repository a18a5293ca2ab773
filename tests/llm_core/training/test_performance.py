"""Throughput, MFU, peak FLOPs and phases."""

import itertools
import time

import pytest
import torch

from llm_core.training.performance import PhaseClock, Throughput, duration, measure_peak_flops


class Clock:
    """A clock that the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def step(self, throughput: Throughput, seconds: float, tokens: int = 100) -> None:
        self.now += seconds
        throughput.step_done(tokens)


def test_rule_24_the_first_steps_and_the_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    throughput = Throughput(warmup_steps=2, flops_per_token=1, peak_flops=1)
    for seconds in (60, 30):
        clock.step(throughput, seconds)
        assert throughput.tokens_per_second == 0
    for _ in range(3):
        clock.step(throughput, 2.0)
        clock.now += 100  # a validation
        throughput.resume()
    assert throughput.tokens_per_second == 50
    assert throughput.seconds_per_step == 2


def test_rule_25_mfu_is_flops_per_second_over_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    throughput = Throughput(warmup_steps=0, flops_per_token=1000, peak_flops=200_000)
    clock.step(throughput, 1.0, tokens=120)
    assert throughput.mfu == pytest.approx(0.6)
    clock.step(throughput, 1.0, tokens=1000)
    assert throughput.mfu == 1, "the peak was measured while other processes used the processor"


def test_rule_25_the_peak_is_the_fastest_measured_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.chain([0.0, 0.0, 0.1, 0.1, 0.1, 0.12, 0.12, 0.12, 0.2], itertools.count(0.5, 1.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert measure_peak_flops(torch.device("cpu"), torch.float32) == pytest.approx(2 * 1024**3 / 0.02)


def test_rule_25_a_product_that_takes_longer_than_the_time_limit_is_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a precision that the device emulates, the first products take seconds."""
    ticks = itertools.count(0.0, 2.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert measure_peak_flops(torch.device("cpu"), torch.float32) == pytest.approx(2 * 1024**3 / 2)


def test_each_lap_counts_for_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    phases = PhaseClock()
    for phase, seconds in (("data", 1.0), ("forward", 2.0), ("data", 0.5)):
        clock.now += seconds
        phases.lap(phase)
    assert phases.seconds == {"data": 1.5, "forward": 2.0}


def test_durations_are_readable() -> None:
    assert [duration(seconds) for seconds in (5, 125, 3600 * 3 + 1200)] == ["0m 05s", "2m 05s", "3h 20m"]
