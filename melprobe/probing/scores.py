"""From a probing study's rows to its scores: accuracy or R², over layers, with intervals.

Bands hold for all layers of a series at once. They speak of other clips, or other voices where the
bootstrap draws those, read by *these* probes: they don't say what others to train on would give.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from melprobe.analysis.statistics import Bootstrap, Interval
from melprobe.probing.rows import MAJORITY, MDL
from melprobe.probing.tracks import control_name

Scores = dict[str, Any]


def score_labels(rows: pd.DataFrame, names: Sequence[str], seed: int) -> dict[str, Scores]:
    """Scores of each of the labels `names` that has rows; its control's as its selectivity.

    By series and probe: `layers`, `score` (accuracy or R²), `limits`, `balanced` accuracy,
    `penalty`, and of a series of several layers `peak` with its `limits`; `codes` of the online
    code, where it was measured.
    """
    coded, read = rows[rows.probe == MDL], rows[rows.probe != MDL]
    of_label, none = dict(iter(read.groupby("label"))), rows.iloc[:0]
    return {
        name: {
            **_label(of_label[name], of_label.get(control_name(name), none), seed),
            "codes": _codes(coded[coded.label == name], seed),
        }
        for name in names
        if name in of_label
    }


def _codes(rows: pd.DataFrame, seed: int) -> list[Scores]:
    """Bits for each row of the online code, by series, with bands over its layers.

    What the bands leave out is that each probe learned from the clips that were drawn before.
    """
    if not len(rows):
        return []
    clips = rows.drop_duplicates("utterance").sort_values("utterance")
    bootstrap = Bootstrap(list(clips.voice), seed=seed)
    found = []
    for name, mine in rows.groupby("series", sort=False):
        layers = list(dict.fromkeys(mine.layer))
        bands = bootstrap.bands(_table(mine, "bits", layers), _table(mine, "n", layers)[:, 0])
        bits, limits = [band.value for band in bands], [band.limits for band in bands]
        found.append({"series": name, "layers": layers, "bits_per_row": bits, "limits": limits})
    return found


def _label(rows: pd.DataFrame, controls: pd.DataFrame, seed: int) -> Scores:
    clips = rows.drop_duplicates("utterance").sort_values("utterance")
    bootstrap = Bootstrap(list(clips.voice), seed=seed)
    series = []
    for (name, probe), mine in rows.groupby(["series", "probe"], sort=False):
        same = controls[(controls.series == name) & (controls.probe == probe)]
        series.append({"series": name, "probe": probe} | _series(mine, same, bootstrap))
    measure = "R²" if rows.right.isna().all() else "accuracy"
    floors = [s for s in series if s["series"] == MAJORITY]
    return {
        "measure": measure,
        "majority": floors[0]["score"][0] if floors else None,
        "resampled": bootstrap.unit,
        "units": bootstrap.n_units,
        "test_rows": int(clips.n.sum()),
        "series": [s for s in series if s["series"] != MAJORITY],
    }


def _series(rows: pd.DataFrame, controls: pd.DataFrame, bootstrap: Bootstrap) -> Scores:
    layers = list(dict.fromkeys(rows.layer))
    n = _table(rows, "n", layers)[:, 0]
    if rows.right.notna().all():
        right = _table(rows, "right", layers)
        bands = bootstrap.bands(right, n)
        balanced = [float(x) for x in _table(rows, "recalled", layers).sum(0)]
    else:
        right = -_table(rows, "error", layers)
        spread = _table(rows, "spread", layers)[:, 0]
        bands = [_one_plus(band) for band in bootstrap.bands(right, spread)]
        balanced = None
    found: Scores = {
        "layers": layers,
        "score": [band.value for band in bands],
        "limits": [band.limits for band in bands],
        "balanced": balanced,
        "penalty": [float(rows.penalty[rows.layer == layer].iloc[0]) for layer in layers],
    }
    if len(layers) > 1:
        best, (low, high) = bootstrap.best_column(right)
        found["peak"] = {"layer": layers[best], "limits": [layers[low], layers[high]]}
    if len(controls):
        found["selectivity"] = _selectivity(rows, controls, layers, bootstrap)
    return found


def _selectivity(
    rows: pd.DataFrame, controls: pd.DataFrame, layers: Sequence[str], bootstrap: Bootstrap
) -> Scores:
    """Accuracy minus that of the control task, on the same rows of the same clips."""
    n, controlled = _table(rows, "n", layers), _table(controls, "n", layers)
    right = _table(rows, "right", layers) - _table(controls, "right", layers)
    assert np.array_equal(n, controlled), "a control task is known where its label is"
    bands = bootstrap.bands(right, n[:, 0])
    return {
        "control": [float(x) for x in _table(controls, "right", layers).sum(0) / n.sum(0)],
        "score": [band.value for band in bands],
        "limits": [band.limits for band in bands],
    }


def _table(rows: pd.DataFrame, column: str, layers: Sequence[str]) -> np.ndarray:
    """(U, L): utterances in the order of their names."""
    wide = rows.pivot(index="utterance", columns="layer", values=column)
    return wide[list(layers)].to_numpy(np.float64)


def _one_plus(band: Interval) -> Interval:
    return Interval(1 + band.value, 1 + band.low, 1 + band.high)
