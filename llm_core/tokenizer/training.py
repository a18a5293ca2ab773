"""Training a vocabulary: the same texts and configuration give the same bytes."""

from collections import Counter
from collections.abc import Callable, Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llm_core.config import TokenizerConfig
from llm_core.errors import UserError
from llm_core.interrupts import interruptible
from llm_core.tokenizer.tiktoken_ranks import PATTERNS, ready_tokenizer
from llm_core.tokenizer.tokenizer import CL100K_PATTERN, Tokenizer, byte_characters, byte_level_tokenizer

# WordPiece's token for a word with a character outside its alphabet.
UNKNOWN = "[UNK]"

# Starts a new pass over the texts.
Texts = Callable[[], Iterator[str]]


def train_tokenizer(texts: Texts, config: TokenizerConfig) -> Tokenizer:
    """Trains a bpe or wordpiece vocabulary on `texts`, or loads a tiktoken encoding.

    Raises:
        UserError: the vocabulary size or a special token does not fit.
    """
    check_tokenizer(config)
    if config.tokenizer_type == "tiktoken":
        return Tokenizer(ready_tokenizer(config).to_str(pretty=True).encode())
    trained = _train_bpe(texts, config) if config.tokenizer_type == "bpe" else _train_wordpiece(texts, config)
    size = trained.get_vocab_size(with_added_tokens=True)
    if size != config.vocab_size:
        raise UserError(
            f"--vocab_size {config.vocab_size}: the text yields {size} tokens; give --vocab_size {size}"
            + (" or less, or add text to --input_dir" if size < config.vocab_size else " or more")
        )
    return Tokenizer(trained.to_str(pretty=True).encode())


def check_tokenizer(config: TokenizerConfig) -> None:
    """Checks a configuration before any text is read.

    Raises:
        UserError: a special token could be ordinary text, or the encoding is unknown.
    """
    if config.tokenizer_type == "tiktoken" and config.tiktoken_encoding not in PATTERNS:
        raise UserError(f"--tiktoken_encoding {config.tiktoken_encoding}: unknown; choose one of {', '.join(PATTERNS)}")
    _check_special_tokens(config)


def _check_special_tokens(config: TokenizerConfig) -> None:
    """Ordinary text can never become a special token that spans several pre-tokens: merges stay within one."""
    pre_tokenizer = _words() if config.tokenizer_type == "wordpiece" else _byte_level(models.BPE()).pre_tokenizer
    for token in config.special_tokens:
        plain = not token.isascii() or token.strip() != token or token.startswith("##")
        if plain or len(pre_tokenizer.pre_tokenize_str(token)) < 2:
            raise UserError(f"--special_tokens {token!r}: ordinary text could become this token; write it like <|name|>")
    if len(set(config.special_tokens)) < len(config.special_tokens) or UNKNOWN in config.special_tokens:
        raise UserError(f"--special_tokens {config.special_tokens}: one of them is repeated, or is {UNKNOWN}")


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    return byte_level_tokenizer(model, CL100K_PATTERN)


def _train_bpe(texts: Texts, config: TokenizerConfig) -> tokenizers.Tokenizer:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,  # ignore pairs seen only once
        special_tokens=config.special_tokens,
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    interruptible(lambda: tokenizer.train_from_iterator(texts(), trainer))
    return tokenizer


def _words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.BertPreTokenizer()


def _train_wordpiece(texts: Texts, config: TokenizerConfig) -> tokenizers.Tokenizer:
    """WordPiece over words and punctuation. Keeps case and accents; loses white space and control characters.

    `tokenizers` numbers the inner characters (`##e`) in hash map order, which decides ties, so that two trainings differ. Passed
    to the trainer as sorted special tokens they get fixed ids; a second model is then built with the real special tokens only.
    """
    normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(normalizer.normalize_str(text))
    characters = (character for character in counts if not character.isspace())
    # Each character is in the vocabulary twice; half of the vocabulary is left for longer pieces. Rarer characters become [UNK].
    alphabet = sorted(sorted(characters, key=lambda character: (-counts[character], character))[: config.vocab_size // 4])
    special_tokens = [*config.special_tokens, UNKNOWN]

    learner = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    learner.normalizer = normalizer
    learner.pre_tokenizer = _words()
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=special_tokens + ["##" + character for character in alphabet],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    interruptible(lambda: learner.train_from_iterator(texts(), trainer))

    vocab = learner.get_vocab(with_added_tokens=True)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = _words()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(special_tokens)
    return tokenizer
