"""Filters: texts that are well-formed but not wanted. Each is off until asked for, and what it drops is counted under its name.

Length is that of a whole text (a file, a line or a row), before it is divided, so that the last piece of a long text is not too
short. The other two look at each document by itself. All are functions of the text and the configuration alone.
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
    """Why a text of that many characters is dropped, if it is."""
    if config.min_characters is not None and characters < config.min_characters:
        return TOO_SHORT
    if config.max_characters is not None and characters > config.max_characters:
        return TOO_LONG
    return None


def content_reason(text: str, config: CorpusConfig) -> str | None:
    """Why a document is dropped for what stands in it, if it is."""
    if config.min_letter_share is not None and letter_share(text) < config.min_letter_share:
        return FEW_LETTERS
    if config.max_repetition is not None and repetition(text) > config.max_repetition:
        return REPETITIVE
    return None


def letter_share(text: str) -> float:
    """Letters and the marks that belong to them (Unicode categories L and M), as a share of all that is not white space."""
    counts = {character: count for character, count in Counter(text).items() if not character.isspace()}
    letters = sum(count for character, count in counts.items() if unicodedata.category(character)[0] in "LM")
    return letters / max(1, sum(counts.values()))


def repetition(text: str) -> float:
    """Share of the characters of all words that stand in runs of five words seen before in the document.

    The "duplicate 5-gram" measure of Rae et al. 2021 (Gopher, https://arxiv.org/abs/2112.11446, table A1), who drop documents
    above 0.15. Overlapping runs count once. Words are what stands between white space: in scripts without it, only repeated
    lines are found.
    """
    words = text.split()
    seen: set[tuple[str, ...]] = set()
    repeated = first = 0
    while first + _WORDS <= len(words):
        run = tuple(words[first : first + _WORDS])
        if run in seen:
            repeated += sum(map(len, run))
            first += _WORDS
        else:
            seen.add(run)
            first += 1
    return repeated / max(1, sum(map(len, words)))
