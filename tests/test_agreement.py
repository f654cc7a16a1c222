"""Agreement of arms: exact on hand-made similarities, and seldom claimed where it isn't so."""

import numpy as np
import pytest

from melprobe.analysis.agreement import agreement
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
    (layer,) = agreement(s, arms(3), MARGIN)
    assert (layer.within, layer.between) == (pytest.approx(0.85), pytest.approx(0.7))
    assert layer.difference == pytest.approx(0.15) and layer.error == pytest.approx(0, abs=1e-9)
    assert layer.claim == "specific"
    (layer,) = agreement(s, arms(3), 0.2)
    assert layer.claim == "agnostic" and layer.smallest_margin == pytest.approx(0.15)


def test_the_order_of_runs_does_not_matter():
    s = similarities(np.random.default_rng(0), 3, 0.9, 0.8, of_runs=0.1, of_pairs=0.1, of_kinds=0)
    order = [5, 0, 3, 1, 4, 2]
    mixed = agreement(s[:, order][:, :, order], [arms(3)[i] for i in order], MARGIN)
    assert np.allclose(mixed[0][1:], agreement(s, arms(3), MARGIN)[0][1:])


def test_too_few_seeds_are_undecided():
    s = np.ones((2, 5, 5))
    layers = agreement(s, [*["none"] * 3, *["encoder"] * 2], MARGIN)
    assert {layer.claim for layer in layers} == {"undecided: seeds"}
    assert layers[0].error is None and layers[0].difference == 0
    with pytest.raises(UsageError, match="between two arms, and there are none"):
        agreement(s, ["none"] * 5, MARGIN)


@pytest.mark.parametrize("runs", [3, 5])
@pytest.mark.parametrize("of_runs, of_pairs, of_kinds", [(0.1, 0.05, 0), (0, 0.05, 0), (0, 0, 0.1)])
def test_false_claims_are_rare_exactly_at_the_margin(runs, of_runs, of_pairs, of_kinds):
    """Ten layers, all of them at the margin: any claim is false."""
    rng = np.random.default_rng(runs)
    parts = {"of_runs": of_runs, "of_pairs": of_pairs, "of_kinds": of_kinds}
    made = []
    for _ in range(1000):
        s = similarities(rng, runs, 0.9, 0.9 - MARGIN, n_layers=10, **parts)
        made.append({layer.claim for layer in agreement(s, arms(runs), MARGIN)})
    assert_rare(made, ("agnostic", "specific"))


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

        (layer,) = agreement(s(gap.mean()), arms(3), 0.05, np.array([s(m) for m in means]))
        assert layer.error == pytest.approx(gap.std(ddof=1) / blocks**0.5)
        said.append(layer.claim)
    assert said.count("agnostic") / 200 == pytest.approx(0.05, abs=0.045)


def test_arms_that_agree_are_found():
    rng = np.random.default_rng(2)
    s = similarities(rng, 5, 0.9, 0.9, of_runs=0.05, of_pairs=0.01, of_kinds=0.01, n_layers=10)
    claims = [layer.claim for layer in agreement(s, arms(5), MARGIN)]
    assert claims.count("agnostic") >= 8
