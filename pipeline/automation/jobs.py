"""The jobs. They are launched manually, in CI, or by the sensor and the schedule."""

import dagster as dg

from llm_core.layout import QUICKSTART
from pipeline.assets.checkpoint import checkpoint
from pipeline.assets.evaluation import evaluation
from pipeline.assets.raw_text import raw_text
from pipeline.assets.released_model import released_model
from pipeline.assets.run_comparison import run_comparison
from pipeline.assets.sample_corpus import sample_corpus
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.assets.trained_tokenizer import trained_tokenizer
from pipeline.automation.executor import cancelable_executor

PREPARATION = [raw_text, trained_tokenizer, tokenized_shards]
LINEAGE = [*PREPARATION, checkpoint, evaluation, released_model, run_comparison]

# Steps run one after another, and training has its own processes: a process per step would only add seconds of startup.
EXECUTOR = cancelable_executor

# From text to model in a few minutes on two CPU cores.
QUICKSTART_CONFIG = {
    "ops": {
        "trained_tokenizer": {"config": {"vocab_size": 4096}},
        "tokenized_shards": {"config": {"max_length": 256}},
        "checkpoint": {
            "config": {
                "hidden_size": 192,
                "num_layers": 4,
                "num_heads": 3,
                "num_kv_heads": 1,
                "batch_size": 16,
                "max_steps": 240,
                "mixed_precision": True,
                "eval_interval": 80,
                "save_interval": 120,
            }
        },
        "evaluation": {
            "config": {
                "eval_batch_size": 16,
                "sample_prompts": ["Once upon a time", "The king said to his daughter, '"],
                "sample_tokens": 120,
            }
        },
    }
}

quickstart = dg.define_asset_job(
    QUICKSTART,
    selection=[sample_corpus, *LINEAGE],
    config=QUICKSTART_CONFIG,
    executor_def=EXECUTOR,
    description="Trains a first model on bundled fairy tales in a few minutes. Downloads nothing. Its text is in "
    "quickstart/ in TEXTMILL_HOME and its models in the release line quickstart, apart from yours.",
)
pretrain = dg.define_asset_job(
    "pretrain",
    selection=LINEAGE,
    executor_def=EXECUTOR,
    description="Trains, evaluates and releases a model on your raw text (raw_text_data/ in TEXTMILL_HOME). Unchanged artifacts "
    "are reused. The defaults are for a GPU; on a CPU, use the sizes of quickstart.",
)
prepare_data = dg.define_asset_job(
    "prepare_data",
    selection=PREPARATION,
    executor_def=EXECUTOR,
    description="Turns your raw text (raw_text_data/ in TEXTMILL_HOME) into token shards, without training.",
)
