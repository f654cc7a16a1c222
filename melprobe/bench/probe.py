"""Linear probes of many layers and labels by us and by a loop over scikit-learn's.

Made-up residuals: noise, what all layers share, and in each some of what the labels are made of,
with unequal scales and an offset. Labels are those of a study of synth-words: 40 phones and their
6 groups, 240 words known at four rows in five, 36 voices, two sexes, F0 at two rows in three,
energy, 80 mel powers and time. Both choose among the same penalties on the same dev rows, and
answer for the same test rows. Scikit-learn's loop is `StandardScaler` once for each layer and set
of rows, then for each label and penalty `RidgeClassifier` or `Ridge` with `solver="cholesky"`, in
single precision as ours. It is timed on a few layers, a layer being like another.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from melprobe.bench.peak import held_mb, now
from melprobe.probing.fit import Reading, read_layer
from melprobe.probing.ridge import PENALTIES, PIECE
from melprobe.probing.splits import NAMES, Split
from melprobe.probing.tasks import Task, heard, make_tasks
from melprobe.probing.tracks import UNKNOWN, Track

CLIPS = 400
HIDDEN = 64
FEWEST_ROWS = 2000


class Sizes(NamedTuple):
    """Of the made-up study."""

    layers: int = 31
    rows: int = 20_000
    width: int = 576
    timed: int = 2
    """layers that scikit-learn is given"""


def bench_probe(
    sizes: Sizes, device: torch.device, tell: Callable[[str], None]
) -> dict[str, object]:
    """Seconds of both for a layer, their ratio, and how far their test scores are apart at most.

    `max_accuracy_gap` is over the class labels, `max_r2_gap` over the numbers. `peak_mb` is what
    the process held at most when our part had ended, `start_mb` after a first layer. tell: hears a
    line for each.
    """
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((sizes.rows, HIDDEN)).astype(np.float32)
    tasks = _tasks(hidden, rng)
    # The first use of a kernel costs more.
    read_layer(_pieces(next(_layers(sizes, hidden)).to(device)), tasks)
    start_mb, seconds = held_mb(), 0.0
    readings = []
    for number, layer in enumerate(_layers(sizes, hidden)):
        moved = layer.to(device)
        start = now(device)
        found = read_layer(_pieces(moved), tasks)
        seconds += now(device) - start
        if number < sizes.timed:
            readings.append(found)
    peak_mb, ours = held_mb(), seconds / sizes.layers
    tell(f"ours: {ours:.2f} s for a layer")
    gaps: dict[bool, list[float]] = {True: [0.0], False: [0.0]}
    theirs, layers = 0.0, _layers(sizes, hidden)
    for of_layer, layer in zip(readings, layers, strict=False):
        start = time.perf_counter()
        scores = _by_sklearn(layer.numpy(), tasks)
        theirs += (time.perf_counter() - start) / sizes.timed
        _compare(scores, of_layer, tasks, gaps)
    tell(f"scikit-learn: {theirs:.2f} s for a layer")
    return {
        "ratio_sklearn": round(theirs / ours, 2),
        "max_accuracy_gap": round(max(gaps[True]), 5),
        "max_r2_gap": round(max(gaps[False]), 5),
        "peak_mb": peak_mb,
        "start_mb": start_mb,
        "seconds": round(seconds, 2),
        "seconds_per_layer": round(ours, 3),
        "seconds_per_layer_sklearn": round(theirs, 3),
        **sizes._asdict(),
        "labels": sum(len(task.tracks) for task in tasks),
        "covariances": len(tasks),
        "penalties": len(PENALTIES),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def _pieces(x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: x.split(PIECE)


def _tasks(hidden: NDArray[np.float32], rng: np.random.Generator) -> list[Task]:
    """Labels made of what is hidden and as much noise."""
    rows = len(hidden)

    def made(columns: int) -> NDArray[np.float32]:
        weights = rng.standard_normal((HIDDEN, columns)) / HIDDEN**0.5
        return (hidden @ weights + rng.standard_normal((rows, columns))).astype(np.float32)

    def classes(name: str, number: int, known: float = 1.0) -> Track:
        values = made(number).argmax(1)
        values[rng.random(rows) > known] = UNKNOWN
        return Track(name, values, tuple(map(str, range(number))))

    f0 = made(1)
    f0[rng.random(rows) > 0.65] = np.nan
    phone = classes("phone", 40)
    tracks = [
        phone,
        Track("class", phone.values % 6, tuple("abcdef")),
        classes("word", 240, 0.8),
        classes("speaker", 36),
        classes("sex", 2),
        Track("f0", f0),
        *(Track(name, made(n)) for name, n in (("energy", 1), ("mel", 80), ("time", 1))),
    ]
    of = np.arange(rows) * CLIPS // rows
    split = Split(rng.choice(len(NAMES), CLIPS, p=(0.5, 0.2, 0.3)), True, 0)
    splits = {True: split, False: split}
    return make_tasks(heard(tracks, of, splits)[0], of, splits)


def _layers(sizes: Sizes, hidden: NDArray[np.float32]) -> Iterator[Tensor]:
    """Residuals (N, D) one layer after the other, the same each time."""
    rng = np.random.default_rng(1)
    for _ in range(sizes.layers):
        mix = rng.standard_normal((HIDDEN, sizes.width)).astype(np.float32) / HIDDEN**0.5
        noise = rng.standard_normal((sizes.rows, sizes.width), dtype=np.float32)
        scale = np.logspace(-1, 1, sizes.width, dtype=np.float32)
        yield torch.from_numpy((hidden @ mix + noise) * scale + 5)


def _by_sklearn(x: NDArray[np.float32], tasks: list[Task]) -> list[list[float]]:
    """The test score of each target of each task, the best penalty on the dev rows."""
    found = []
    for task in tasks:
        train, dev, test = (rows.numpy() for rows in (task.train, task.dev, task.test))
        scaler = StandardScaler().fit(x[train])
        on = [scaler.transform(x[rows]) for rows in (train, dev, test)]
        scores = []
        for target in task.targets:
            values = target.values.numpy()
            kind = RidgeClassifier if target.n_classes else Ridge
            models = [
                kind(alpha=p * len(on[0]), solver="cholesky").fit(on[0], values[train])
                for p in PENALTIES
            ]
            best = max(models, key=lambda model: model.score(on[1], values[dev]))
            if target.n_classes:
                scores.append(float(best.score(on[2], values[test])))
            else:
                error = best.predict(on[2]).reshape(-1, target.columns) - values[test]
                scores.append(_r2(error**2, values[test]))
        found.append(scores)
    return found


def _r2(squares: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    return float(1 - squares.mean(1).sum() / ((values - values.mean(0)) ** 2).mean(1).sum())


def _compare(
    scores: list[list[float]],
    readings: list[list[Reading]],
    tasks: list[Task],
    gaps: dict[bool, list[float]],
) -> None:
    for task, theirs, ours in zip(tasks, scores, readings, strict=True):
        for target, score, reading in zip(task.targets, theirs, ours, strict=True):
            values = target.values[task.test]
            if target.n_classes:
                mine = (reading.found == values).double().mean().item()
            else:
                mine = _r2(reading.found.numpy()[:, None], values.numpy())
            gaps[bool(target.n_classes)].append(abs(mine - score))
