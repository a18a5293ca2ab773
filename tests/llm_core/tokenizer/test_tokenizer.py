"""Three tokenizer types behind one interface: both engines give the same ids, and text never becomes a special token."""

import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_core.config import END_OF_TEXT
from llm_core.corpus import write_sample_corpus
from llm_core.errors import DataError
from llm_core.tokenizer import Tokenizer, encode_all, with_known_pattern
from llm_core.tokenizer import tokenizer as tokenizer_module
from llm_core.tokenizer.tokenizer import _CONTRACTION, _FORMER_CONTRACTION, byte_characters, id_dtype
from tests.support.tokenizers import TEXTS, ranks_file, train

HOSTILE = f"a {END_OF_TEXT} b{END_OF_TEXT}{END_OF_TEXT}[UNK]\n<|pad|>"

any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200)

tricky_text = st.text(alphabet=" \t\n\r\u00a0\u2028'sS\u017ftTlLvVeErRaAé中0123456789٣_-.<|>endoftext\u0301🙂\x00", max_size=200)


def hugging_face(tokenizer: Tokenizer, path: Path) -> tokenizers.Tokenizer:
    """The same tokenizer.json in the `tokenizers` library."""
    tokenizer.save(path)
    loaded = tokenizers.Tokenizer.from_file(str(path))
    loaded.encode_special_tokens = True
    return loaded


@pytest.fixture(scope="module")
def ready(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("ranks") / "own.tiktoken"
    ranks_file(path, bpe)
    return train(tokenizer_type="tiktoken", tiktoken_ranks=str(path))


@pytest.fixture(scope="module")
def pairs(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, tokenizers.Tokenizer]]:
    """Byte-level tokenizers with each of the three patterns, and the same tokenizer.json in `tokenizers`."""
    folder = tmp_path_factory.mktemp("pairs")
    ranks_file(folder / "own.tiktoken", bpe)
    options = {"tokenizer_type": "tiktoken", "tiktoken_ranks": str(folder / "own.tiktoken")}
    made = [bpe, *(train(**options, tiktoken_encoding=name) for name in ("gpt2", "cl100k_base", "o200k_base"))]
    return [(tokenizer, hugging_face(tokenizer, folder / f"{number}.json")) for number, tokenizer in enumerate(made)]


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


@pytest.fixture(scope="module")
def former(bpe: Tokenizer) -> Tokenizer:
    """A tokenizer as version 0.1.0 wrote it: its pattern spells out the contractions."""
    serialized = bpe.serialized.replace(_CONTRACTION.encode(), _FORMER_CONTRACTION.encode())
    assert with_known_pattern(serialized) == bpe.serialized != serialized
    return Tokenizer(serialized)


@settings(max_examples=300, deadline=None)
@given(text=any_text | tricky_text | st.text(alphabet="'sS\u017ftdmlLvVrReE\u212a\ufb06x 1\n", max_size=60))
def test_the_pattern_of_version_0_1_splits_text_in_the_same_places(text: str, bpe: Tokenizer, former: Tokenizer) -> None:
    assert former.encode(text).tolist() == bpe.encode(text).tolist()
    new, old = (tokenizer.reference.pre_tokenizer for tokenizer in (bpe, former))
    assert new.pre_tokenize_str(text) == old.pre_tokenize_str(text)


def test_contractions_with_any_letter_are_split_in_the_same_places_as_by_version_0_1(bpe: Tokenizer, former: Tokenizer) -> None:
    """Case-insensitive matching is where engines and Unicode versions can differ."""
    letters = [chr(point) for point in range(0x110000) if chr(point).isalpha() and chr(point) != chr(point).swapcase()]
    text = "\n".join(f"x'{letter}x '{letter}l'{letter}x 'l{letter}x 'r{letter}x 'v{letter}x '{letter}ex" for letter in letters)
    assert len(letters) > 2500
    assert former.encode(text).tolist() == bpe.encode(text).tolist()
    assert former.reference.encode(text).ids == bpe.encode(text).tolist()


