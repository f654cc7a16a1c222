"""Rows of a probing study, one for each series, layer, label, probe and test utterance."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from melprobe.probing.fit import Reading
from melprobe.probing.ridge import Target
from melprobe.probing.tasks import Task
from melprobe.probing.tracks import Track

MAJORITY = "majority"
"""The series of always answering with the training rows' commonest class."""
MDL = "mdl"
"""The probe of rows that hold bits of the online code, of training utterances."""
NUMBERS = ("n", "right", "recalled", "error", "spread", "bits")
"""Columns that are sums over an utterance's rows. `right`: right answers, of n.
`recalled`: the same, each over the test rows of its class and the number of classes: they sum up to
the balanced accuracy. For labels that are numbers `error`, squared, and `spread`, the error of
answering with the mean of the test rows."""

COLUMNS = ("series", "layer", "label", "probe", "penalty", "utterance", "voice", *NUMBERS)


class Clips:
    """What rows say of utterances: names (U,) and voices (U,), and the rows' utterance (N,)."""

    def __init__(self, names: Sequence[str], voices: Sequence[str], of: NDArray[np.int64]):
        self.names, self.voices, self.of = np.array(names), np.array(voices), of

    def sums(self, rows: torch.Tensor, **each: NDArray[np.float64]) -> pd.DataFrame:
        """Columns (n,) of the chosen of N rows, summed over each utterance, with the count `n`."""
        which = self.of[rows.numpy()]
        there, place = np.unique(which, return_inverse=True)
        table = {"utterance": self.names[there], "voice": self.voices[there]}
        counts = {"n": np.bincount(place)}
        totals = {name: np.bincount(place, values) for name, values in each.items()}
        return pd.DataFrame({**table, **counts, **totals})


def reading_rows(
    clips: Clips, task: Task, track: Track, target: Target, reading: Reading, where: dict[str, str]
) -> pd.DataFrame:
    """A row for each test utterance; where: its series, layer and probe."""
    table = clips.sums(task.test, **_outcomes(task, target, reading.found))
    return table.assign(label=track.name, penalty=reading.penalty, **where)


def code_rows(
    clips: Clips,
    task: Task,
    track: Track,
    bits: torch.Tensor,
    penalty: float,
    where: dict[str, str],
) -> pd.DataFrame:
    """A row for each training utterance: bits (n,) of its rows, summed; where: series and layer."""
    table = clips.sums(task.train, bits=bits.double().numpy())
    return table.assign(label=track.name, penalty=penalty, probe=MDL, **where)


def majority_rows(clips: Clips, task: Task, track: Track, target: Target) -> pd.DataFrame:
    """What always the same answer gets right."""
    commonest = target.values[task.train].bincount().argmax()
    found = torch.full((int(task.test.sum()),), int(commonest))
    table = clips.sums(task.test, **_outcomes(task, target, found))
    where = {"series": MAJORITY, "layer": MAJORITY, "probe": MAJORITY}
    return table.assign(label=track.name, penalty=np.nan, **where)


def _outcomes(task: Task, target: Target, found: torch.Tensor) -> dict[str, NDArray[np.float64]]:
    values = target.values[task.test]
    if target.n_classes:
        right = (found == values).double()
        counts = values.bincount(minlength=target.n_classes)
        shares = right / counts[values] / (counts > 0).sum()
        return {"right": right.numpy(), "recalled": shares.numpy()}
    spread = (values - values.mean(0)).double().square().mean(1)
    return {"error": found.double().numpy(), "spread": spread.numpy()}
