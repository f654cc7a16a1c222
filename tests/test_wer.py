"""Word errors after normalisation."""

import pytest

from melprobe.analysis.wer import WordErrors, corpus_wer, count_errors, normalise
from melprobe.errors import UsageError


def test_spelling_case_numbers_and_fillers_are_no_errors():
    assert normalise("Um, it's twenty-one COLOURS!") == "it is 21 colors"
    assert count_errors("Um, it's twenty-one COLOURS!", "it is 21 colors").total == 0
    assert count_errors("To exit the menu...", "...to exit the menu").total == 0


def test_each_kind_of_error_is_counted_once():
    assert count_errors("the cat sat down", "the dog sat") == WordErrors(1, 1, 0, 4)
    assert count_errors("a cat", "a big cat") == WordErrors(0, 0, 1, 2)


def test_an_empty_side():
    assert count_errors("", "two words") == WordErrors(0, 0, 2, 0)
    assert count_errors("two words", "") == WordErrors(0, 2, 0, 2)


def test_corpus_rate_is_a_ratio_of_sums():
    rows = [
        count_errors("no", "yes"),
        count_errors("one more or less quite right", "1 more or less quite right"),
    ]
    assert corpus_wer(rows) == 1 / 7


def test_a_corpus_without_words_is_an_error():
    with pytest.raises(UsageError, match="no words"):
        corpus_wer([count_errors("", "noise")])
