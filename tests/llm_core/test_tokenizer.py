"""Three tokenizer types behind one interface: exact, fast, reproducible, and deaf to special tokens in text."""

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llm_core import tokenizer as tokenizer_module
from llm_core import tokenizer_trial
from llm_core.config import END_OF_TEXT, CorpusConfig, TokenizerConfig
from llm_core.corpus import Snapshot, take_snapshot
from llm_core.encoding import encode_all
from llm_core.errors import DataError, UserError
from llm_core.files import read_json
from llm_core.sample_corpus import write_sample_corpus
from llm_core.tiktoken_ranks import PATTERNS, merges_of
from llm_core.tokenizer import CL100K_PATTERN, GPT2_PATTERN, Tokenizer, byte_characters, id_dtype
from llm_core.tokenizer_store import TokenizerArtifact, prepare_tokenizer, tokenizer_identity
from llm_core.tokenizer_training import train_tokenizer
from llm_core.tokenizer_trial import Trial

TEXTS = list(islice(topics.values(), 25))
HOSTILE = f"a {END_OF_TEXT} b{END_OF_TEXT}{END_OF_TEXT}[UNK]\n<|pad|>"

any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200)
tricky_text = st.text(alphabet=" \t\n\r\u00a0\u2028'sS\u017ftTlLvVeErRaAé中0123456789٣_-.<|>endoftext\u0301🙂\x00", max_size=200)


def train(**options: Any) -> Tokenizer:
    return train_tokenizer(lambda: iter(TEXTS), TokenizerConfig(**options))


def hugging_face(tokenizer: Tokenizer, path: Path) -> tokenizers.Tokenizer:
    """The same tokenizer.json in the `tokenizers` library."""
    tokenizer.save(path)
    loaded = tokenizers.Tokenizer.from_file(str(path))
    loaded.encode_special_tokens = True
    return loaded


def ranks_file(path: Path, tokenizer: Tokenizer, encoding_order: Callable[[int], int] = lambda rank: rank) -> dict[bytes, int]:
    """Writes a bpe tokenizer's vocabulary as a .tiktoken file and returns its ranks."""
    special = len(tokenizer.special_tokens)
    pieces = tokenizer.pieces[special:]
    ranks = {piece: encoding_order(rank) for rank, piece in enumerate(pieces)}
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items()))
    return ranks


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train(tokenizer_type="bpe", vocab_size=600)


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    return train(tokenizer_type="wordpiece", vocab_size=600)


@pytest.fixture(scope="module")
def ready(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("ranks") / "own.tiktoken"
    ranks_file(path, bpe)
    return train(tokenizer_type="tiktoken", tiktoken_ranks=str(path))


@pytest.fixture(scope="module")
def pairs(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, tokenizers.Tokenizer]]:
    """Byte-level tokenizers with each of the three patterns, beside the same tokenizer.json in `tokenizers`."""
    folder = tmp_path_factory.mktemp("pairs")
    ranks_file(folder / "own.tiktoken", bpe)
    options = {"tokenizer_type": "tiktoken", "tiktoken_ranks": str(folder / "own.tiktoken")}
    made = [bpe, *(train(**options, tiktoken_encoding=name) for name in ("gpt2", "cl100k_base", "o200k_base"))]
    return [(tokenizer, hugging_face(tokenizer, folder / f"{number}.json")) for number, tokenizer in enumerate(made)]


# The same ids everywhere


@settings(max_examples=150, deadline=None)
@given(text=any_text | tricky_text)
@example(text="")
@example(text=HOSTILE)
@example(text="I'\u017f WE'LL 'sS '\u017f x'\n \n  \r\n\t ١٢٣٤ 12345")
def test_rule_31_decode_of_encode_is_the_text_and_both_engines_give_the_same_ids(
    text: str, pairs: list[tuple[Tokenizer, tokenizers.Tokenizer]]
) -> None:
    for ours, theirs in pairs:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert ids.tolist() == theirs.encode(text).ids
        assert theirs.decode(ids.tolist(), skip_special_tokens=False) == text
        assert ours.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("characters", [r"\p{L}", r"\p{N}", r"\s", r"\p{Lu}\p{Lt}", r"\p{Ll}", r"\p{Lm}\p{Lo}", r"\p{M}"])
