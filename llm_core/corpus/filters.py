"""Filters for well-formed but unwanted text. All are off by default; dropped text is counted by filter.

The length filters see a complete text (a file, line or row) before it is split, so that the last piece of a long text is not too
short. The other filters see one document. All depend on the text and the configuration only.
"""

import unicodedata
from collections import Counter

from llm_core.config import CorpusConfig

TOO_SHORT = "too_short"
TOO_LONG = "too_long"
FEW_LETTERS = "few_letters"
REPETITIVE = "repetitive"

REASONS = frozenset({TOO_SHORT, TOO_LONG, FEW_LETTERS, REPETITIVE})

_WORDS = 5


def length_reason(characters: int, config: CorpusConfig) -> str | None:
    """The reason to drop a text of this length, or None."""
    if config.min_characters is not None and characters < config.min_characters:
        return TOO_SHORT
    if config.max_characters is not None and characters > config.max_characters:
        return TOO_LONG
    return None


def content_reason(text: str, config: CorpusConfig) -> str | None:
    """The reason to drop a document for its content, or None."""
    if config.min_letter_share is not None and letter_share(text) < config.min_letter_share:
        return FEW_LETTERS
    if config.max_repetition is not None and repetition(text) > config.max_repetition:
        return REPETITIVE
    return None


def letter_share(text: str) -> float:
    """Letters and combining marks (Unicode categories L and M) as a share of all non-white-space characters."""
    counts = {character: count for character, count in Counter(text).items() if not character.isspace()}
    letters = sum(count for character, count in counts.items() if unicodedata.category(character)[0] in "LM")
    return letters / max(1, sum(counts.values()))


def repetition(text: str) -> float:
    """Share of the characters of all words that are in five-word sequences seen earlier in the document.

    The "duplicate 5-gram" measure of Rae et al. 2021 (Gopher, https://arxiv.org/abs/2112.11446, table A1), who drop documents
    above 0.15. Overlapping sequences count once. Words are separated by white space: in scripts without it, only repeated lines
    are detected.
    """
    words = text.split()
    seen: set[tuple[str, ...]] = set()
    repeated = first = 0
    while first + _WORDS <= len(words):
        sequence = tuple(words[first : first + _WORDS])
        if sequence in seen:
            repeated += sum(map(len, sequence))
            first += _WORDS
        else:
            seen.add(sequence)
            first += 1
    return repeated / max(1, sum(map(len, words)))
