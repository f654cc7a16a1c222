"""The answer in one sentence: what it says, and what it keeps to itself."""

import numpy as np
import pytest

from melprobe.report import notation, reading
from tests.synthetic_run import (
    as_heads,
    as_set,
    plain,
    sweep_damages,
    synthetic_layer,
    synthetic_results,
)


def test_headline_names_the_costly_the_spare_the_undecided_and_the_built_in():
    text = plain(reading.headline(synthetic_results(sweep_damages())))
    assert "most of all blocks 0, 11 and 1 (d = 1.12, 0.90 and 0.62" in text
    assert "each of blocks 17–28, skipped alone, costs less than d = 0.05" in text
    assert "blocks 10 and 12–16 stay undecided" in text
    assert text.endswith("block 29 costs nothing by construction, which is no finding.")


def test_headline_with_one_costly_block():
    text = plain(reading.headline(synthetic_results([0.001, 0.5, 0.002, 0.003, 0.0])))
    assert text.startswith("At speech positions block 1 costs most (d = 0.50")
    assert "each of blocks 0, 2 and 3, skipped alone, costs less" in text


def test_headline_when_all_lie_within_the_margin_does_not_count_the_built_in():
    text = plain(reading.headline(synthetic_results([0.004] * 9 + [0.0])))
    assert text.startswith("No single block is needed at speech positions")
    assert "any one of blocks 0–8 costs less than d = 0.05" in text
    assert "block 9 costs nothing by construction, which is no finding" in text


def test_headline_when_nothing_is_decided():
    text = plain(reading.headline(synthetic_results([0.05] * 4 + [0.0])))
    assert text.startswith("At speech positions the data don’t decide about blocks 0–3")


def test_headline_when_only_the_built_in_was_skipped():
    results = synthetic_results([0.0])
    assert plain(reading.headline(results)) == (
        "Nothing to find at speech positions; "
        "block 0 costs nothing by construction, which is no finding."
    )


def test_headline_makes_no_claim_when_the_gate_failed():
    text = plain(reading.headline(synthetic_results(sweep_damages(), passed=False)))
    assert text.startswith("No claim about layers is made: synthetic-smol did not pass")
    assert "block" not in text


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (0.31, "more than the margin of 0.05"),
        (0.01, "less than the margin of 0.05"),
        (0.05, "undecided against the margin of 0.05"),
    ],
)
def test_headline_of_a_set(damage, says):
    text = plain(reading.headline(as_set(damage)))
    assert text.startswith("Skipping blocks 3, 5–8 at speech positions") and says in text


def test_headline_of_a_set_that_is_zero_by_construction():
    text = reading.headline(as_set(0.0, zero_by_construction=True))
    assert text.endswith("costs nothing by construction, which is no finding.")


def test_ranges_and_numbers():
    assert notation.ranges([9, 0, 1, 12, 13, 14]) == ["0", "1", "9", "12–14"]
    assert notation.number(-0.0001) == "0.00" and notation.number(-1.5) == "−1.50"
    assert notation.points(0.05) == "+5.0" and notation.points(-0.05) == "−5.0"
    assert notation.number(None) == "–"


def run_of(sets, damages, question):
    """Results of a series of sets, with bands of ±18 %."""
    rng = np.random.default_rng(0)
    results = synthetic_results([0.0])
    results["layers"] = [
        synthetic_layer(label, damage, rng) for label, damage in zip(sets, damages, strict=True)
    ]
    results["question"] = results["question"] | {"layers": question}
    return results


def test_headline_of_suffixes_says_how_far_one_can_go():
    sets = [3, "2-3", "1-3", "0-3"]
    text = plain(reading.headline(run_of(sets, [0.0, 0.01, 0.4, 1.2], "suffixes")))
    assert text == (
        "At speech positions blocks 2–3 can be skipped together for less than d = 0.05, whole band "
        "included; blocks 1–3 cost more (d = 0.40)."
    )
    results = run_of(sets, [0.0, 0.4, 0.4, 1.2], "suffixes")
    results["layers"][0]["zero_by_construction"] = True
    assert plain(reading.headline(results)) == (
        "At speech positions the data show no run of blocks that can be skipped together for less "
        "than d = 0.05; blocks 2–3 cost more (d = 0.40); block 3 costs nothing by construction, "
        "which is no finding."
    )


def test_headline_of_windows_counts_them():
    results = run_of(["0-1", "1-2", "2-3"], [1.2, 0.3, 0.01], "windows:2")
    assert plain(reading.headline(results)) == (
        "At speech positions, of 3 runs of neighbouring blocks, each skipped together, 2 cost more "
        "than the margin of 0.05, 1 less, and 0 stay undecided; most blocks 0–1 (d = 1.20), least "
        "blocks 2–3 (d = 0.01)."
    )


def test_headline_without_lora_speaks_of_lora():
    results = as_set(0.3)
    results["question"] |= {"cut": "without-lora", "positions": "all", "layers": "3,5-8"}
    text = plain(reading.headline(results))
    assert text.startswith("Switching LoRA off in blocks 3, 5–8 at all positions takes the model")
    results = synthetic_results([0.001] * 5)
    results["question"]["cut"], results["layers"] = "without-lora", results["layers"][:-1]
    text = plain(reading.headline(results))
    assert text.startswith(
        "No single block’s LoRA is needed at speech positions: switching LoRA off in any one of"
    )


def test_headline_of_heads_counts_them():
    results = as_heads([0.3, 0.01, 0.06, -0.01, 0.0, 0.0, 0.0, 0.0], n_heads=4)
    assert plain(reading.headline(results)) == (
        "At speech positions, of 4 attention heads, each left out alone, 1 cost more than the "
        "margin of 0.05, 2 less, and 1 stay undecided; most head 0.0 (d = 0.30), least head 0.3 "
        "(d = −0.01); heads 1.0–1.3 cost nothing by construction, which is no finding."
    )
    results["layers"] = results["layers"][4:]
    assert plain(reading.headline(results)) == (
        "Nothing to find at speech positions; heads 1.0–1.3 cost nothing by construction, which is "
        "no finding."
    )


def test_heads_of_one_block_that_follow_each_other_are_a_range():
    results = as_heads([0.1] * 8, n_heads=4)
    assert notation.names(results["layers"][1:]) == "heads 0.1–0.3 and 1.0–1.3"
    assert notation.names(results["layers"][:1]) == "head 0.0"
