"""Probes against scikit-learn, on planted information, and on splits that must not leak."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from melprobe.analysis.statistics import Bootstrap
from melprobe.errors import UsageError
from melprobe.probing import fit, logistic
from melprobe.probing.lbfgs import minimise
from melprobe.probing.ridge import Moments, Target
from melprobe.probing.rows import Clips, majority_rows, reading_rows
from melprobe.probing.scores import score_labels
from melprobe.probing.splits import DROPPED, split_clips
from melprobe.probing.tasks import Task, heard, make_tasks
from melprobe.probing.tracks import Track, class_track

N, D, K = 3000, 48, 7
LAMBDA = 1e-2


@pytest.fixture(scope="module")
def data():
    """Rows with an offset and unequal scales, as residuals have; classes and numbers in them."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=rng)
    x = 50 + hidden * torch.logspace(-2, 1, D)
    noise = 3 * torch.randn(N, K, generator=rng)
    classes = (hidden @ torch.randn(D, K, generator=rng) + noise).argmax(1)
    numbers = hidden @ torch.randn(D, 3, generator=rng) + torch.randn(N, 3, generator=rng) + 5
    which = torch.randint(0, 3, (N,), generator=rng)
    return x, classes, numbers, [which == i for i in range(3)]


def pieces_of(x, sizes=(700, 1, 1299, 1000)):
    return lambda: x.split(list(sizes))


def trained(x, targets, rows, sizes):
    moments, start = Moments(targets, rows), 0
    for piece in x.split(sizes):
        moments.add(piece, start)
        start += len(piece)
    return moments.solve([LAMBDA, 1.0])


