"""sample_corpus: text for a first run, without a download."""

import dagster as dg
from pydantic import Field

from llm_core.corpus import write_sample_corpus
from llm_core.layout import SAMPLE_CORPUS
from pipeline.assets.common import DATA, HOOKS, OWNERS
from pipeline.failures import one_line_errors
from pipeline.resources import Storage


class SampleCorpusConfig(dg.Config):
    """Amount of sample text."""

    at_least_bytes: int = Field(6_000_000, ge=100_000, le=20_000_000, description="Bytes of text to write.")


@dg.asset(kinds={"python", "file"}, group_name=DATA, owners=OWNERS, hooks=HOOKS)
@one_line_errors
def sample_corpus(config: SampleCorpusConfig, storage: Storage) -> dg.MaterializeResult:
    """English technical prose from the Python installation: the language reference and docstrings.

    Written to the quickstart's own folder in the home. Only the job `quickstart` trains on it.
    """
    directory = storage.folders.of_quickstart.raw_text / SAMPLE_CORPUS
    files, size = write_sample_corpus(directory, config.at_least_bytes)
    return dg.MaterializeResult(metadata={"files": files, "bytes": size, "folder": dg.MetadataValue.path(directory)})
