"""The code location: everything that Dagster loads."""

import dagster as dg

from llm_core.system import restrict_umask
from pipeline.assets.sample_corpus import sample_corpus
from pipeline.automation.jobs import EXECUTOR, LINEAGE, prepare_data, pretrain, quickstart
from pipeline.automation.retraining import Retraining
from pipeline.automation.run_config import check_before_launch
from pipeline.automation.sensors import lost_retries, new_raw_text, nightly_retraining
from pipeline.resources import CatalogResource, Storage, Torchrun

restrict_umask()  # inherited by the processes of each run
check_before_launch()

defs = dg.Definitions(
    assets=[sample_corpus, *LINEAGE],
    jobs=[quickstart, pretrain, prepare_data],
    sensors=[new_raw_text, lost_retries],
    schedules=[nightly_retraining],
    executor=EXECUTOR,
    resources={
        "storage": Storage(),
        "catalog": CatalogResource(),
        "torchrun": Torchrun(),
        "retraining": Retraining(),
    },
)
