"""run_comparison: the runs side by side that were judged on the same text."""

from collections.abc import Container

import dagster as dg

from llm_core.errors import UserError
from llm_core.evaluation_file import read_evaluation
from llm_core.files import content_id
from pipeline.assets.common import HOOKS, MODEL, OWNERS, markdown_table
from pipeline.assets.evaluation import evaluation
from pipeline.assets.released_model import released_model
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.questions import Row
from pipeline.handover import Upstream
from pipeline.plots import ComparedRun, picture
from pipeline.plots import run_comparison as draw
from pipeline.release import released_lines
from pipeline.resources import CatalogResource, Storage

DRAWN = 10
POINTS = 200


@dg.asset(deps=[evaluation, released_model], kinds={"duckdb"}, group_name=MODEL, owners=OWNERS, hooks=HOOKS)
def run_comparison(context: dg.AssetExecutionContext, storage: Storage, catalog: CatalogResource) -> dg.MaterializeResult:
    """Runs of all sizes, the best first, that were judged on the same held-out text as this one; their losses and their sizes.

    Figures on other text do not compare and are left out: `textmill runs` lists every run.
    """
    path = Upstream(context, storage).evaluation()
    judged = read_evaluation(path)
    runs, lines = catalog.open(storage).comparable_runs(judged["evaluation_id"]), released_lines(storage)
    if not runs:
        raise UserError(f"evaluation {judged['evaluation_id']}: not in the catalog; make it anew with: textmill catalog rebuild")
    rows = [
        {
            # As many columns as the page has room for.
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
    return dg.MaterializeResult(
        data_version=dg.DataVersion(version),
        metadata={
            "runs": markdown_table(rows),
            "comparison": picture(
                path.with_name(f"run_comparison_{version}.png"),
                "comparison of runs",
                lambda: draw(_curves(catalog.open(storage), runs[:DRAWN], lines.keys())),
            ),
            "runs_compared": len(runs),
            "dataset_id": judged["dataset_id"],
        },
    )


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
