"""Retries that Dagster's daemon missed are requested again, once."""

from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.remote_origin import InProcessCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.storage.tags import (
    AUTO_RETRY_RUN_ID_TAG,
    RETRY_ON_ASSET_OR_OP_FAILURE_TAG,
    RETRY_STRATEGY_TAG,
    WILL_RETRY_TAG,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

from llm_core.errors import DataError, UserError
from pipeline.automation import sensors
from pipeline.automation.sensors import REPORTED_AGAIN_TAG, lost_retries
from pipeline.failures import report_failure


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dg.DagsterInstance:
    monkeypatch.setattr(sensors, "_MIN_AGE", timedelta(0))
    return dg.DagsterInstance.local_temp(str(tmp_path))


LOCATION = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="pipeline.definitions"))
ORIGIN = RemoteJobOrigin(RemoteRepositoryOrigin(LOCATION, "__repository__"), "pretrain")


def failed_run(instance: dg.DagsterInstance, origin: RemoteJobOrigin | None = ORIGIN, **tags: str) -> str:
    job = dg.GraphDefinition(name="pretrain").to_job()
    run = instance.create_run_for_job(job, tags={WILL_RETRY_TAG: "true"} | tags, remote_job_origin=origin)
    instance.report_run_failed(run)
    return run.run_id


def tick(instance: dg.DagsterInstance) -> str | None:
    with dg.build_sensor_context(instance=instance) as context:
        result = lost_retries(context)
    assert isinstance(result, dg.SkipReason)
    return result.skip_message


def failures(instance: dg.DagsterInstance, run_id: str) -> int:
    return len(instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.RUN_FAILURE).records)


def test_a_failure_without_its_retry_is_reported_again_once(instance: dg.DagsterInstance) -> None:
    run_id = failed_run(instance)
    assert tick(instance) == "reported again: 1 failed runs"
    assert failures(instance, run_id) == 2
    run = instance.get_run_by_id(run_id)
    assert run is not None and run.status == dg.DagsterRunStatus.FAILURE and run.tags[REPORTED_AGAIN_TAG] == run_id
    assert tick(instance) is None


def test_a_lost_retry_of_a_retry_is_requested_too(instance: dg.DagsterInstance) -> None:
    run_id = failed_run(instance, **{REPORTED_AGAIN_TAG: "the run that it retries"})
    assert tick(instance) == "reported again: 1 failed runs"
    assert failures(instance, run_id) == 2


def test_a_run_that_dagster_cannot_relaunch_is_left_alone(instance: dg.DagsterInstance) -> None:
    run_id = failed_run(instance, origin=None)
    assert tick(instance) is None
    assert failures(instance, run_id) == 1


@pytest.mark.parametrize("tags", [{AUTO_RETRY_RUN_ID_TAG: "some run"}, {WILL_RETRY_TAG: "false"}])
def test_a_failure_that_is_retried_or_final_is_left_alone(instance: dg.DagsterInstance, tags: dict[str, str]) -> None:
    run_id = failed_run(instance, **tags)
    assert tick(instance) is None
    assert failures(instance, run_id) == 1


def test_dagster_is_given_time_for_its_own_retry(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "_MIN_AGE", timedelta(minutes=1))
    run_id = failed_run(instance)
    assert tick(instance) is None
    assert failures(instance, run_id) == 1


FINAL, AGAIN = {RETRY_ON_ASSET_OR_OP_FAILURE_TAG: "false"}, {RETRY_ON_ASSET_OR_OP_FAILURE_TAG: "true"}


@pytest.mark.parametrize("inherited", [{}, FINAL, AGAIN])
@pytest.mark.parametrize(
    ("error", "tags"),
    [
        (UserError("--wrong"), FINAL),
        (DataError("text.txt: changed since the snapshot was taken; run again"), AGAIN | {RETRY_STRATEGY_TAG: "ALL_STEPS"}),
        (RuntimeError("out of memory"), AGAIN),
    ],
)
def test_a_retry_starts_where_it_can_succeed(error: Exception, tags: dict[str, str], inherited: dict[str, str]) -> None:
    @dg.op
    def fails() -> None:
        raise error

    @dg.job(hooks={report_failure})
    def job() -> None:
        fails()

    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False, tags=inherited)
        run = instance.get_run_by_id(result.run_id)
    assert run is not None
    decided = (RETRY_ON_ASSET_OR_OP_FAILURE_TAG, RETRY_STRATEGY_TAG)
    assert {name: value for name, value in run.tags.items() if name in decided} == tags
