"""Intervals: nominal coverage on simulated data, and what holds exactly."""

import numpy as np
import pytest

from melprobe.analysis.statistics import Bootstrap, mean_of_rates
from melprobe.errors import UsageError

N = 30


def test_wer_interval_covers_its_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    trials, hits = 400, 0
    for trial in range(trials):
        words = rng.integers(2, 15, N)
        interval = Bootstrap([""] * N, resamples=1000, seed=trial).ratio(
            rng.binomial(words, 0.2), words
        )
        hits += interval.low <= 0.2 <= interval.high
    assert abs(hits / trials - 0.95) < 3 * (0.95 * 0.05 / trials) ** 0.5


def test_speakers_are_resampled_whole_and_cover():
    rng = np.random.default_rng(2)
    speakers = [f"s{i % 12}" for i in range(60)]
    trials, hits, hits_by_utterance = 400, 0, 0
    for trial in range(trials):
        scores = np.tile(rng.normal(size=12), 5) + 0.3 * rng.normal(size=60)
        boot = Bootstrap(speakers, resamples=1000, seed=trial)
        assert (boot.unit, boot.n_units) == ("speaker", 12)
        interval = boot.ratio(scores)
        hits += interval.low <= 0 <= interval.high
        naive = Bootstrap([""] * 60, resamples=1000, seed=trial).ratio(scores)
        hits_by_utterance += naive.low <= 0 <= naive.high
    assert abs(hits / trials - 0.95) < 3 * (0.95 * 0.05 / trials) ** 0.5
    assert hits_by_utterance / trials < 0.75  # what ignoring the speakers would claim


def test_bands_cover_every_layer_at_once():
    rng = np.random.default_rng(3)
    trials, hits, pointwise = 400, 0, 0
    truth = np.linspace(0, 1, 12)
    for trial in range(trials):
        tokens = rng.integers(3, 12, N)
        noise = rng.normal(size=(N, 12)) + rng.normal(size=(N, 1))
        nats = (truth + noise) * tokens[:, None]
        boot = Bootstrap([""] * N, resamples=1000, seed=trial)
        bands = boot.bands(nats, tokens)
        hits += all(b.low <= t <= b.high for b, t in zip(bands, truth, strict=True))
        single = [boot.ratio(nats[:, layer], tokens) for layer in range(12)]
        pointwise += all(b.low <= t <= b.high for b, t in zip(single, truth, strict=True))
    assert abs(hits / trials - 0.95) < 3 * (0.95 * 0.05 / trials) ** 0.5
    assert pointwise / trials < 0.85


def test_a_joint_band_is_never_narrower_than_the_layer_alone():
    differences = np.random.default_rng(4).normal(size=(N, 8))
    boot = Bootstrap([""] * N)
    for layer, joint in enumerate(boot.bands(differences)):
        (alone,) = boot.bands(differences[:, [layer]])
        assert joint.high - joint.low > alone.high - alone.low
        assert joint.value == pytest.approx(alone.value)
        assert joint.value == pytest.approx(differences[:, layer].mean())


def test_zero_differences_are_zero_with_zero_width():
    differences = np.random.default_rng(5).normal(size=(N, 4))
    boot = Bootstrap([""] * N)
    others = boot.bands(differences)
    differences = np.column_stack((differences, np.zeros(N)))
    tokens = np.full(N, 7)
    *_, zero = boot.bands(differences, tokens)
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)
    for before, beside_zero in zip(others, boot.bands(differences), strict=False):
        assert beside_zero.low == pytest.approx(before.low)
    flat = boot.ratio(np.zeros(N), tokens)
    assert (flat.value, flat.low, flat.high) == (0, 0, 0)


def test_ratio_of_sums_weighs_long_utterances():
    assert Bootstrap(["a", "b"]).ratio([1, 0], [1, 9]).value == 0.1


def test_a_rate_has_no_negative_limit():
    errors, words = [0] * 9 + [1], [3] * 10
    boot = Bootstrap([""] * 10)
    assert boot.ratio(errors, words).low < boot.rate(errors, words).low == 0


def test_bands_cover_skewed_damage_too():
    rng = np.random.default_rng(7)
    trials, hits = 300, 0
    for trial in range(trials):
        damage = rng.gamma(1.0, 1.0, (N, 12))  # most clips hardly harmed, a few badly; mean 1
        bands = Bootstrap([""] * N, resamples=1000, seed=trial).bands(damage)
        hits += all(b.low <= 1 <= b.high for b in bands)
    assert hits / trials > 0.93


def test_nine_speakers_are_too_few_and_an_unnamed_one_stands_for_itself():
    assert Bootstrap([f"s{i % 9}" for i in range(90)]).unit == "utterance"
    boot = Bootstrap([f"s{i % 10}" for i in range(90)] + ["", ""])
    assert (boot.unit, boot.n_units) == ("speaker", 12)


def test_one_utterance_sets_no_limits():
    boot = Bootstrap(["only"])
    interval = boot.ratio([2.0], [4.0])
    assert (interval.value, interval.low, interval.high) == (0.5, -np.inf, np.inf)
    assert [(b.low, b.high) for b in boot.bands([[1.0, 0.0]])] == [(-np.inf, np.inf)] * 2


def test_a_denominator_that_may_vanish_bounds_nothing():
    interval = Bootstrap([""] * 4).ratio([1.0, 1.0, 1.0, 1.0], [5.0, -1.0, -1.0, -1.0])
    assert (interval.value, interval.low, interval.high) == (2.0, -np.inf, np.inf)


def test_the_mean_of_several_sets_covers():
    rng = np.random.default_rng(8)
    trials, hits = 300, 0
    truths, sizes = (0.05, 0.2, 0.6), (40, 30, 60)
    for trial in range(trials):
        rates = []
        for place, (truth, size) in enumerate(zip(truths, sizes, strict=True)):
            words = rng.integers(2, 15, size)
            boot = Bootstrap([""] * size, resamples=1000, seed=(trial, place))
            rates.append((boot, rng.binomial(words, truth), words))
        interval = mean_of_rates(rates)
        hits += interval.low <= np.mean(truths) <= interval.high
    assert abs(hits / trials - 0.95) < 3 * (0.95 * 0.05 / trials) ** 0.5


def test_the_mean_of_one_set_is_its_rate_and_of_an_unbounded_one_unbounded():
    errors, words = [0, 1, 2, 0, 1], [4, 5, 6, 5, 3]
    one = (Bootstrap([""] * 5), errors, words)
    mean, alone = mean_of_rates([one]), one[0].rate(errors, words)
    assert (mean.value, mean.low, mean.high) == pytest.approx((alone.value, alone.low, alone.high))
    mean = mean_of_rates([one, (Bootstrap(["only"]), [1], [2])])
    assert (mean.value, mean.high) == (pytest.approx((4 / 23 + 0.5) / 2), np.inf)


def test_same_seed_same_interval():
    scores = np.random.default_rng(6).normal(size=N)
    first, again, other = (Bootstrap([""] * N, seed=seed).ratio(scores) for seed in (1, 1, 2))
    assert first == again != other


def test_no_utterances_is_an_error():
    with pytest.raises(UsageError, match="no utterances"):
        Bootstrap([])
