"""A run that would take hours on a CPU says so before it begins."""

from typing import Any

import pytest
import yaml

from llm_core.system import Gpu
from pipeline.automation import cpu_hours
from pipeline.automation.cpu_hours import warning_of_hours
from pipeline.automation.jobs import QUICKSTART_CONFIG
from tests.support.dagster_dev import ROOT

DEFAULTS: dict[str, Any] = {"trained_tokenizer": {}, "tokenized_shards": {}, "checkpoint": {}}


def options(config: dict[str, Any]) -> dict[str, Any]:
    return {name: step["config"] for name, step in config["ops"].items()}


@pytest.fixture(autouse=True)
def a_cpu_of_100_gflops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_hours, "gpu", lambda: None)
    monkeypatch.setattr(cpu_hours, "_peak_flops", lambda: 1e11)


def test_the_defaults_say_their_hours_and_name_the_file_for_a_cpu() -> None:
    warning = warning_of_hours(DEFAULTS)
    assert warning is not None
    assert "21 M parameters on 33 M tokens takes about 18 hours on this CPU; -c configs/cpu.yaml" in warning
    assert (ROOT / cpu_hours.CPU_CONFIG).is_file()


def test_nothing_is_said_of_a_short_run_a_gpu_or_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warning_of_hours(options(QUICKSTART_CONFIG)) is None
    assert warning_of_hours(options(yaml.safe_load((ROOT / cpu_hours.CPU_CONFIG).read_text()))) is None
    assert warning_of_hours({"raw_text": {}}) is None
    assert warning_of_hours({"checkpoint": {}}) is None, "on prepared data"
    assert warning_of_hours(DEFAULTS | {"checkpoint": {"device": "cuda"}}) is None
    monkeypatch.setattr(cpu_hours, "gpu", lambda: Gpu("a GPU", 8.0))
    assert warning_of_hours(DEFAULTS) is None
    assert warning_of_hours(DEFAULTS | {"checkpoint": {"device": "cpu"}}) is not None
