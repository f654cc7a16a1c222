"""Claims: false ones are as rare as they say, exactly at the margin too; true ones are found."""

import numpy as np
import pytest

from melprobe.analysis.claims import claims, detectable_margins, holm, smallest_margins
from melprobe.analysis.statistics import Bootstrap
from tests.error_rates import assert_rare

MARGIN = 0.05


def test_holm_is_the_textbook_one():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.7])) == pytest.approx([1.0, 1.0])


def study(rng, n, truth):
    """Skewed damages: (nat lost [n, L], nat that deafness costs [n]) whose ratio is `truth` [L]."""
    gap = rng.gamma(8, 1.0, n)
    shared = rng.exponential(1, (n, 1)) - 1
    noise = 0.7 * (rng.exponential(1, (n, len(truth))) - 1) + 0.7 * shared
    return gap[:, None] * truth + noise, gap


@pytest.mark.parametrize("n", [30, 100])
def test_false_claims_are_rare_exactly_at_the_margin(n):
    """All ten layers are there, so any claim of either kind is false."""
    rng = np.random.default_rng(n)
    made = []
    for trial in range(300):
        boot = Bootstrap([""] * n, resamples=1000, seed=trial)
        tests = boot.tests(*study(rng, n, np.full(10, MARGIN)))
        made.append({one.claim for one in claims(tests, MARGIN)})
    assert_rare(made, ("above", "below"))


def test_no_effect_is_found_with_power():
    rng = np.random.default_rng(3)
    truth = np.zeros(10)
    found = []
    for trial in range(60):
        boot = Bootstrap([""] * 300, resamples=1000, seed=trial)
        tests = boot.tests(*study(rng, 300, truth))
        found.append(np.mean([one.claim == "below" for one in claims(tests, MARGIN)]))
        assert np.all(detectable_margins(tests) < MARGIN)
    assert np.mean(found) >= 0.8


def test_large_damage_is_needed_and_the_margins_say_how_far():
    rng = np.random.default_rng(4)
    truth = np.array([0.5, 0.0, 0.05])
    boot = Bootstrap([""] * 300, seed=0)
    tests = boot.tests(*study(rng, 300, truth))
    needed, spare, between = claims(tests, MARGIN)
    assert (needed.claim, spare.claim, between.claim) == ("above", "below", "undecided")
    assert needed.smallest_margin > 0.5 > MARGIN > spare.smallest_margin
    for layer, margin in enumerate(smallest_margins(tests)):
        assert claims(tests, margin + 1e-5)[layer].claim == "below"
        assert claims(tests, margin - 1e-5)[layer].claim != "below"


def test_what_nothing_bounds_is_undecided_and_exact_zeros_are_exact():
    boot = Bootstrap([""] * 20)
    zero = np.zeros((20, 2))
    zero[:, 1] = 1.0
    spare, needed = claims(boot.tests(zero), MARGIN)
    assert (spare.claim, needed.claim) == ("below", "above")
    assert spare.smallest_margin == pytest.approx(0, abs=1e-5)
    (alone,) = claims(Bootstrap(["one"]).tests(np.zeros((1, 1))), MARGIN)
    assert (alone.claim, alone.smallest_margin) == ("undecided", None)
