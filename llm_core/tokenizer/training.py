"""Training a vocabulary: the same texts and configuration give the same bytes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llm_core.config import MIN_VOCAB_SIZE, TokenizerConfig
from llm_core.errors import UserError
from llm_core.interrupts import interruptible
from llm_core.tokenizer.tiktoken_ranks import PATTERNS, ready_tokenizer
from llm_core.tokenizer.tokenizer import CL100K_PATTERN, Tokenizer, byte_characters, byte_level_tokenizer

# WordPiece's token for a word with a character outside its alphabet.
UNKNOWN = "[UNK]"

# Characters. A longer word is cut where the vocabulary is trained: each merge takes time in proportion to the length of the words
# it is in, and so does the byte-level step where they are not ASCII. It is never cut where text is encoded.
_MAX_WORD = 2048

# Starts a new pass over the texts.
Texts = Callable[[], Iterator[str]]


def train_tokenizer(texts: Texts, config: TokenizerConfig, more_text: str = "add text to --input_dir") -> Tokenizer:
    """Trains a bpe or wordpiece vocabulary on `texts`, or loads a tiktoken encoding.

    more_text: how to train on more text, for the message.

    Raises:
        UserError: the text is not enough for the vocabulary; the message names the largest size that works. Or a special token
            does not fit.
    """
    check_tokenizer(config)
    if config.tokenizer_type == "tiktoken":
        return Tokenizer(ready_tokenizer(config).to_str(pretty=True).encode())
    trained = _train_bpe(texts, config) if config.tokenizer_type == "bpe" else _train_wordpiece(texts, config)
    size = trained.get_vocab_size(with_added_tokens=True)
    if size < config.vocab_size:
        remedies = [_smaller_vocabulary(texts, config, size), more_text]
        raise UserError(
            f"--vocab_size {config.vocab_size}: the text yields {size} tokens with --tokenizer_type {config.tokenizer_type};"
            f" {', or '.join(filter(None, remedies))}"
        )
    return Tokenizer(trained.to_str(pretty=True).encode())


def _smaller_vocabulary(texts: Texts, config: TokenizerConfig, size: int) -> str:
    """The options with which the text is enough, "" if there are none. size: the most that the configured type yields."""
    if size >= MIN_VOCAB_SIZE:
        return f"give --vocab_size {size} or less"
    return f"use {other}" if config.tokenizer_type == "wordpiece" and (other := options_for_bpe(texts, config)) else ""


def options_for_bpe(texts: Texts, config: TokenizerConfig) -> str:
    """The options to tokenize the text of a wordpiece tokenizer with bpe, "" if the text is not enough for it."""
    size = _train_bpe(texts, config).get_vocab_size(with_added_tokens=True)
    if size == config.vocab_size:
        return "--tokenizer_type bpe"
    return f"--tokenizer_type bpe --vocab_size {size}" if size >= MIN_VOCAB_SIZE else ""


def train_with_all_characters(texts: Texts, config: TokenizerConfig) -> Tokenizer:
    """A wordpiece tokenizer at least as large as configured that has every character, or the largest that the text yields."""
    characters = len({character for text in texts() for character in text})
    larger = config.model_copy(update={"vocab_size": max(config.vocab_size, 4 * characters)})
    return Tokenizer(_train_wordpiece(texts, larger).to_str().encode())


def check_tokenizer(config: TokenizerConfig) -> None:
    """Checks a configuration before any text is read.

    Raises:
        UserError: a special token could be ordinary text, the vocabulary has no room for its fixed part, the encoding is unknown,
            or there is no such ranks file.
    """
    if config.tokenizer_type == "tiktoken" and config.tiktoken_encoding not in PATTERNS:
        raise UserError(f"--tiktoken_encoding {config.tiktoken_encoding}: unknown; choose one of {', '.join(PATTERNS)}")
    if config.tiktoken_ranks is not None and not Path(config.tiktoken_ranks).is_file():
        raise UserError(f"--tiktoken_ranks {config.tiktoken_ranks}: no such file; give the path of a .tiktoken file")
    _check_special_tokens(config)
    # Bytes, or the unknown token and one character at the beginning of a word and inside.
    fixed = len(config.special_tokens) + {"bpe": 256, "wordpiece": 3, "tiktoken": 0}[config.tokenizer_type]
    if config.tokenizer_type != "tiktoken" and config.vocab_size < fixed:
        raise UserError(
            f"--vocab_size {config.vocab_size}: too small for --tokenizer_type {config.tokenizer_type} with"
            f" {len(config.special_tokens)} special tokens; give --vocab_size {fixed} or more"
        )


def _check_special_tokens(config: TokenizerConfig) -> None:
    """Ordinary text can never become a special token that spans several pre-tokens: merges stay within one."""
    pre_tokenizer = _words() if config.tokenizer_type == "wordpiece" else _byte_level(models.BPE()).pre_tokenizer
    for token in config.special_tokens:
        plain = not token.isascii() or token.strip() != token or token.startswith("##")
        if plain or len(pre_tokenizer.pre_tokenize_str(token)) < 2:
            raise UserError(f"--special_tokens {token!r}: ordinary text could become this token; write it like <|name|>")
    if len(set(config.special_tokens)) < len(config.special_tokens) or UNKNOWN in config.special_tokens:
        raise UserError(f"--special_tokens {config.special_tokens}: one of them is repeated, or is {UNKNOWN}")


def _byte_level(model: models.BPE, max_word: int | None = None) -> tokenizers.Tokenizer:
    return byte_level_tokenizer(model, CL100K_PATTERN, max_word)


def _train_bpe(texts: Texts, config: TokenizerConfig) -> tokenizers.Tokenizer:
    learner = _byte_level(models.BPE(), _MAX_WORD)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,  # ignore pairs seen only once
        special_tokens=config.special_tokens,
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    interruptible(lambda: learner.train_from_iterator(texts(), trainer))
    tokenizer = _byte_level(learner.model)
    tokenizer.add_special_tokens(config.special_tokens)
    return tokenizer


def _words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.BertPreTokenizer()


def _train_wordpiece(texts: Texts, config: TokenizerConfig) -> tokenizers.Tokenizer:
    """WordPiece over words and punctuation. Keeps case and accents; loses white space and control characters.

    `tokenizers` numbers the inner characters (`##e`) in hash map order, which decides ties, so that two trainings differ. Passed
    to the trainer as sorted special tokens they get fixed ids; a second model is then built with the real special tokens only.

    Each character of the alphabet is in the vocabulary twice, which first leaves half of it for longer pieces. Where the text has
    too few of those, more characters fill the vocabulary: every size up to the largest that the text yields is reached.
    """
    normalizer = _normalizer()
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(normalizer.normalize_str(text))
    characters = sorted(
        (character for character in counts if not character.isspace()), key=lambda character: (-counts[character], character)
    )
    special_tokens = [*config.special_tokens, UNKNOWN]
    size = min(config.vocab_size // 4, (config.vocab_size - len(special_tokens)) // 2)
    while True:
        vocab = _learn_pieces(texts, config.vocab_size, special_tokens, sorted(characters[:size]))
        room = config.vocab_size - len(vocab)
        if room < 2 or size >= len(characters):
            break
        size += room // 2
    if room and size < len(characters):  # for one character at the beginning of a word only
        vocab[characters[size]] = len(vocab)

    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = _words()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(special_tokens)
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    return normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)


def _learn_pieces(texts: Texts, vocab_size: int, special_tokens: list[str], alphabet: Sequence[str]) -> dict[str, int]:
    """The ids of a WordPiece vocabulary of at most `vocab_size` with this alphabet. Other characters become [UNK]."""
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    learner.normalizer = _normalizer()
    learner.pre_tokenizer = pre_tokenizers.Sequence([_words(), pre_tokenizers.FixedLength(_MAX_WORD)])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens + ["##" + character for character in alphabet],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    interruptible(lambda: learner.train_from_iterator(texts(), trainer))
    vocab: dict[str, int] = learner.get_vocab(with_added_tokens=True)
    return vocab
