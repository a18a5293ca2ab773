"""The code location: everything Dagster knows about textmill."""

import dagster as dg

from llm_core.files import keep_others_from_writing
from pipeline.assets.sample_corpus import sample_corpus
from pipeline.automation import EXECUTOR, LINEAGE, prepare_data, pretrain, quickstart
from pipeline.new_text import Retraining
from pipeline.resources import CatalogResource, Storage, Torchrun
from pipeline.retries import lost_retries
from pipeline.sensors import new_raw_text, nightly_retraining

keep_others_from_writing()  # of the runs' processes, too

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
