"""A shard: one immutable file named by its content, its index, and the damage that is detected."""

import hashlib
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from llm_core.dataset import load_manifest
from llm_core.dataset.shard import ShardWriter, open_tokens, read_index
from llm_core.errors import DataError
from llm_core.tokenizer import Tokenizer


def test_a_shard_is_one_uncompressed_batch_named_by_its_content(corpus_dir: Path, data_dir: Path) -> None:
    manifest = load_manifest(data_dir)
    assert sum(shard.split == "train" for shard in manifest.shards) > 2
    for shard in manifest.shards:
        path = data_dir / shard.file
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
        assert path.stem == shard.shard_id == shard.sha256[:16]
        assert path.stat().st_size == shard.file_bytes
        assert shard.bytes <= 1 << 16
        reader = pa.ipc.open_file(path)
        batch = reader.get_batch(0)
        assert reader.num_record_batches == 1
        assert batch.schema.field("tokens").type == pa.large_list(pa.uint16())
        assert batch.schema.metadata == {
            b"format_version": b"1",
            b"tokenizer_id": manifest.tokenizer.tokenizer_id.encode(),
            b"vocab_size": b"512",
            b"split": shard.split.encode(),
        }
        index = read_index(data_dir, shard)
        tokens = open_tokens(data_dir, shard)
        assert batch.column("document_id").to_pylist() == index["document_id"].to_pylist()
        for row, values in zip(index.to_pylist(), batch.column("tokens"), strict=True):
            stored = tokens[row["token_start"] : row["token_start"] + row["token_count"]]
            assert stored[0] == manifest.tokenizer.eot_id
            assert stored.tolist() == values.as_py()
    assert len({shard.shard_id for shard in manifest.shards}) == len(manifest.shards)


def test_tokens_are_a_memory_mapped_view(data_dir: Path) -> None:
    shard = load_manifest(data_dir).shards[0]
    before = pa.total_allocated_bytes()
    tokens = open_tokens(data_dir, shard)
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable
    assert tokens.ndim == 1
    assert pa.total_allocated_bytes() - before < tokens.nbytes


def test_the_index_is_readable_by_duckdb(data_dir: Path) -> None:
    shard = load_manifest(data_dir).shards[0]
    query = f"select count(*), sum(token_count), sum(bytes) from '{data_dir / shard.index_file}'"
    assert duckdb.execute(query).fetchall() == [(shard.documents, shard.tokens, shard.bytes)]


def test_rule_28_the_dtype_is_in_the_manifest_and_follows_the_vocabulary(data_dir: Path, tmp_path: Path) -> None:
    manifest = load_manifest(data_dir)
    assert manifest.dtype == "uint16" == open_tokens(data_dir, manifest.shards[0]).dtype.name
    tokenizer = Tokenizer.load(data_dir / manifest.tokenizer.file)
    tokenizer.vocab_size, tokenizer.dtype = 70_000, np.dtype(np.uint32)
    writer = ShardWriter("train", tokenizer)
    writer.add("0" * 64, 1, np.array([65_600], dtype=np.uint32))
    assert open_tokens(tmp_path, writer.publish(tmp_path)).tolist() == [0, 65_600]


def test_rule_34_the_totals_of_a_manifest_match_its_shards(data_dir: Path) -> None:
    manifest = load_manifest(data_dir)
    for split, totals in manifest.splits.items():
        shards = [shard for shard in manifest.shards if shard.split == split]
        assert totals.tokens == sum(shard.tokens for shard in shards) == sum(len(open_tokens(data_dir, s)) for s in shards)
        assert totals.documents == sum(shard.documents for shard in shards)
        assert totals.bytes == sum(shard.bytes for shard in shards)


def test_a_token_id_beyond_the_vocabulary_is_refused(data_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(data_dir / "tokenizer.json")
    writer = ShardWriter("train", tokenizer)
    writer.add("0" * 64, 3, np.array([1, 512], dtype=np.uint16))
    with pytest.raises(DataError, match="token id 512 is outside its vocabulary of 512"):
        open_tokens(tmp_path, writer.publish(tmp_path))


def test_a_file_that_is_not_a_shard_is_refused(data_dir: Path, tmp_path: Path) -> None:
    shard = load_manifest(data_dir).shards[0]
    (tmp_path / "dataset").mkdir()
    with pytest.raises(DataError, match="the manifest names this file, but it is missing"):
        open_tokens(tmp_path, shard)
    (tmp_path / shard.file).write_bytes(b"not Arrow")
    with pytest.raises(DataError, match="not readable as a token shard"):
        open_tokens(tmp_path, shard, verify=False)
    shutil.copy(data_dir / shard.file, tmp_path / shard.file)
    with pytest.raises(DataError, match=r"holds \d+ tokens, the manifest says 1;"):
        open_tokens(tmp_path, shard.model_copy(update={"tokens": 1}), verify=False)
