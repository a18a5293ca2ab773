"""Exact duplicates: of documents with the same text, the first stays."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm_core.corpus.records import DUPLICATE, KEPT, RELATIVE


def mark_duplicates(documents: pa.Table) -> pa.Table:
    """Sorts the documents and keeps the first of each text; the others are marked as duplicates."""
    documents = documents.sort_by([("path", "ascending"), ("start", "ascending"), ("text_start", "ascending")])
    # What was a duplicate in the parent may be the first now.
    status = pc.if_else(pc.is_in(documents["status"], value_set=pa.array(RELATIVE)), KEPT, documents["status"])
    usable = pc.equal(status, KEPT).to_numpy()
    # Dictionary codes count up in order of first appearance: a first appearance is a code above all codes before it.
    ids = documents["document_id"].filter(pa.array(usable)).combine_chunks()
    codes = ids.dictionary_encode().indices.to_numpy()
    repeated = np.zeros(len(usable), dtype=bool)
    repeated[usable] = codes <= np.maximum.accumulate(np.concatenate([[-1], codes]))[:-1]
    status = pc.if_else(pa.array(repeated), DUPLICATE, status)
    return documents.set_column(documents.schema.get_field_index("status"), "status", status)
