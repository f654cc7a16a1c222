"""From label tracks to what probes are trained on: rows of each split, and targets.

Tracks that are known at the same rows and split alike make one task: they share a layer's
covariance. Classes that training, choosing and testing have not all heard are left out, and how
many is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from melprobe.probing.ridge import Target
from melprobe.probing.splits import NAMES, Split
from melprobe.probing.tracks import Track, frequent

LEAST_ROWS = 2
"""Of a class in each split."""


@dataclass(frozen=True, slots=True)
class Task:
    """Labels that are known at the same N rows, in three splits."""

    tracks: list[Track]
    targets: list[Target]
    """those of numbers with zero mean and unit variance over the training rows"""
    train: Tensor
    """(N,) bool, as `dev` and `test`"""
    dev: Tensor
    test: Tensor
    split: Split


def heard(
    tracks: Sequence[Track], utterance: NDArray[np.int64], splits: Mapping[bool, Split]
) -> tuple[list[Track], dict[str, str]]:
    """The tracks with the classes that all splits have heard, and why others can't be probed.

    utterance (N,): each row's; splits: by whether speakers are kept apart.
    """
    found, unable = list[Track](), dict[str, str]()
    for track in tracks:
        if not track.known.any():
            unable[track.name] = "not known of any clip"
            continue
        rows = _rows(track, utterance, splits)
        if track.classes:
            track = frequent(track, rows, LEAST_ROWS)
            if len(track.classes) < 2:
                unable[track.name] = "no two of its classes are heard in all splits"
                continue
        elif missing := [name for name in NAMES if not (rows[name] & track.known).any()]:
            unable[track.name] = f"not known in {' and '.join(missing)}"
            continue
        elif same := [name for name in NAMES if _one_value(track.values[rows[name] & track.known])]:
            unable[track.name] = f"the same all over {' and '.join(same)}"
            continue
        found.append(track)
    return found, unable


def _one_value(values: NDArray[np.float32]) -> bool:
    """Of nothing that varies (n, K) no share can be explained; rounding is no variation."""
    return bool((np.ptp(values, 0) <= 1e-6 * np.abs(values).max(0)).all())


def make_tasks(
    tracks: Sequence[Track], utterance: NDArray[np.int64], splits: Mapping[bool, Split]
) -> list[Task]:
    """The tracks that `heard` found, by the rows at which they are known."""
    grouped: dict[tuple[bool, bytes], list[Track]] = {}
    for track in tracks:
        grouped.setdefault((track.speakers_apart, track.known.tobytes()), []).append(track)
    tasks = []
    for members in grouped.values():
        rows = _rows(members[0], utterance, splits).values()
        train, dev, test = (torch.from_numpy(members[0].known & chosen) for chosen in rows)
        targets = [_target(track, train.numpy()) for track in members]
        split = splits[members[0].speakers_apart]
        tasks.append(Task(members, targets, train, dev, test, split))
    return tasks


def _rows(
    track: Track, utterance: NDArray[np.int64], splits: Mapping[bool, Split]
) -> dict[str, NDArray[np.bool_]]:
    split = splits[track.speakers_apart]
    return {name: split.rows(utterance, name) for name in NAMES}


def _target(track: Track, train: NDArray[np.bool_]) -> Target:
    if track.classes:
        return Target(torch.from_numpy(track.values), len(track.classes))
    middle = track.values[train].mean(0, dtype=np.float64)
    spread = track.values[train].std(0, dtype=np.float64)
    standard = (track.values - middle) / np.where(spread > 0, spread, 1)
    return Target(torch.from_numpy(standard.astype(np.float32)))