def test_both_engines_put_every_code_point_into_the_same_class(characters: str) -> None:
    """The classes of which the patterns are made. Fails if the Unicode tables of one engine move on alone."""
    points = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    ranks = {bytes([byte]): byte for byte in range(256)}
    engine = tiktoken.Encoding("probe", pat_str=f"[{characters}]", mergeable_ranks=ranks, special_tokens={"<|>": 256})
    matched = bytes(engine.encode_ordinary(points)).decode()  # what the pattern does not match is dropped
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"[{characters}]"), "removed")
    unmatched = "".join(piece for piece, _ in split.pre_tokenize_str(points))
    assert set(matched).isdisjoint(unmatched)
    assert len(matched) + len(unmatched) == len(points)


def test_ids_agree_on_characters_from_every_block(pairs: list[tuple[Tokenizer, tokenizers.Tokenizer]]) -> None:
    points = [chr(point) for point in range(0, 0x110000, 31) if not 0xD800 <= point < 0xE000]
    text = "".join(f"the{point}in {point}1{point}re\n" for point in points)
    for ours, theirs in pairs:
        assert ours.encode(text).tolist() == theirs.encode(text).ids


@pytest.mark.parametrize("run", [" " * 1_200_000 + "x", "\u2003" * 300_000, "\n" * 300_000 + "x", "ab" * 200_000, "1" * 300_000])
def test_endless_runs_neither_crash_nor_change_ids(run: str, pairs: list[tuple[Tokenizer, tokenizers.Tokenizer]]) -> None:
    ours, theirs = pairs[0]
    assert ours.encode(run).tolist() == theirs.encode(run).ids


def test_the_fall_back_for_endless_whitespace_gives_the_same_ids(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word" + " " * 5000 + "word\n" + "\t" * 5000
    expected = bpe.encode(text)
    monkeypatch.setattr(tokenizer_module, "_ENDLESS", 1000)
    monkeypatch.setattr(tokenizer_module, "_ENDLESS_WHITESPACE", re.compile(r"\s{1000}"))
    monkeypatch.setattr(bpe, "_engine", "must not be used")
    assert np.array_equal(bpe.encode(text), expected)


def test_transformers_loads_the_file(bpe: Tokenizer, wordpiece: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (bpe, wordpiece):
        tokenizer.save(tmp_path / "tokenizer.json")
        load: Any = transformers.PreTrainedTokenizerFast
        loaded = load(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END_OF_TEXT)
        assert loaded.eos_token_id == tokenizer.eot_id
        assert len(loaded) == tokenizer.vocab_size
        assert loaded(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0]).tolist()


# Special tokens


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "ready"])
def test_text_never_becomes_a_special_token(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    special = {tokenizer.special_tokens.index(token): token for token in tokenizer.special_tokens}
    assert tokenizer.special_tokens[0] == END_OF_TEXT
    assert special
    for ids in (tokenizer.encode(HOSTILE), *encode_all(tokenizer, [HOSTILE] * 40, 2)):
        assert tokenizer.eot_id not in ids
        if kind != "wordpiece":
            assert tokenizer.decode(ids) == HOSTILE


def test_the_first_special_token_ends_documents_and_all_have_ids() -> None:
    names = ["<|end|>", "<|pad|>", "<|user|>"]
    tokenizer = train(vocab_size=300, special_tokens=names)
    assert (tokenizer.eot_id, tokenizer.special_tokens, tokenizer.vocab_size) == (0, names, 300)
    assert tokenizer.token_bytes()[:3].tolist() == [0, 0, 0]
    assert tokenizer.decode([1, 2]) == "<|pad|><|user|>"


@pytest.mark.parametrize("token", ["the", "", " ", "##e", "<|x|> ", "Ġ<<", "a"])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "tiktoken"])
def test_a_special_token_that_text_could_produce_is_refused(token: str, kind: str) -> None:
    with pytest.raises(UserError, match=r"--special_tokens .*: ordinary text could be taken for it; write it like <\|name\|>"):
        train(tokenizer_type=kind, special_tokens=[token])


