"""Agreement of arms: exact on hand-made similarities, and seldom claimed where it isn't so."""

import numpy as np
import pytest
from scipy import stats

from melprobe.analysis.agreement import (
    difference_of_means,
    within_and_between,
    within_less_between,
)
from melprobe.analysis.claims import TwoSided, claims
from melprobe.errors import UsageError
from tests.error_rates import assert_rare

MARGIN = 0.1


def similarities(rng, runs, within, between, *, of_runs, of_pairs, of_kinds, n_layers=1):
    """[L, 2 runs, 2 runs]: some runs are like all others, some only like those of their arm."""
    m = 2 * runs
    same = np.equal.outer(np.arange(m) < runs, np.arange(m) < runs)
    run = of_runs * rng.standard_normal((n_layers, m))
    kind = of_kinds * rng.standard_normal((n_layers, m))
    pair = of_pairs * rng.standard_normal((n_layers, m, m))
    pair = np.triu(pair, 1) + np.triu(pair, 1).swapaxes(1, 2)
    found = np.where(same, within, between) + run[:, None] + run[:, :, None] + pair
    return found + same * (kind[:, None] + kind[:, :, None])


def arms(runs):
    return ["none"] * runs + ["encoder"] * runs


def test_three_and_three_by_hand():
    s = np.full((1, 6, 6), 0.7)
    s[:, :3, :3] = 0.9
    s[:, 3:, 3:] = 0.8
    assert within_and_between(s, arms(3)) == (pytest.approx(0.85), pytest.approx(0.7))
    d = within_less_between(s, arms(3))
    assert d.values == pytest.approx(0.15) and d.errors == pytest.approx(0, abs=1e-9)
    assert claims(d, MARGIN)[0].claim == "above"
    (layer,) = claims(d, 0.2)
    assert layer.claim == "below" and layer.smallest_margin == pytest.approx(0.15, abs=1e-5)


def test_the_order_of_runs_does_not_matter():
    s = similarities(np.random.default_rng(0), 3, 0.9, 0.8, of_runs=0.1, of_pairs=0.1, of_kinds=0)
    order = [5, 0, 3, 1, 4, 2]
    mixed = within_less_between(s[:, order][:, :, order], [arms(3)[i] for i in order])
    plain = within_less_between(s, arms(3))
    assert np.allclose((mixed.values, mixed.errors), (plain.values, plain.errors))


def test_too_few_seeds_claim_nothing():
    d = within_less_between(np.ones((2, 5, 5)), [*["none"] * 3, *["encoder"] * 2])
    assert not d.enough and {layer.claim for layer in claims(d, MARGIN)} == {"undecided"}
    assert np.all(d.values == 0) and np.all(np.isinf(d.detectable()))
    with pytest.raises(UsageError, match="between two arms, and there are none"):
        within_less_between(np.ones((2, 5, 5)), ["none"] * 5)


def test_means_of_arms_are_compared_as_by_welch():
    """Without blocks of clips it is the t-test of two samples, up to its degrees of freedom."""
    rng = np.random.default_rng(4)
    scores = rng.standard_normal((2, 8))
    d = difference_of_means(scores, arms(4))
    welch = stats.ttest_ind(scores[:, :4], scores[:, 4:], axis=1, equal_var=False)
    assert np.allclose(d.values / d.errors, welch.statistic)
    both = TwoSided(d)
    assert np.allclose(both.p_above(0.0), 2 * stats.t.sf(abs(welch.statistic), 6))
    far = TwoSided(difference_of_means(scores - 30 * np.eye(8)[:4].sum(0), arms(4)))
    assert {layer.claim for layer in claims(far, 0.5)} == {"above"}


@pytest.mark.parametrize("runs", [3, 5])
@pytest.mark.parametrize("of_runs, of_pairs, of_kinds", [(0.1, 0.05, 0), (0, 0.05, 0), (0, 0, 0.1)])
def test_false_claims_are_rare_exactly_at_the_margin(runs, of_runs, of_pairs, of_kinds):
    """Ten layers, all of them at the margin: any claim is false."""
    rng = np.random.default_rng(runs)
    parts = {"of_runs": of_runs, "of_pairs": of_pairs, "of_kinds": of_kinds}
    made = []
    for _ in range(1000):
        s = similarities(rng, runs, 0.9, 0.9 - MARGIN, n_layers=10, **parts)
        made.append({layer.claim for layer in claims(within_less_between(s, arms(runs)), MARGIN)})
    assert_rare(made, ("below", "above"))


def test_clips_count_as_well_as_runs():
    """Runs that agree to the last digit, on clips that don't: the clips' share is what is left."""
    rng = np.random.default_rng(1)
    blocks, said = 40, []
    for _ in range(200):
        gap = 0.05 + 0.3 * rng.standard_normal(blocks)  # of each block of clips
        means = [(gap.sum() - g) / (blocks - 1) for g in gap]

        def s(between):
            found = np.full((1, 6, 6), 0.9 - between)
            found[:, :3, :3] = found[:, 3:, 3:] = 0.9
            return found

        d = within_less_between(s(gap.mean()), arms(3), np.array([s(m) for m in means]))
        assert d.errors == pytest.approx(gap.std(ddof=1) / blocks**0.5)
        said.append(claims(d, 0.05)[0].claim)
    assert said.count("below") / 200 == pytest.approx(0.05, abs=0.045)


def test_arms_that_agree_are_found():
    rng = np.random.default_rng(2)
    s = similarities(rng, 5, 0.9, 0.9, of_runs=0.05, of_pairs=0.01, of_kinds=0.01, n_layers=10)
    found = [layer.claim for layer in claims(within_less_between(s, arms(5)), MARGIN)]
    assert found.count("below") >= 8
