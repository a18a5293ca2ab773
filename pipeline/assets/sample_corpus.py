"""sample_corpus: text for a first run, without a download."""

import dagster as dg
from pydantic import Field

from llm_core.corpus import has_earlier_text, write_sample_corpus
from llm_core.layout import SAMPLE_CORPUS
from pipeline.assets.common import DATA, HOOKS, OWNERS
from pipeline.failures import one_line_errors
from pipeline.resources import Storage


class SampleCorpusConfig(dg.Config):
    """Amount of sample text."""

    at_least_bytes: int | None = Field(
        None, ge=100_000, le=3_600_000, description="Bytes of text to write; default: all, 3.7 MB."
    )


@dg.asset(kinds={"python", "file"}, group_name=DATA, owners=OWNERS, hooks=HOOKS)
@one_line_errors
def sample_corpus(context: dg.AssetExecutionContext, config: SampleCorpusConfig, storage: Storage) -> dg.MaterializeResult:
    """English fairy tales that come with textmill: those of the Brothers Grimm and of Andrew Lang's Fairy Books.

    Written to the quickstart's own folder in the home. Only the job `quickstart` trains on it.
    """
    directory = storage.folders.of_quickstart.raw_text / SAMPLE_CORPUS
    if has_earlier_text(directory):
        context.log.warning(f"{directory}: this is the sample text of an earlier version; delete it to get the fairy tales")
    files, size = write_sample_corpus(directory, config.at_least_bytes)
    return dg.MaterializeResult(metadata={"files": files, "bytes": size, "folder": dg.MetadataValue.path(directory)})