@pytest.mark.parametrize("tokens", [["<|x|>", "<|x|>"], ["[UNK]"]])
def test_special_tokens_are_given_once(tokens: list[str]) -> None:
    with pytest.raises(UserError, match="stands twice"):
        train(special_tokens=tokens)


# The interface


def test_rule_28_ids_are_uint16_only_if_the_vocabulary_fits() -> None:
    assert [id_dtype(size).name for size in (258, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_batches_give_what_single_calls_give_at_any_thread_count(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    single = [tokenizer.encode(text) for text in TEXTS]
    for threads in (1, 2, 5):
        batch = list(encode_all(tokenizer, TEXTS, threads))
        assert all(ids.dtype == np.uint16 for ids in batch)
        assert all(np.array_equal(one, other) for one, other in zip(single, batch, strict=True))


def test_load_gives_back_what_was_saved(bpe: Tokenizer, wordpiece: Tokenizer, ready: Tokenizer, tmp_path: Path) -> None:
    for tokenizer, kind in ((bpe, "bpe"), (wordpiece, "wordpiece"), (ready, "tiktoken")):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert (loaded.tokenizer_id, loaded.tokenizer_type) == (tokenizer.tokenizer_id, kind)
        assert loaded.tokenizer_id == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()[:16]
        assert np.array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


def test_a_part_of_a_character_decodes_to_the_replacement_character(bpe: Tokenizer) -> None:
    ids = bpe.encode("🙂")
    assert len(ids) > 1
    assert bpe.decode(ids[:1]) == "\ufffd"


def test_wordpiece_keeps_case_and_accents_and_marks_unknown_words(wordpiece: Tokenizer) -> None:
    assert wordpiece.special_tokens == [END_OF_TEXT, "[UNK]"]
    assert wordpiece.decode(wordpiece.encode("Return the Value")) == "Return the Value"
    assert wordpiece.decode(wordpiece.encode("the 中 value")) == "the [UNK] value"
    unknown = wordpiece.encode("中")
    assert wordpiece.token_bytes()[unknown].tolist() == [0]


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edited(serialized: bytes) -> bytes:
        description = json.loads(serialized)
        change(description)
        return json.dumps(description).encode()

    return edited


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda data: b"not json", "Expecting value"),
        (lambda data: data[:1000], "understands"),
        (edit(lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)), "pre_tokenizer"),
        (edit(lambda d: d.update(normalizer={"type": "NFC"})), "normalizer"),
        (edit(lambda d: d["model"].update(ignore_merges=True)), "options that are not used"),
        (edit(lambda d: d["model"]["merges"].reverse()), "not in the order of their ids"),
        (edit(lambda d: d["model"]["merges"].pop()), "one token per merge"),
        (edit(lambda d: d["model"]["vocab"].update(zzz=5000)), "holes"),
        (edit(lambda d: d.update(added_tokens=[])), "understands"),
    ],
)
def test_a_tokenizer_that_is_not_understood_is_refused(
    damage: Callable[[bytes], bytes], problem: str, bpe: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"tokenizer\.json: not a tokenizer this program understands .*{problem}|.*{problem}"):
        Tokenizer.load(path)


def test_a_missing_tokenizer_names_the_tool(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; make it with: python -m llm_core\.data_prep_tool"):
        Tokenizer.load(tmp_path / "tokenizer.json")


# Training


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_rule_33_training_gives_the_same_bytes_in_every_process(kind: str, request: pytest.FixtureRequest) -> None:
    program = f"""
from itertools import islice
from pydoc_data.topics import topics
from llm_core.config import TokenizerConfig
from llm_core.tokenizer_training import train_tokenizer
from llm_core.tokenizer_trial import Trial
texts = list(islice(topics.values(), 25))
print(train_tokenizer(lambda: iter(texts), TokenizerConfig(tokenizer_type={kind!r}, vocab_size=600)).tokenizer_id)
"""
    ids = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() for _ in "12"
    }
    assert ids == {request.getfixturevalue(kind).tokenizer_id}


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_vocabulary_too_large_for_the_text_names_the_size_reached(kind: str) -> None:
    with pytest.raises(
        UserError, match=r"--vocab_size 50000: the text yields \d+ tokens; give --vocab_size \d+ or less, or add text"
    ) as caught:
        train(tokenizer_type=kind, vocab_size=50_000)
    reached = int(re.findall(r"--vocab_size (\d+) or", str(caught.value))[0])
    if kind == "bpe":
        assert train(vocab_size=reached).vocab_size == reached


