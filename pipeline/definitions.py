"""The code location: everything Dagster knows about textmill."""

import dagster as dg

from pipeline.assets.sample_corpus import sample_corpus
from pipeline.automation import EXECUTOR, LINEAGE, prepare_data, pretrain, quickstart
from pipeline.resources import CatalogResource, Storage, Torchrun

storage = Storage()

defs = dg.Definitions(
    assets=[sample_corpus, *LINEAGE],
    jobs=[quickstart, pretrain, prepare_data],
    executor=EXECUTOR,
    resources={"storage": storage, "catalog": CatalogResource(storage=storage), "torchrun": Torchrun()},
)
