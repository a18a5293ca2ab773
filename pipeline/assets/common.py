"""Hooks, owners and groups of the assets."""

from pipeline.failures import report_failure

# Hooks of assets, not of jobs: "Materialize" in the asset graph launches Dagster's own job.
HOOKS = {report_failure}

# Shown as the contact of each asset; replace it with your own team.
OWNERS = ["team:textmill"]

# Groups in the asset graph: data preparation, and everything made from the data.
DATA, MODEL = "data", "model"