def test_a_vocabulary_too_small_for_bytes_and_special_tokens_names_the_least_size() -> None:
    with pytest.raises(UserError, match=r"--vocab_size 258: the text yields 260 tokens; give --vocab_size 260 or more"):
        train(vocab_size=258, special_tokens=["<|a|>", "<|b|>", "<|c|>", "<|d|>"])
    with pytest.raises(ValidationError, match="vocab_size"):
        TokenizerConfig(vocab_size=200)


# Ready encodings


def test_a_ranks_file_keeps_its_ranks_as_ids(bpe: Tokenizer, tmp_path: Path) -> None:
    ranks = ranks_file(tmp_path / "own.tiktoken", bpe)
    tokenizer = train(tokenizer_type="tiktoken", tiktoken_encoding="cl100k_base", tiktoken_ranks=str(tmp_path / "own.tiktoken"))
    assert (tokenizer.tokenizer_type, tokenizer.vocab_size, tokenizer.eot_id) == ("tiktoken", len(ranks) + 1, len(ranks))
    original = tiktoken.Encoding("own", pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})
    for text in TEXTS[:5]:
        assert tokenizer.encode(text).tolist() == original.encode_ordinary(text)


def test_special_tokens_take_the_free_ids(bpe: Tokenizer, tmp_path: Path) -> None:
    ranks_file(tmp_path / "gap.tiktoken", bpe, lambda rank: rank + (rank >= 300))
    options = {"tokenizer_type": "tiktoken", "tiktoken_ranks": str(tmp_path / "gap.tiktoken")}
    tokenizer = train(**options)
    assert (tokenizer.eot_id, tokenizer.tokenizer_type) == (300, "tiktoken")
    ranks_file(tmp_path / "gap.tiktoken", bpe, lambda rank: rank + 3 * (rank >= 300))
    with pytest.raises(UserError, match="leave ids without a token; give as many --special_tokens as there are gaps"):
        train(**options)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"YQ== 0\n", "lacks single bytes"),
        (b"YQ== zero\n", 'line 1 is not "<token in base64> <rank>"'),
        (b"??? 0\n", "line 1"),
        (None, "No such file or directory; give the path"),
    ],
)
def test_a_bad_ranks_file_names_the_option(content: bytes | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--tiktoken_ranks {path}: .*{re.escape(problem)}"):
        train(tokenizer_type="tiktoken", tiktoken_ranks=str(path))


def test_a_ranks_file_that_would_not_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"tiktoken_ranks my\.tiktoken: not with tokenizer_type bpe"):
        TokenizerConfig(tiktoken_ranks="my.tiktoken")
    mistyped = TokenizerConfig(tokenizer_type="tiktoken", tiktoken_ranks=str(tmp_path / "mine.tiktoken"))
    with pytest.raises(UserError, match=r"--tiktoken_ranks .*mine\.tiktoken: no such file"):
        tokenizer_identity(mistyped)


def test_ranks_that_are_no_byte_pair_encoding_are_refused() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    with pytest.raises(UserError, match="token 256 cannot be merged from tokens of lower rank"):
        merges_of(ranks, "own")
    assert merges_of(ranks | {b"bc": 256, b"abc": 257}, "own") == [(b"b", b"c"), (b"a", b"bc")]


def test_an_unknown_encoding_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"--tiktoken_encoding gpt9: unknown; choose one of {', '.join(PATTERNS)}"):
        train(tokenizer_type="tiktoken", tiktoken_encoding="gpt9")


