"""Similarity indices: what each calls equal, what is debiased, and that others compute the same."""

from itertools import chain

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from sklearn.neighbors import NearestNeighbors

from melprobe.analysis.comparison_scores import pseudo_values
from melprobe.analysis.pairing import matched, minibatches, partners, windows
from melprobe.analysis.secondary import INDICES, mutual_neighbours, procrustes, pwcca, rsa
from melprobe.analysis.similarity import CkaGrid, Moments, ratio, shares, u_centred
from melprobe.errors import UsageError

N, D = 60, 12


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(d=D, seed=5):
    return torch.linalg.qr(random(d, d, seed=seed)).Q


def cka(x, y):
    grid = CkaGrid()
    grid.add(u_centred(x[None]), u_centred(y[None]))
    return grid.cka().item()


@pytest.fixture
def x():
    return random(N, D) * torch.logspace(0, 1, D, dtype=torch.float64)


@pytest.fixture
def y(x):
    return torch.tanh(x @ random(D, 7, seed=1)) + 0.3 * random(N, 7, seed=2)


def test_cka_is_1_under_rotation_scale_and_shift_and_under_no_other_linear_map(x):
    assert cka(x, -3 * x @ rotation() + 100) == pytest.approx(1, abs=1e-12)
    assert cka(x, x @ torch.diag(torch.logspace(0, -1, D, dtype=torch.float64))) < 0.9
    assert cka(x, x @ random(D, D, seed=9)) < 0.99


def test_standardised_cka_is_1_under_a_scale_of_each_dimension_too_but_not_under_rotation(x):
    def standardised(features):
        moments = Moments()
        moments.add(features[None])
        return moments.standardised(features[None])[0].double()

    scaled = x * torch.logspace(0, 3, D, dtype=torch.float64) + 7
    assert cka(standardised(x), standardised(scaled)) == pytest.approx(1, abs=1e-5)
    mixed = x @ rotation()
    assert cka(x, mixed) == pytest.approx(1) and cka(standardised(x), standardised(mixed)) < 0.97


def test_cka_is_symmetric(x, y):
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-14)
    grid = CkaGrid()
    grid.add(u_centred(torch.stack([x, x**2, x.sin()])))
    found = grid.cka()
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diag(), torch.ones(3, dtype=torch.float64))


def test_the_mean_for_independent_features_is_0_and_that_of_biased_cka_is_not():
    ckatorch = pytest.importorskip("ckatorch")
    n, width, draws = 16, 64, 300
    found, biased = [], []
    for seed in range(draws):
        a, b = random(n, width, seed=seed), random(n, width, seed=10_000 + seed)
        found.append(cka(a, b))
        biased.append(ckatorch.cka_base(a, b).item())
    error = np.std(found) / draws**0.5
    assert abs(np.mean(found)) < 3 * error < 0.02
    assert np.mean(biased) > 0.7


def test_ckatorch_finds_the_same_over_minibatches(x, y):
    ckatorch = pytest.importorskip("ckatorch")
    parts_x, parts_y = x.reshape(4, 15, D), y.reshape(4, 15, -1)
    grid = CkaGrid()
    for a, b in zip(parts_x, parts_y, strict=True):
        grid.add(u_centred(a[None]), u_centred(b[None]))
    assert grid.cka().item() == pytest.approx(
        ckatorch.cka_batch(parts_x, parts_y).item(), abs=1e-12
    )


