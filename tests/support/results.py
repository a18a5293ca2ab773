"""`python -m tests.support.results HOME`: everything in a home that must not depend on how the code is arranged, as JSON.

Run it before and after a refactoring, each time on a home in which the same job ran, and compare the two outputs with diff.
"""

import json
import sys
from pathlib import Path
from typing import Any

from llm_core.evaluation import read_results
from llm_core.layout import Home
from llm_core.system import sha256_file
from llm_core.training import read_metrics

# What says when and by which code something was made, and caches.
_VARIES = ("run.json", "training.log", "textmill.json", "README.md", "file_index.parquet", "metrics.jsonl", "catalog.duckdb")


def results(home: Home) -> dict[str, Any]:
    """Digest of each file whose bytes are a result, the losses of each run, and the figures of each evaluation."""
    folders = (home.prepared.root, home.checkpoints, home.models)
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    figures = {path.name: evaluation_figures(path) for path in home.evaluations()}
    digests = {
        str(path.relative_to(home.root)): sha256_file(path)
        for path in files
        if path.suffix != ".png" and path.name not in _VARIES and path.name not in figures and not is_checkpoint_manifest(path)
    }
    losses = {
        run.root.name: [
            line.get("loss", line.get("val_loss")) for line in read_metrics(run.metrics) if line["kind"] != "checkpoint"
        ]
        for run in home.runs()
    }
    return {"files": digests, "losses": losses, "evaluations": figures}


def evaluation_figures(path: Path) -> Any:
    evaluation: Any = read_results(path)
    return evaluation["figures"] if "figures" in evaluation else evaluation["metrics"]


def is_checkpoint_manifest(path: Path) -> bool:
    """It has the time of writing; the checkpoint itself is compared."""
    return path.name.endswith(".pt.json")


if __name__ == "__main__":
    print(json.dumps(results(Home(Path(sys.argv[1]))), indent=2, sort_keys=True))