def test_an_encoding_that_cannot_be_downloaded_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"--tiktoken_encoding gpt2: .*fetch https://\S+/r50k_base.tiktoken .* --tiktoken_ranks"):
        train(tokenizer_type="tiktoken")


def test_a_downloaded_encoding_is_used_like_a_ranks_file(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ranks_file(tmp_path / "own.tiktoken", bpe)
    named = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": named}.__getitem__)
    local = train(tokenizer_type="tiktoken", tiktoken_ranks=str(tmp_path / "own.tiktoken"))
    assert train(tokenizer_type="tiktoken").tokenizer_id == local.tokenizer_id


def test_byte_characters_are_those_of_gpt2() -> None:
    assert sorted(byte_characters()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert [byte_characters()[byte] for byte in b"aZ !\n\xc3"] == ["a", "Z", "Ġ", "!", "Ċ", "Ã"]


# The store


@pytest.fixture
def snapshot(corpus_dir: Path, tmp_path: Path) -> Snapshot:
    return take_snapshot(corpus_dir, tmp_path, CorpusConfig(max_document_bytes=2048))


@pytest.fixture
def make(corpus_dir: Path, tmp_path: Path) -> Callable[..., TokenizerArtifact]:
    def prepare(snapshot: Snapshot, **options: Any) -> TokenizerArtifact:
        return prepare_tokenizer(snapshot, corpus_dir, tmp_path, TokenizerConfig(**{"vocab_size": 300, **options}))

    return prepare


def grown(snapshot: Snapshot) -> Snapshot:
    """The same documents under another snapshot id: what new text looks like to the store."""
    return Snapshot(snapshot.summary | {"snapshot_id": "0" * 16}, snapshot.files, snapshot.documents)


def test_the_store_keeps_every_tokenizer_with_its_report(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    artifact = make(snapshot)
    path = tmp_path / artifact.file
    assert path.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    report = read_json(tmp_path / "tokenizers" / f"{artifact.tokenizer_id}.report.json")
    assert report == artifact.report
    assert report["sha256"] == artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (report["vocab_size"], report["tokenizer_type"], report["snapshot_id"]) == (300, "bpe", snapshot.snapshot_id)
    assert report["train_bytes"] == snapshot.summary["train_bytes"], "validation text is not learned from"
    assert 1 < report["bytes_per_token"] < 4
    assert report["tokens_per_word"] > 1
    assert 0.3 < report["vocab_used"] <= 1


def test_the_tokenizer_is_frozen_until_its_configuration_changes_or_it_is_asked_for(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    first = make(snapshot)
    assert make(grown(snapshot)).reused
    retrained = make(grown(snapshot), retrain_tokenizer=True)
    assert not retrained.reused
    assert retrained.report["snapshot_id"] == "0" * 16
    other = make(snapshot, vocab_size=310)
    assert not other.reused
    assert Tokenizer.load(tmp_path / "tokenizer.json").tokenizer_id == other.tokenizer_id
    assert Tokenizer.load(tmp_path / first.file).vocab_size == 300
    later = Snapshot(snapshot.summary | {"snapshot_id": "1" * 16}, snapshot.files, snapshot.documents)
    back = make(later)
    assert back.reused, "each configuration has its own frozen tokenizer, whichever was made last"
    assert back.tokenizer_id == retrained.tokenizer_id == Tokenizer.load(tmp_path / "tokenizer.json").tokenizer_id
    assert make(later, vocab_size=310).tokenizer_id == other.tokenizer_id


def test_the_current_tokenizer_stays_when_old_text_comes_back(make: Callable[..., TokenizerArtifact], snapshot: Snapshot) -> None:
    make(snapshot)
    half = Snapshot(snapshot.summary | {"snapshot_id": "1" * 16}, snapshot.files, snapshot.documents.slice(0, 60))
    current = make(half, retrain_tokenizer=True)
    assert make(snapshot).tokenizer_id == current.tokenizer_id


@pytest.mark.parametrize("lost", ["tokenizer.json", "stored"])
def test_a_lost_copy_of_the_tokenizer_is_mended_from_the_other(
    lost: str, make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    first = make(snapshot)
    path = tmp_path / (first.file if lost == "stored" else lost)
    path.unlink()
    again = make(snapshot)
    assert again.reused
    assert again.tokenizer_id == first.tokenizer_id == Tokenizer.load(path).tokenizer_id


def test_a_damaged_current_tokenizer_is_not_replaced_in_silence(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    first = make(snapshot)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer made here, or damaged; .*--retrain_tokenizer"):
        make(snapshot)
    assert make(snapshot, retrain_tokenizer=True).tokenizer_id == first.tokenizer_id


def test_a_frozen_tokenizer_that_is_lost_is_not_made_anew_in_silence(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    first = make(snapshot)
    make(snapshot, vocab_size=310)  # from now on tokenizer.json is no copy of the first one
    path = tmp_path / first.file
    path.write_bytes(path.read_bytes().replace(b"t", b"T", 1))
    with pytest.raises(DataError, match=rf"{first.tokenizer_id}\.json: missing or damaged, .*--retrain_tokenizer"):
        make(grown(snapshot))
    assert make(grown(snapshot), retrain_tokenizer=True).report["snapshot_id"] == "0" * 16


def test_training_takes_a_seeded_sample_of_bounded_size(make: Callable[..., TokenizerArtifact], snapshot: Snapshot) -> None:
    first, second = (make(snapshot, tokenizer_train_bytes=1 << 16, tokenizer_seed=seed) for seed in (0, 1))
    assert (1 << 16) - 4096 < first.report["train_bytes"] <= 1 << 16
    assert first.tokenizer_id != second.tokenizer_id


def test_only_options_that_matter_to_the_type_enter_its_identity(bpe: Tokenizer, tmp_path: Path) -> None:
    ranks_file(tmp_path / "a.tiktoken", bpe)
    (tmp_path / "b.tiktoken").write_bytes((tmp_path / "a.tiktoken").read_bytes())
    identities = [
        tokenizer_identity(TokenizerConfig(tokenizer_type="tiktoken", vocab_size=size, tiktoken_ranks=str(tmp_path / name)))
        for size, name in ((300, "a.tiktoken"), (400, "b.tiktoken"))
    ]
    assert identities[0] == identities[1]
    assert tokenizer_identity(TokenizerConfig(tiktoken_encoding="o200k_base")) == tokenizer_identity(TokenizerConfig())


def test_rule_31_both_engines_agree_on_ten_thousand_random_strings_and_on_the_whole_sample_corpus(
    pairs: list[tuple[Tokenizer, tokenizers.Tokenizer]], tmp_path: Path
) -> None:
    random_characters = random.Random(0)
    alphabets = [
        "".join(map(chr, range(32, 127))),
        " \t\n\r\u00a0\u2003",
        "'sSdDmMtTlL\u20190123456789",
        *("".join(chr(point) for point in range(first, first + 200)) for first in (0xA0, 0x370, 0x600, 0x900, 0x3040, 0x4E00)),
        "".join(chr(random_characters.randrange(0x10000, 0x110000)) for _ in range(500)),
    ]
    texts = [
        "".join(random_characters.choice(random_characters.choice(alphabets)) for _ in range(random_characters.randrange(60)))
        for _ in range(10_000)
    ]
    write_sample_corpus(tmp_path / "sample", 6_000_000)
    texts += [path.read_text() for path in sorted((tmp_path / "sample").rglob("*.txt"))]
    ours, theirs = pairs[0]
    encoded = theirs.encode_batch(texts, add_special_tokens=False)
    for text, mine, other in zip(texts, encode_all(ours, texts, 2), encoded, strict=True):
        assert mine.tolist() == other.ids, text[:200]
        assert ours.decode(mine) == text


@pytest.mark.parametrize("separator", ["|eot|", "__eos__", "<|end|><", "--- eos ---", "<|endoftext|>"])
def test_texts_that_end_like_the_separator_begins_are_encoded_as_alone(separator: str) -> None:
    tokenizer = train(vocab_size=300, special_tokens=[separator])
    beginnings = [separator[:length] for length in range(len(separator))]
    texts = ["A text " + part for part in beginnings] + [part + " a text" for part in beginnings] + [separator[1:], "", "last"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text).tolist() for text in texts]


@pytest.mark.timeout(120)
def test_runs_of_white_space_below_the_limit_are_looked_through_once(bpe: Tokenizer) -> None:
    """A search that began anew at each of their characters would take some minutes."""
    text = (" " * 199_999 + "x") * 6
    assert bpe.decode(bpe.encode(text)) == text


# The report, and drift


def test_the_report_tells_each_source_apart(make: Callable[..., TokenizerArtifact], snapshot: Snapshot, corpus_dir: Path) -> None:
    report = make(snapshot).report
    sources = {source["source"]: source for source in report["sources"]}
    assert set(sources) == {".", "more"}
    assert sum(source["measured_bytes"] for source in sources.values()) == report["measured_bytes"]
    tokens = sum(source["measured_bytes"] / source["bytes_per_token"] for source in sources.values())
    assert report["measured_bytes"] / report["bytes_per_token"] == pytest.approx(tokens)
    tokenizer = make(snapshot).tokenizer
    for name, source in sources.items():
        texts = [path.read_text() for path in corpus_dir.glob("more/*" if name == "more" else "*.txt")]
        ids = [tokenizer.encode(text) for text in texts]
        words = sum(len(text.split()) for text in texts)
        assert source["tokens_per_word"] == pytest.approx(sum(map(len, ids)) / words, rel=0.01)
        assert source["vocab_used"] == pytest.approx(len(set(np.concatenate(ids).tolist())) / 300, abs=0.01)


@dataclass
class Growing:
    """A folder of text that grows, and its tokenizer."""

    raw: Path
    processed: Path

    def add(self, name: str, text: str) -> None:
        (self.raw / name).parent.mkdir(exist_ok=True)
        (self.raw / name).write_text(text)

    def make(self, **options: Any) -> TokenizerArtifact:
        snapshot = take_snapshot(self.raw, self.processed, CorpusConfig(max_document_bytes=2048))
        return prepare_tokenizer(snapshot, self.raw, self.processed, TokenizerConfig(**{"vocab_size": 600} | options))

    def trial(self, **options: Any) -> Trial:
        trial = self.make(**options).trial
        assert trial is not None
        return trial

    @property
    def note(self) -> Path:
        (note,) = (self.processed / "tokenizers").glob("*.tried.json")
        return note


@pytest.fixture
def growing(corpus_dir: Path, tmp_path: Path) -> Growing:
    shutil.copytree(corpus_dir, tmp_path / "raw")
    return Growing(tmp_path / "raw", tmp_path / "processed")


JAPANESE = "".join(f"これは別の言葉の文で、番号は {n} です。" for n in range(200))


def test_what_a_tokenizer_did_on_a_text_is_not_tried_again_on_the_same(growing: Growing, opened: list[str]) -> None:
    first = growing.trial()
    assert (first.drift, first.round_trips, first.changed) == (None, 100, {})
    growing.add("added.txt", "A text that the tokenizer has not seen. " * 60)
    found = growing.trial()
    assert found.drift is not None and found.round_trips > 100
    opened.clear()
    assert growing.trial() == found
    assert opened == []
    growing.note.write_text("{")
    again = growing.trial()
    assert (again.drift, again.sources) == (found.drift, found.sources), "a damaged note is made again"


def test_drift_counts_all_text_that_came_since_and_reads_only_what_came_last(growing: Growing, opened: list[str]) -> None:
    growing.make()
    growing.add("web/a.txt", JAPANESE)
    foreign = growing.trial()
    opened.clear()
    growing.add("books/b.txt", "The value of the expression is the name of the object. " * 400)
    both = growing.trial()
    assert set(opened) == {"books/b.txt"}
    assert foreign.drift is not None and both.drift is not None
    assert both.drift < foreign.drift
    sources = {source["source"]: source for source in both.sources}
    assert sources["web"] == foreign.sources[0]
    assert sources["web"]["measured_bytes"] == len(JAPANESE.encode())
    assert sources["books"]["bytes_per_token"] > sources["web"]["bytes_per_token"]
    opened.clear()
    (growing.raw / "books/b.txt").unlink()
    assert growing.trial().drift == foreign.drift, "what is gone does not count"
    assert opened == []


def test_drift_is_measured_on_a_sample_that_stays_the_same(
    growing: Growing, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_trial, "_SAMPLED_BYTES", 20_000)
    growing.make()
    for number in range(30):
        growing.add(f"new/{number}.txt", f"Text number {number} of those that came later. " * 40)
    growing.trial()
    measured = len(read_json(growing.note)["tokens"])
    assert 5 < measured < 15
    again = growing.note.read_bytes()
    growing.note.unlink()
    whole = growing.trial()
    sample = sorted(read_json(growing.note)["tokens"])
    growing.note.write_bytes(again)
    assert sample == sorted(read_json(growing.note)["tokens"]), "the note spares reading, and decides nothing"
    for source in range(10):
        (growing.raw / f"new/{source}.txt").unlink()
    fewer = growing.trial()
    assert sum(source["measured_bytes"] for source in fewer.sources) == pytest.approx(20_000, abs=4_000), (
        "others take their place"
    )
    assert whole.drift is not None and fewer.drift == pytest.approx(whole.drift, abs=0.05)
    opened.clear()
    growing.add("new/last.txt", JAPANESE[:500])
    trial = growing.trial()
    assert set(opened) == {"new/last.txt"}
    assert abs(len(read_json(growing.note)["tokens"]) - measured) <= 1
    assert sum(source["measured_bytes"] for source in trial.sources) <= 20_000


def test_text_that_does_not_come_back_is_told_of_until_it_is_gone(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    growing.make()
    growing.add("lost.txt", "This text is lost.")
    with monkeypatch.context() as forgetful:
        forgetful.setattr(Tokenizer, "decode", lambda self, ids: "something else")
        assert [*growing.trial().changed.values()] == ["This text is lost."]
    growing.add("sound.txt", "This text is sound.")
    assert [*growing.trial().changed.values()] == ["This text is lost."]
    (growing.raw / "lost.txt").unlink()
    assert growing.trial().changed == {}


def test_text_of_which_wordpiece_keeps_nothing_is_no_failure(growing: Growing) -> None:
    options: dict[str, Any] = {"tokenizer_type": "wordpiece", "vocab_size": 600}
    growing.make(**options)
    growing.add("zero_width.txt", "\u200b")
    trial = growing.trial(**options)
    assert trial.drift is None
    assert trial.changed == {}


def test_text_of_another_kind_is_a_drift_and_a_new_tokenizer_where_that_is_asked_for(growing: Growing) -> None:
    first = growing.make()
    growing.add("same.txt", "The value of the expression is the name of the object. " * 40)
    assert growing.trial().drift < 0.2  # type: ignore[operator]
    growing.add("japanese.txt", JAPANESE)
    kept = growing.make()
    assert kept.reused and kept.tokenizer_id == first.tokenizer_id, "frozen unless asked"
    assert kept.trial is not None and kept.trial.drift is not None and kept.trial.drift > 0.3
    assert growing.make(retrain_on_drift=0.9).reused
    retrained = growing.make(retrain_on_drift=0.3)
    assert not retrained.reused and retrained.tokenizer_id != first.tokenizer_id
    assert retrained.replaced_drift == kept.trial.drift
    again = growing.make(retrain_on_drift=0.3)
    assert again.reused and again.tokenizer_id == retrained.tokenizer_id


def test_a_drift_that_a_new_tokenizer_would_not_mend_makes_one_once(growing: Growing, bpe: Tokenizer) -> None:
    ranks_file(growing.raw.parent / "own.tiktoken", bpe)
    options = {"tokenizer_type": "tiktoken", "tiktoken_ranks": str(growing.raw.parent / "own.tiktoken"), "retrain_on_drift": 0.05}
    growing.make(**options)
    growing.add("japanese.txt", JAPANESE)
    made = growing.make(**options)
    assert not made.reused and made.replaced_drift is not None
    assert growing.make(**options).reused, "it was made for just this text"