def one_pass_hsic(x, y):
    """HSIC_1 from sums over frames alone, without any Gram matrix."""
    n, a, b = len(x), (x * x).sum(1), (y * y).sum(1)
    cross, sum_x, sum_y = x.T @ y, x.sum(0), y.sum(0)
    trace = (cross**2).sum() - a @ b
    all_x, all_y = sum_x @ sum_x - a.sum(), sum_y @ sum_y - b.sum()
    rows = sum_x @ cross @ sum_y - sum_x @ (x.T @ b) - sum_y @ (y.T @ a) + a @ b
    return (trace + all_x * all_y / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def test_one_minibatch_of_all_is_hsic_from_cross_covariances(x, y):
    x, y = x - x.mean(0) + 0.1, y
    between, first, second = (one_pass_hsic(*pair) for pair in ((x, y), (x, x), (y, y)))
    assert cka(x, y) == pytest.approx((between / (first * second) ** 0.5).item(), abs=1e-12)


def test_float32_far_from_the_origin_is_as_good(x, y):
    assert cka((x + 300).float(), y.float()) == pytest.approx(cka(x, y), abs=1e-4)


def test_shares_of_utterances_add_up_to_the_grid(x, y):
    utterance = torch.arange(N) % 7
    grid, sums = CkaGrid(), 0
    for part in (slice(0, 20), slice(20, 60)):  # of different sizes
        a, b = u_centred(x[None, part]), u_centred(y[None, part])
        grid.add(a, b)
        sums = sums + shares(a, b, utterance[part], 7)
    assert sums.shape == (3, 7, 1)
    torch.testing.assert_close(ratio(*sums.sum(1)), grid.cka()[0])


def test_pseudo_values_have_the_mean_and_the_spread_of_a_jackknife_by_utterance():
    n, units = 240, 24
    utterance = torch.arange(n) % units
    a = random(n, D) + 2 * random(units, D, seed=1)[utterance]
    b = (
        a @ random(D, D, seed=2)
        + 6 * random(n, D, seed=3)
        + 4 * random(units, D, seed=4)[utterance]
    )
    found = shares(u_centred(a[None]), u_centred(b[None]), utterance, units)[..., 0].numpy()
    pseudo = pseudo_values(*found)
    assert pseudo.mean() == pytest.approx(cka(a, b), abs=1e-12)
    left_out = np.array([cka(a[utterance != u], b[utterance != u]) for u in range(units)])
    jackknife = units * cka(a, b) - (units - 1) * left_out
    assert np.corrcoef(pseudo, jackknife)[0, 1] > 0.95
    assert pseudo.std() == pytest.approx(jackknife.std(), rel=0.15)


def test_a_layer_that_never_varies_has_no_cka(x):
    grid = CkaGrid()
    grid.add(u_centred(torch.stack([x, torch.ones_like(x)])))
    assert grid.cka().isnan().tolist() == [[False, True], [True, True]]


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(UsageError, match="3 frames in a minibatch: unbiased CKA needs 4 at least"):
        u_centred(random(1, 3, D))
    with pytest.raises(UsageError, match="no minibatch was added, so there is nothing to compare"):
        CkaGrid().cka()


def test_moments_piece_by_piece_are_those_of_the_whole(x):
    moments = Moments()
    for part in (x[:7], x[7:50], x[50:]):
        moments.add(part[None] + 1000)
    whole = (x - x.mean(0)) / x.std(0)
    torch.testing.assert_close(
        moments.standardised(x[None] + 1000)[0].double(), whole, atol=1e-3, rtol=0
    )
    moments = Moments()
    moments.add(torch.ones(1, 5, 2))
    assert moments.standardised(torch.ones(1, 5, 2)).eq(0).all()


def moved(x):
    return -3 * x @ rotation() + 100


def stretched(x):
    return x @ random(D, D, seed=9)


@pytest.mark.parametrize(
    ("index", "same", "other"),
    [
        (pwcca, stretched, lambda x: x**3),
        (procrustes, moved, stretched),
        (mutual_neighbours, moved, stretched),
        (rsa, lambda x: x * torch.rand(N, 1) + torch.rand(N, 1), moved),
    ],
)
def test_each_index_has_its_own_idea_of_equal(x, index, same, other):
    assert index(x, x) == pytest.approx(1)
    assert index(x, same(x)) == pytest.approx(1)
    assert index(x, other(x)) < 0.98


@pytest.mark.parametrize("name", ["procrustes", "mutual_neighbours", "rsa"])
def test_all_but_pwcca_are_symmetric(x, y, name):
    assert INDICES[name](x, y) == pytest.approx(INDICES[name](y, x))
    assert pwcca(x, y) != pytest.approx(pwcca(y, x))


def test_scipy_and_scikit_learn_find_the_same(x, y):
    a, b = x.numpy(), y.numpy()
    assert rsa(x, y) == pytest.approx(
        spearmanr(pdist(a, "correlation"), pdist(b, "correlation")).statistic
    )
    a, b = a - a.mean(0), b - b.mean(0)
    _, scale = orthogonal_procrustes(np.pad(b, ((0, 0), (0, D - 7))), a)
    assert procrustes(x, y) == pytest.approx(scale / np.linalg.norm(a) / np.linalg.norm(b))
    near = [
        NearestNeighbors(n_neighbors=5).fit(z).kneighbors(return_distance=False) for z in (a, b)
    ]
    common = [len(set(p) & set(q)) / 5 for p, q in zip(*near, strict=True)]
    assert mutual_neighbours(x, y, 5) == pytest.approx(np.mean(common))
    q_a, q_b = np.linalg.qr(a)[0], np.linalg.qr(b)[0]
    left, correlations, _ = np.linalg.svd(q_a.T @ q_b, full_matrices=False)
    weights = np.abs(a.T @ q_a @ left).sum(0)
    assert pwcca(x, y) == pytest.approx(weights @ correlations / weights.sum())


def test_pwcca_is_not_given_where_dimensions_alone_make_it_1():
    assert np.isnan(pwcca(random(25, 12), random(25, 12, seed=1)))
    assert pwcca(random(26, 12), random(26, 12, seed=1)) < 1


# Frames at the same times, minibatches, partners.


def middles(n, rate):
    return ((np.arange(n) + 0.5) / rate + 0.0075).astype(np.float32)


def test_frames_at_equal_rates_are_matched_one_by_one():
    in_a, in_b = matched(middles(10, 12.5), middles(9, 12.5), (12.5, 12.5), (-1, 0, 1))
    assert in_a.tolist() == list(range(1, 8))
    assert (in_b - in_a).tolist() == [[-1] * 7, [0] * 7, [1] * 7]


def test_frames_at_different_rates_are_matched_in_time():
    coarse, fine = middles(10, 12.5), middles(20, 25.0)
    in_a, in_b = matched(coarse, fine, (12.5, 25.0), (0, 1))
    assert in_a.tolist() == list(range(9))
    assert in_b.tolist() == [[2 * i for i in range(9)], [2 * i + 2 for i in range(9)]]
    swapped = matched(fine, coarse, (25.0, 12.5))
    assert swapped[0].tolist() == [2 * i for i in range(10)] and swapped[1][0].tolist() == list(
        range(10)
    )


def test_clips_without_frames_match_nothing():
    in_a, in_b = matched(middles(0, 12.5), middles(5, 12.5), (12.5, 12.5), (0, 1))
    assert len(in_a) == 0 and in_b.shape == (2, 0)


@pytest.mark.parametrize("frames", [[25, 27, 33, 30, 25], [9] * 40, [5, 6, 7, 8, 9, 11], [3] * 200])
def test_minibatches_hold_one_frame_of_a_clip_and_use_all_once(frames):
    clip = np.repeat(range(len(frames)), frames)
    found = list(minibatches(frames, 64, np.random.default_rng(0)))
    assert sorted(chain(*found)) == list(range(sum(frames)))
    sizes = {len(places) for places in found}
    assert min(sizes) >= 4 and max(sizes) <= 64 and max(sizes) - min(sizes) <= 1
    assert all(len(set(clip[places])) == len(places) for places in found)


def test_a_clip_far_longer_than_the_others_gives_some_of_its_frames():
    found = list(minibatches([10] * 9 + [1000], 64, np.random.default_rng(0)))
    assert min(map(len, found)) >= 4 and len(set(chain(*found))) == sum(map(len, found)) < 150
    assert list(minibatches([10, 10, 10], 64, np.random.default_rng(0))) == []


def test_windows_hold_every_clip_once_and_no_more_frames_than_they_may():
    frames = [5 + 3 * (i % 7) for i in range(100)]
    found = windows(frames, 300, np.random.default_rng(0))
    assert sorted(chain(*found)) == list(range(100)) and len(found) > 3
    assert all(sum(frames[i] for i in window) <= 300 for window in found[:-1])
    assert [len(window) for window in windows([50] * 40, 100, np.random.default_rng(0))] == [16, 24]


def test_partners_are_of_the_same_speaker_with_other_words_and_near_in_length():
    rows = [(f"x{i}", f"text {i}", "x", 1.0 + i) for i in range(9)]
    rows += [("y1", "one two", "y", 1.0), ("y2", "One, two!", "y", 2.0), ("y3", "three", "y", 9.0)]
    rows += [("z", "alone", "z", 1.0)]
    table = pd.DataFrame(rows, columns=["utterance", "text", "speaker", "duration"])
    table = table.set_index("utterance")
    found = partners(table)
    assert "z" not in found and found["y1"] == found["y2"] == "y3"
    ring = {u: v for u, v in found.items() if u[0] == "x"}
    assert sorted(ring.values()) == sorted(ring) == [f"x{i}" for i in range(9)]
    for u, v in ring.items():
        assert ring[v] != u and abs(table.duration[u] - table.duration[v]) <= 2
