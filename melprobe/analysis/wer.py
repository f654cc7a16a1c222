"""Word errors after the Whisper English normaliser, the rule of the Open ASR Leaderboard."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import jiwer
from whisper_normalizer.english import EnglishTextNormalizer

from melprobe.errors import UsageError


@dataclass(frozen=True, slots=True)
class WordErrors:
    """Counts of one utterance, in words."""

    substitutions: int
    deletions: int
    insertions: int
    reference_words: int

    @property
    def total(self) -> int:
        """All three kinds of error: more than `reference_words` when insertions abound."""
        return self.substitutions + self.deletions + self.insertions


def normalise(text: str) -> str:
    """Lower case, no punctuation, numbers as digits, American spelling, contractions opened."""
    # Of "menu..." the normaliser leaves a "." that would count as a word.
    return whisper_normalise(re.sub(r"\.{2,}", " ", text)).strip()


def whisper_normalise(text: str) -> str:
    """The Whisper English normaliser as it is, a stray "." included."""
    return _normaliser()(text)


def count_errors(reference: str, hypothesis: str) -> WordErrors:
    """Errors of the alignment with the fewest, both sides normalised.

    An empty reference is legal: every word heard is then an insertion.
    """
    return count_errors_as_is(normalise(reference), normalise(hypothesis))


def count_errors_as_is(reference: str, hypothesis: str) -> WordErrors:
    """`count_errors` of two texts that are normalised already."""
    counts = jiwer.process_words(reference, hypothesis)
    words = counts.hits + counts.substitutions + counts.deletions
    return WordErrors(counts.substitutions, counts.deletions, counts.insertions, words)


def corpus_wer(errors: Iterable[WordErrors]) -> float:
    """Word error rate as a ratio of sums: long utterances count for more, as they should."""
    errors = list(errors)
    words = sum(error.reference_words for error in errors)
    if not words:
        raise UsageError("the references hold no words, so there is no word error rate")
    return sum(error.total for error in errors) / words


@cache
def _normaliser() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()  # reads its spelling table: once, not once an utterance