@pytest.mark.parametrize("characters", [r"\p{L}", r"\p{N}", r"\s", r"\p{Lu}\p{Lt}", r"\p{Ll}", r"\p{Lm}\p{Lo}", r"\p{M}"])
def test_both_engines_put_every_code_point_into_the_same_class(characters: str) -> None:
    """The classes in the patterns. Fails if the Unicode tables of only one engine are updated."""
    points = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    ranks = {bytes([byte]): byte for byte in range(256)}
    engine = tiktoken.Encoding("probe", pat_str=f"[{characters}]", mergeable_ranks=ranks, special_tokens={"<|>": 256})
    matched = bytes(engine.encode_ordinary(points)).decode()  # unmatched characters are dropped
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"[{characters}]"), "removed")
    unmatched = "".join(piece for piece, _ in split.pre_tokenize_str(points))
    assert set(matched).isdisjoint(unmatched)
    assert len(matched) + len(unmatched) == len(points)


def test_ids_agree_on_characters_from_every_block(pairs: list[tuple[Tokenizer, tokenizers.Tokenizer]]) -> None:
    points = [chr(point) for point in range(0, 0x110000, 31) if not 0xD800 <= point < 0xE000]
    text = "".join(f"the{point}in {point}1{point}re\n" for point in points)
    for ours, theirs in pairs:
        assert ours.encode(text).tolist() == theirs.encode(text).ids


@pytest.mark.parametrize("text", [" " * 1_200_000 + "x", "\u2003" * 300_000, "\n" * 300_000 + "x", "ab" * 200_000, "1" * 300_000])
def test_endless_repetitions_neither_crash_nor_change_ids(text: str, pairs: list[tuple[Tokenizer, tokenizers.Tokenizer]]) -> None:
    ours, theirs = pairs[0]
    assert ours.encode(text).tolist() == theirs.encode(text).ids


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


def test_rule_28_ids_are_uint16_only_if_the_vocabulary_fits() -> None:
    assert [id_dtype(size).name for size in (258, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_batches_and_single_calls_give_the_same_ids_at_any_thread_count(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    single = [tokenizer.encode(text) for text in TEXTS]
    for threads in (1, 2, 5):
        batch = list(encode_all(tokenizer, TEXTS, threads))
        assert all(ids.dtype == np.uint16 for ids in batch)
        assert all(np.array_equal(one, other) for one, other in zip(single, batch, strict=True))


def test_a_saved_tokenizer_loads_unchanged(bpe: Tokenizer, wordpiece: Tokenizer, ready: Tokenizer, tmp_path: Path) -> None:
    for tokenizer, kind in ((bpe, "bpe"), (wordpiece, "wordpiece"), (ready, "tiktoken")):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert (loaded.tokenizer_id, loaded.tokenizer_type) == (tokenizer.tokenizer_id, kind)
        assert loaded.tokenizer_id == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()[:16]
        assert np.array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


def test_an_incomplete_character_decodes_to_the_replacement_character(bpe: Tokenizer) -> None:
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


def test_byte_characters_are_those_of_gpt2() -> None:
    assert sorted(byte_characters()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert [byte_characters()[byte] for byte in b"aZ !\n\xc3"] == ["a", "Z", "Ġ", "!", "Ċ", "Ã"]


def test_rule_31_both_engines_agree_on_ten_thousand_random_strings_and_the_sample_corpus(
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
    write_sample_corpus(tmp_path / "sample", 1_000_000)
    texts += [path.read_text() for path in sorted((tmp_path / "sample").rglob("*.txt"))]
    # Unlike the tales, code has indentation, digits, and runs of symbols.
    texts += [path.read_text() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))]
    ours, theirs = pairs[0]
    encoded = theirs.encode_batch(texts, add_special_tokens=False)
    for text, mine, other in zip(texts, encode_all(ours, texts, 2), encoded, strict=True):
        assert mine.tolist() == other.ids, text[:200]
        assert ours.decode(mine) == text


@pytest.mark.parametrize("separator", ["|eot|", "__eos__", "<|end|><", "--- eos ---", "<|endoftext|>"])
def test_texts_that_end_with_a_prefix_of_the_separator_are_encoded_as_if_alone(separator: str) -> None:
    tokenizer = train(vocab_size=300, special_tokens=[separator])
    prefixes = [separator[:length] for length in range(len(separator))]
    texts = (
        ["A text " + prefix for prefix in prefixes] + [prefix + " a text" for prefix in prefixes] + [separator[1:], "", "last"]
    )
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text).tolist() for text in texts]


@pytest.mark.timeout(120)
def test_white_space_below_the_limit_is_scanned_once(bpe: Tokenizer) -> None:
    """A search that starts again at each of their characters takes minutes."""
    text = (" " * 199_999 + "x") * 6
    assert bpe.decode(bpe.encode(text)) == text
