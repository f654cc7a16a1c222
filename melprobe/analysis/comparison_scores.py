"""CKA of pairs of layers with intervals and floors, from a comparison's rows.

Of each pair the lag with the highest CKA counts, in the real pairing and in the re-paired one
alike, so that the search favours neither; intervals don't know of the search. Bands come from
pseudo-values: an utterance's is CKA plus U times its influence (the infinitesimal jackknife, exact
to first order), their mean is CKA, and `Bootstrap` resamples them, by speaker where there are
enough. In the re-paired floor an utterance is A's; that B's clips come from the others
too is left out of its interval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from melprobe.analysis.comparison import REAL, REPAIRED, Compared
from melprobe.analysis.secondary import INDICES
from melprobe.analysis.statistics import Bootstrap, Interval

Floats = NDArray[np.float64]
_SUMS = ["hsic_ab", "hsic_aa", "hsic_bb"]


def findings(compared: Compared) -> dict[str, Any]:
    """`unit`, `pairs`: a list of dicts, one for each view and pair of layers; JSON throughout.

    Each: of, scaling, layer_a, layer_b; cka, cka_ci, lag; floor, floor_ci, floor_lag (re-paired);
    above_floor, above_floor_ci; secondary and secondary_floor (raw views), by index. Intervals are
    95 % bands over a view's pairs together; None where there is none.
    """
    rows = compared.rows
    real = rows[rows.pairing == REAL]
    who = real.drop_duplicates("utterance").set_index("utterance").speaker.sort_index()
    bootstrap = Bootstrap(who.tolist())
    secondary = {
        (row["pairing"], row["of"], row["layer_a"], row["layer_b"]): row
        for row in compared.secondary.to_dict("records")
    }
    pairs = []
    for (of, scaling), view in rows.groupby(["of", "scaling"], sort=False):
        for pair in _view(view, who.index, bootstrap):
            if scaling == "raw":
                key = of, pair["layer_a"], pair["layer_b"]
                pair["secondary"] = _indices(secondary.get((REAL, *key)))
                pair["secondary_floor"] = _indices(secondary.get((REPAIRED, *key)))
            pairs.append({"of": of, "scaling": scaling, **pair})
    return {"unit": bootstrap.unit, "units": bootstrap.n_units, "pairs": pairs}


def _view(view: pd.DataFrame, utterances: pd.Index, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    found = []
    best = {name: best_lag(part, utterances) for name, part in view.groupby("pairing")}
    real, floor = best[REAL], best.get(REPAIRED)
    bands = bootstrap.bands(real[1])
    floors = bootstrap.bands(floor[1]) if floor else [None] * len(bands)
    above = bootstrap.bands(real[1] - floor[1]) if floor else [None] * len(bands)
    for i, (layer_a, layer_b) in enumerate(real[0].index):
        found.append(
            {
                "layer_a": int(layer_a),
                "layer_b": int(layer_b),
                **_interval("cka", bands[i]),
                "lag": int(real[0].iloc[i]),
                **_interval("floor", floors[i]),
                "floor_lag": int(floor[0].iloc[i]) if floor else None,
                **_interval("above_floor", above[i]),
            }
        )
    return found


def best_lag(rows: pd.DataFrame, utterances: Sequence[str] | pd.Index) -> tuple[pd.Series, Floats]:
    """Of one view and pairing: the lag of each pair of layers, and pseudo-values (U, pairs) there.

    Pairs are the series' index, in order of layers. An utterance without rows has no influence: its
    pseudo-value is CKA. NaN columns for layers that never vary.
    """
    keys = ["layer_a", "layer_b", "lag"]
    totals = rows.groupby(keys)[_SUMS].sum()
    cka = _cka(totals).rename("cka")
    chosen = cka.fillna(-np.inf).groupby(level=[0, 1]).idxmax()
    lags = chosen.map(lambda key: key[2])
    at = rows.set_index(keys)
    values = []
    for key in chosen:
        part = at.loc[[key]].set_index("utterance")[_SUMS].reindex(utterances, fill_value=0.0)
        values.append(pseudo_values(*part.to_numpy().T))
    return lags, np.stack(values, axis=1)


def pseudo_values(between: Floats, first: Floats, second: Floats) -> Floats:
    """(U,) CKA + U · influence, from what utterances bring to the three HSIC, each (U,)."""
    if first.sum() <= 0 or second.sum() <= 0:
        return np.full(len(between), np.nan)
    norm = np.sqrt(first.sum() * second.sum())
    cka = between.sum() / norm
    # An utterance's frames are in HSIC as rows and as columns: hence 2, against 2 · ½ below.
    influence = 2 * between / norm - cka * (first / first.sum() + second / second.sum())
    return cka + len(between) * influence


def _cka(totals: pd.DataFrame) -> pd.Series:
    norm = totals.hsic_aa.clip(lower=0) * totals.hsic_bb.clip(lower=0)
    return (totals.hsic_ab / np.sqrt(norm)).where(norm > 0)


def _interval(name: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None or not np.isfinite(interval.value):
        return {name: None, f"{name}_ci": None}
    return {name: interval.value, f"{name}_ci": interval.limits}


def _indices(row: Mapping[str, Any] | None) -> dict[str, float | int | None] | None:
    """By index, None where it is not defined; and of how many frames."""
    if row is None:
        return None
    values = {name: row[name] if np.isfinite(row[name]) else None for name in INDICES}
    return {"frames": int(row["frames"]), **values}
