"""run_comparison: runs that were evaluated on the same text, side by side."""

from collections.abc import Container

import dagster as dg
from pydantic import Field

from llm_core.errors import TextmillError, UserError
from llm_core.evaluation import read_evaluation
from llm_core.layout import RunFolder
from llm_core.system import content_id
from pipeline.artifacts.release import released_lines
from pipeline.artifacts.retention import collect_home
from pipeline.artifacts.step import Step
from pipeline.artifacts.upstream import Upstream
from pipeline.assets.common import HOOKS, MODEL, OWNERS
from pipeline.assets.evaluation import evaluation
from pipeline.assets.plots import ComparedRun, picture, plot_run_comparison
from pipeline.assets.released_model import released_model
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.queries import Row
from pipeline.failures import one_line_errors
from pipeline.presentation import markdown_table
from pipeline.resources import CatalogResource, Storage

DRAWN = 10
POINTS = 200


class RunComparisonConfig(dg.Config):
    """What happens at the end of a run."""

    keep_runs: int | None = Field(
        None,
        ge=1,
        description="Remove old runs and models at the end, as `textmill gc --delete` does. Kept are this many of the newest, "
        "all that is released, and what these started from; default: remove nothing.",
    )


@dg.asset(deps=[evaluation, released_model], kinds={"duckdb"}, group_name=MODEL, owners=OWNERS, hooks=HOOKS)
@one_line_errors
def run_comparison(
    context: dg.AssetExecutionContext, config: RunComparisonConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """Runs that were evaluated on the same held-out text as this one, the best first, with their losses and sizes.

    Results on other text are not comparable and are left out; `textmill runs` lists every run.
    """
    step = Step(context, storage, catalog)
    path = Upstream(step).evaluation()
    result = read_evaluation(path)
    runs, lines = step.catalog().comparable_runs(result["evaluation_id"]), released_lines(storage)
    if not runs:
        raise UserError(f"evaluation {result['evaluation_id']}: not in the catalog; rebuild it with: textmill catalog rebuild")
    rows = [
        {
            # The page has room for this many columns.
            "run": run["run_id"][:8],
            "bits per byte": f"{run['bits_per_byte']:.4f}",
            "released": _released(lines.get(run["checkpoint_id"], []), run["model_id"]),
            "parameters": run["parameters"],
            "tokens": run["tokens_seen"],
            "loss": f"{run['loss']:.4f}",
        }
        for run in runs
    ]
    version = content_id(rows)
    removed = {} if config.keep_runs is None else _remove_old(step, config.keep_runs)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(version),
        metadata={
            "runs": markdown_table(rows),
            "comparison": picture(
                RunFolder(path.parent).picture("run_comparison", version),
                "comparison of runs",
                lambda: plot_run_comparison(_curves(step.catalog(), runs[:DRAWN], lines.keys())),
            ),
            "runs_compared": len(runs),
            "dataset_id": result["dataset_id"],
            **removed,
        },
    )


def _remove_old(step: Step, keep_runs: int) -> dict[str, int]:
    """What was removed. An error is logged: the run itself has succeeded."""
    step.storage.stop_using()  # this step is the last one
    try:
        collection = collect_home(step.home, keep_runs, delete=True, log=step.log.info)
    except (TextmillError, OSError) as error:
        step.log.warning(f"old runs are not removed: {error}")
        return {}
    ids = ", ".join(f"{candidate.kind} {candidate.identifier}" for candidate in collection.removed)
    step.log.info(f"removed {ids or 'no runs or models'}, {collection.bytes:,} bytes")
    return {"removed_runs_and_models": len(collection.removed), "removed_bytes": collection.bytes}


def _curves(catalog: Catalog, runs: list[Row], released: Container[str]) -> list[ComparedRun]:
    curves = catalog.loss_curves([run["run_id"] for run in runs], POINTS)
    return [
        ComparedRun(
            name=run["run_id"][:8],
            parameters=run["parameters"],
            bits_per_byte=run["bits_per_byte"],
            released=run["checkpoint_id"] in released,
            tokens=[point["tokens"] for point in curves[run["run_id"]]],
            losses=[point["loss"] for point in curves[run["run_id"]]],
        )
        for run in runs
    ]


def _released(lines: list[str], model_id: str | None) -> str:
    if lines:
        return "yes" if lines == ["default"] else f"yes ({', '.join(lines)})"
    return "no" if model_id is None else "earlier"