def test_ridge_is_scikit_learns(data):
    x, classes, numbers, (train, _, test) = data
    fitted = trained(x, [Target(classes, K), Target(numbers)], train, 1000)
    out = fitted.predict(x[test])
    assert out.shape == (2, int(test.sum()), K + 3)
    scaler = StandardScaler().fit(x[train].double())
    alpha = LAMBDA * int(train.sum())
    theirs = Ridge(alpha=alpha).fit(scaler.transform(x[train].double()), numbers[train].double())
    expected = theirs.predict(scaler.transform(x[test].double()))
    assert np.abs(out[0, :, K:].numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    classifier = RidgeClassifier(alpha=alpha).fit(scaler.transform(x[train]), classes[train])
    answers = classifier.predict(scaler.transform(x[test]))
    assert (out[0, :, :K].argmax(1).numpy() == answers).mean() > 0.999


@pytest.mark.parametrize("sizes", [1, 7, 999, N])
def test_streaming_equals_all_at_once(data, sizes):
    x, classes, numbers, (train, _, test) = data
    targets = [Target(classes, K), Target(numbers)]
    whole = trained(x, targets, train, N).predict(x[test])
    torch.testing.assert_close(
        trained(x, targets, train, sizes).predict(x[test]), whole, rtol=1e-4, atol=1e-4
    )


def test_a_dimension_that_does_not_vary_changes_nothing(data):
    x, classes, _, (train, _, test) = data
    wider = torch.cat([x, torch.full((N, 1), 1234.5)], 1)
    one, other = (trained(y, [Target(classes, K)], train, 500) for y in (x, wider))
    torch.testing.assert_close(one.predict(x[test]), other.predict(wider[test]))


def test_what_is_not_finite_is_refused(data):
    x, classes, _, (train, *_) = data
    broken = x.clone()
    broken[train.nonzero()[3], 2] = torch.inf
    with pytest.raises(UsageError, match="numbers that are not finite; capture anew"):
        trained(broken, [Target(classes, K)], train, 500)
    with pytest.raises(UsageError, match="0 rows to train a probe on"):
        trained(x, [Target(classes, K)], torch.zeros(N, dtype=torch.bool), 500)


def test_rows_of_other_splits_are_not_read_in_training(data):
    x, classes, _, (train, _, test) = data
    poisoned = torch.where(train[:, None], x, torch.nan)
    one, other = (trained(y, [Target(classes, K)], train, 500) for y in (x, poisoned))
    assert torch.equal(one.predict(x[test]), other.predict(x[test]))


def test_the_penalty_is_the_best_on_the_dev_rows(data):
    x, classes, numbers, (train, dev, test) = data
    targets = [Target(classes, K), Target(numbers)]
    task = Task([], targets, train, dev, test, None)
    penalties = (1e-3, 1e-1, 10.0, 1000.0)
    ((first, second),) = fit.read_layer(pieces_of(x), [task], penalties)
    for target, reading in ((targets[0], first), (targets[1], second)):
        scores, found = [], []
        for penalty in penalties:
            moments = Moments([target], train)
            moments.add(x, 0)
            maps = moments.solve([penalty])
            out = maps.predict(x)[0]
            if target.n_classes:
                scores.append((out.argmax(1) == classes)[dev].sum().item())
                found.append(out.argmax(1)[test])
            else:
                error = (out - numbers).square().mean(1)
                scores.append(-error[dev].sum().item())
                found.append(error[test])
        best = int(np.argmax(scores))
        assert reading.penalty == penalties[best]
        torch.testing.assert_close(reading.found, found[best], rtol=1e-3, atol=1e-4)


def test_logistic_is_scikit_learns_on_every_layer_at_once(data):
    x, classes, _, (train, dev, test) = data
    layers = [x, x[:, torch.randperm(D)] * 3, torch.randn(N, D)]
    found = logistic.read_layers(
        [pieces_of(layer) for layer in layers], Target(classes, K), train, dev, test, [LAMBDA]
    )
    for layer, reading in zip(layers, found, strict=True):
        scaler = StandardScaler().fit(layer[train])
        theirs = LogisticRegression(C=1 / (LAMBDA * int(train.sum())), tol=1e-6, max_iter=5000)
        theirs.fit(scaler.transform(layer[train]), classes[train])
        answers = theirs.predict(scaler.transform(layer[test]))
        wanted = classes[test].numpy()
        assert abs((answers == wanted).mean() - (reading.found.numpy() == wanted).mean()) < 0.005
        assert (answers == reading.found.numpy()).mean() > 0.99
    assert reading.penalty == LAMBDA


def test_logistic_reads_from_disk_what_memory_may_not_hold(data, monkeypatch):
    x, classes, _, rows = data
    once = logistic.read_layers([pieces_of(x)], Target(classes, K), *rows, [LAMBDA])
    monkeypatch.setattr(logistic, "HELD", 40 * D * 4)
    again = logistic.read_layers([pieces_of(x)], Target(classes, K), *rows, [LAMBDA])
    assert (once[0].found == again[0].found).float().mean() > 0.999


def test_many_problems_are_minimised_as_each_alone():
    torch.manual_seed(0)
    half = torch.randn(4, 6, 6, dtype=torch.float64)
    curves = half @ half.mT + torch.eye(6) * torch.tensor([0.1, 1, 10, 100])[:, None, None]
    target = torch.randn(4, 6, dtype=torch.float64)

    def evaluate(at):
        off = at - target
        slope = (curves @ off[..., None])[..., 0]
        return (off * slope).sum(1) / 2, slope

    start = torch.zeros(4, 6, dtype=torch.float64)
    found = minimise(evaluate, start, lambda g: g / 100, tolerance=1e-8, steps=200)
    torch.testing.assert_close(found, target, rtol=1e-5, atol=1e-6)


def planted(seed=0, clips=60, rows=40, voices=20):
    """A task on three layers: noise, noise and the label, noise; and its clips."""
    rng = np.random.default_rng(seed)
    utterance = np.repeat(np.arange(clips), rows)
    label = rng.integers(0, 4, clips * rows)
    layers = [rng.standard_normal((len(label), 16)).astype(np.float32) for _ in range(3)]
    layers[1][:, :4] += 3 * np.eye(4, dtype=np.float32)[label]
    names = [f"v{i % voices}" for i in range(clips)]
    split = split_clips(
        [f"text {i}" for i in range(clips)], names, [""] * clips, speakers_apart=True, seed=0
    )
    splits = {True: split, False: split}
    ids = [f"clip{i}" for i in range(clips)]
    return label, [torch.from_numpy(x) for x in layers], Clips(ids, names, utterance), splits


def scored(label, layers, clips, splits):
    number = Track("number", layers[1][:, :1].numpy())
    tracks, unable = heard([class_track("label", list(map(str, label))), number], clips.of, splits)
    assert not unable
    (task,) = make_tasks(tracks, clips.of, splits)
    found = [majority_rows(clips, task, task.tracks[0], task.targets[0])]
    for i, layer in enumerate(layers):
        (readings,) = fit.read_layer(lambda layer=layer: layer.split(500), [task])
        where = {"series": "model", "layer": f"h_{i}", "probe": "ridge"}
        for parts in zip(task.tracks, task.targets, readings, strict=True):
            found.append(reading_rows(clips, task, *parts, where))
    return score_labels(pd.concat(found), ["label", "number"], 0), task


def test_what_is_planted_in_a_layer_is_found_there_and_nowhere_else():
    scores, task = scored(*planted())
    (series,) = scores["label"]["series"]
    low, high, after = series["score"]
    assert high > 0.9 and max(low, after) < 0.35
    assert series["peak"] == {"layer": "h_1", "limits": ["h_1", "h_1"]}
    assert series["balanced"] == pytest.approx(series["score"], abs=0.02)
    assert series["limits"][1][0] > 0.85 and series["limits"][0][0] < 0.25 < series["limits"][0][1]
    assert scores["label"]["majority"] == pytest.approx(0.25, abs=0.05)
    assert scores["label"]["test_rows"] == int(task.test.sum())
    (numbers,) = scores["number"]["series"]
    assert scores["number"]["measure"] == "R²" and scores["number"]["majority"] is None
    assert numbers["score"][1] > 0.999 and max(numbers["score"][::2]) < 0.05
    assert numbers["balanced"] is None and numbers["peak"]["layer"] == "h_1"


def test_shuffled_labels_are_at_chance():
    label, layers, clips, splits = planted()
    found = []
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(label)
        scores, _ = scored(shuffled, layers, clips, splits)
        (series,) = scores["label"]["series"]
        found += series["score"]
        assert all(low < 0.25 < high for low, high in series["limits"])
    assert np.mean(found) == pytest.approx(0.25, abs=0.02)


def test_accuracy_is_what_counting_says():
    label, layers, clips, splits = planted()
    scores, task = scored(label, layers, clips, splits)
    (series,) = scores["label"]["series"]
    ((reading, _),) = fit.read_layer(lambda: layers[1].split(500), [task])
    right = (reading.found.numpy() == label[task.test.numpy()]).mean()
    assert series["score"][1] == pytest.approx(right)


def test_the_best_column_and_where_else_it_may_lie():
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap([f"s{i}" for i in range(40)])
    clear = rng.standard_normal((40, 5))
    clear[:, 3] += 9
    assert bootstrap.best_column(clear) == (3, (3, 3))
    best, (low, high) = bootstrap.best_column(rng.standard_normal((40, 5)))
    assert low <= best <= high and high - low >= 2
    assert Bootstrap([""]).best_column([[1.0, 2.0, 0.0]]) == (1, (0, 2))


def random_clips(seed, clips=300, texts=60, voices=25):
    rng = np.random.default_rng(seed)
    said = [f"text {i}" for i in rng.integers(0, texts, clips)]
    voice = [f"voice {i}" for i in (rng.random(clips) ** 2 * voices).astype(int)]
    return said, voice


@pytest.mark.parametrize("seed", range(10))
def test_no_sentence_and_no_voice_is_in_two_splits(seed):
    texts, voices = random_clips(seed)
    shouted = [t.upper() + "!" if i % 2 else t for i, t in enumerate(texts)]
    found = split_clips(shouted, voices, [""] * 300, speakers_apart=True, seed=seed)
    for of_clip in (texts, voices):
        for name in set(of_clip):
            places = {int(found.of[i]) for i in range(300) if of_clip[i] == name} - {DROPPED}
            assert len(places) <= 1
    assert found.dropped == (found.of == DROPPED).sum() > 0
    again = split_clips(shouted, voices, [""] * 300, speakers_apart=True, seed=seed)
    assert (again.of == found.of).all()


def test_texts_that_nobody_repeats_drop_no_clip():
    _, voices = random_clips(0)
    found = split_clips(
        [f"t{i}" for i in range(300)], voices, [""] * 300, speakers_apart=True, seed=0
    )
    assert found.dropped == 0
    assert np.bincount(found.of) / 300 == pytest.approx([0.5, 0.2, 0.3], abs=0.06)


def test_where_voices_are_the_label_only_sentences_are_kept_apart():
    texts, voices = random_clips(0)
    found = split_clips(texts, voices, [""] * 300, speakers_apart=False, seed=0)
    assert found.dropped == 0 and not found.speakers_apart
    for text in set(texts):
        assert len({int(found.of[i]) for i in range(300) if texts[i] == text}) == 1


def test_each_sex_is_in_every_split():
    voices = [f"v{i % 30}" for i in range(120)]
    sexes = ["female" if i % 30 < 4 else "male" for i in range(120)]
    for seed in range(20):
        found = split_clips(
            [f"t{i}" for i in range(120)], voices, sexes, speakers_apart=True, seed=seed
        )
        for place in range(3):
            assert {sexes[i] for i in np.flatnonzero(found.of == place)} == {"female", "male"}


def test_too_few_voices_or_clips_are_refused():
    with pytest.raises(UsageError, match=r"2 voices in 9 clips leave .* without any: capture more"):
        split_clips(
            [f"t{i}" for i in range(9)], ["a", "b", "a"] * 3, [""] * 9, speakers_apart=True, seed=0
        )
    with pytest.raises(UsageError, match="1 sentences in 3 clips leave dev and test"):
        split_clips(["a"] * 3, [""] * 3, [""] * 3, speakers_apart=False, seed=0)


def test_labels_that_cannot_be_probed_are_named():
    _, _, clips, splits = planted()
    n = len(clips.of)
    one = class_track("one", ["a"] * n)
    none = class_track("none", [None] * n)
    early = Track("early", np.where(clips.of < 1, 1.0, np.nan)[:, None].astype(np.float32))
    tracks, unable = heard([one, none, early], clips.of, splits)
    assert not tracks
    assert unable["one"] == "no two of its classes are heard in all splits"
    assert unable["none"] == "not known of any clip" and unable["early"].startswith("not known in")
