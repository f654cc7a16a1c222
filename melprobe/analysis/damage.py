"""From rows to scores: gate, damage and bands of a layer study. Never sees a model.

Damage d = (NLL_cut − NLL_intact) / (NLL_swapped − NLL_intact): 0 nothing lost, 1 deaf.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from melprobe.analysis.gate import listening_gate
from melprobe.analysis.statistics import Bootstrap, Tests

DAMAGE_MARGIN = 0.05
RESAMPLES = 5000


def score_layers(
    rows: pd.DataFrame,
    cut: str,
    labels: Sequence[str],
    positions: str,
    unread: str | None,
    seed: int,
    copy_text: bool = False,
) -> dict[str, Any]:
    """`baseline`, `gate`, `layers` and `intervals` of results.json from a study's rows.

    `cut` and `labels` are the kind of cut and the layer sets as they stand in the rows. `unread`
    is the one whose output at the study's positions nobody reads, so that its zero is no finding;
    None when there is none. `copy_text`: texts were read in the place of clips.
    """
    table = _Table(rows, seed, copy_text)
    intact, swapped = table.condition("intact"), table.condition("swapped")
    gap = swapped.nll - intact.nll
    cuts = [table.condition(cut, label) for label in labels]
    nll = table.bootstrap.bands(
        _columns([cut.nll - intact.nll for cut in cuts]), intact.answer_tokens
    )
    wer = table.bootstrap.bands(
        _columns([cut.errors - intact.errors for cut in cuts]), intact.reference_words
    )
    # Where swapping doesn't hurt there is no scale to measure damage on.
    damage = table.bootstrap.bands(_columns([cut.nll - intact.nll for cut in cuts]), gap)
    layers = [
        {
            "layer": int(label) if label.isdecimal() else label,
            "positions": positions,
            "wer": _ratio(cut.errors, cut.reference_words),
            "delta_wer": wer[i].value,
            "delta_wer_ci": wer[i].limits,
            "delta_nll": nll[i].value,
            "delta_nll_ci": nll[i].limits,
            "damage": damage[i].value if gap.sum() > 0 else None,
            "damage_ci": damage[i].limits,
            "kl": _ratio(cut.kl, cut.answer_tokens),
            "block_influence": _mean(cut.block_influence),
            "angular_distance": _mean(cut.angular_distance),
            "attribution": _first_order(cut),
            **_error_kinds(cut),
            "zero_by_construction": label.partition(".")[0] == unread,
        }
        for i, (label, cut) in enumerate(zip(labels, cuts, strict=True))
    ]
    return {
        "baseline": table.baseline(intact),
        "gate": table.gate(intact, swapped),
        "layers": layers,
        "intervals": table.method(),
        "margin": {"damage": DAMAGE_MARGIN},
    }


def damage_tests(
    rows: pd.DataFrame, cut: str, labels: Sequence[str], seed: int, copy_text: bool = False
) -> Tests:
    """Of the damage of each layer set of `labels`, which stand in the rows as in `score_layers`."""
    table = _Table(rows, seed, copy_text)
    intact, swapped = table.condition("intact"), table.condition("swapped")
    cuts = [table.condition(cut, label).nll - intact.nll for label in labels]
    return table.bootstrap.tests(_columns(cuts), swapped.nll - intact.nll)


class _Table:
    """Rows by condition, utterances in one fixed order, and their bootstrap."""

    def __init__(self, rows: pd.DataFrame, seed: int, copy_text: bool):
        self.copy_text = copy_text
        self.rows = rows.assign(errors=rows.substitutions + rows.deletions + rows.insertions)
        speakers = self.condition("intact").speaker.tolist()
        self.bootstrap = Bootstrap(speakers, resamples=RESAMPLES, seed=seed)

    def condition(self, name: str, layer: str = "") -> pd.DataFrame:
        chosen = self.rows[(self.rows.condition == name) & (self.rows.layer == layer)]
        return chosen.set_index("utterance").sort_index()

    def baseline(self, intact: pd.DataFrame) -> dict[str, Any]:
        wer = self.bootstrap.rate(intact.errors, intact.reference_words)
        return {
            "wer": wer.value,
            "wer_ci": wer.limits,
            "nll": _ratio(intact.nll, intact.answer_tokens),
            **_error_kinds(intact),
            "reference_words": int(intact.reference_words.sum()),
        }

    def gate(self, intact: pd.DataFrame, swapped: pd.DataFrame) -> dict[str, Any]:
        wer = _ratio(swapped.errors, swapped.reference_words)
        what = "text" if self.copy_text else "audio"
        tokens = intact.answer_tokens
        return listening_gate(self.bootstrap, intact.nll, swapped.nll, tokens, wer, what)

    def method(self) -> str:
        unit: str = self.bootstrap.unit
        scope = ", so they speak of these speakers only"
        if self.copy_text:
            unit, scope = "text", ""
        elif unit == "speaker":
            scope = ""
        return (
            f"Paired bootstrap over {self.bootstrap.n_units} {unit}s ({RESAMPLES} resamples)"
            f"{scope}; profiles over layers carry simultaneous 95 % max-t bands."
        )


def _columns(columns: list[pd.Series]) -> np.ndarray:
    return np.column_stack([column.to_numpy(float) for column in columns])


def _ratio(numerator: pd.Series, denominator: pd.Series) -> float:
    return float(numerator.sum() / denominator.sum())


def _mean(values: pd.Series) -> float | None:
    return None if values.isna().all() else float(values.mean())


def _first_order(cut: pd.DataFrame) -> float | None:
    """Estimated ΔNLL of a patch, nat per answer token."""
    if cut.attribution.isna().all():
        return None
    return _ratio(cut.attribution, cut.answer_tokens)


def _error_kinds(rows: pd.DataFrame) -> dict[str, int]:
    return {kind: int(rows[kind].sum()) for kind in ("substitutions", "deletions", "insertions")}
