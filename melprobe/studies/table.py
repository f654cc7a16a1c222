"""A study's table: word error rates with intervals over seeds, the paper's beside them, the order.

Two arms are in order only where the interval of their difference excludes zero and one of them
hears. The intervals of a study's pairs hold together at 95 % (Bonferroni).
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from melprobe.analysis.gate import listening_gate
from melprobe.analysis.seeds import difference_over_seeds, over_seeds
from melprobe.analysis.statistics import Bootstrap, Interval
from melprobe.analysis.wer import corpus_wer, count_errors
from melprobe.studies.paper import Arm, Study
from melprobe.studies.running import Run, seconds_of
from melprobe.studies.sizes import within

ALL = (0.0, math.inf)


def all_rows(runs: Sequence[Run]) -> pd.DataFrame:
    """What every run wrote, a row for each clip, with its `arm` and `seed`."""
    return pd.concat([pd.DataFrame(_read(r)).assign(arm=r.arm.name, seed=r.seed) for r in runs])


class Scores:
    """Word errors of every arm, on the same clips in the same order."""

    def __init__(self, runs: Sequence[Run]):
        rows = {(r.arm.name, r.seed): _read(r) for r in runs}
        first = next(iter(rows.values()))
        self.seconds = np.array([row["duration"] for row in first])
        self.speakers = [row["speaker"] for row in first]
        counted: dict[str, list[list[int]]] = {}
        self.unit = Bootstrap(self.speakers).unit
        self.gates: dict[str, list[dict[str, Any]]] = {}
        bootstrap = Bootstrap(self.speakers)
        for (arm, _), found in rows.items():
            self.gates.setdefault(arm, []).append(_gate(found, bootstrap))
            errors = [count_errors(row["text"], row["pred_text"]) for row in found]
            counted.setdefault(arm, []).append([e.total for e in errors])
            self.words = np.array([e.reference_words for e in errors])
        self.errors = {arm: np.array(of_seeds) for arm, of_seeds in counted.items()}

    def wer(self, arm: str, lengths: tuple[float, float]) -> Interval:
        where = self._where(lengths)
        errors, words = self.errors[arm][:, where], self.words[where]
        return over_seeds(errors, words, self._speakers(where))

    def difference(
        self, a: str, b: str, lengths: tuple[float, float], confidence: float
    ) -> Interval:
        where = self._where(lengths)
        ours, its = self.errors[a][:, where], self.errors[b][:, where]
        words = self.words[where]
        return difference_over_seeds(ours, its, words, self._speakers(where), confidence)

    def count(self, lengths: tuple[float, float]) -> int:
        return len(self._where(lengths))

    def _where(self, lengths: tuple[float, float]) -> np.ndarray:
        return np.flatnonzero(within(self.seconds, lengths))

    def _speakers(self, where: np.ndarray) -> list[str]:
        return [self.speakers[i] for i in where]


def _read(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.rows.read_text().splitlines()]


def _gate(rows: list[dict[str, Any]], bootstrap: Bootstrap) -> dict[str, Any]:
    """Of one run, on all clips."""
    swapped = corpus_wer(count_errors(row["text"], row["pred_text_swapped"]) for row in rows)
    nll, other, tokens = ([row[key] for row in rows] for key in ("nll", "nll_swapped", "tokens"))
    return listening_gate(bootstrap, nll, other, tokens, swapped)


def findings(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """All of a study's `results.json`, from the rows of its runs alone."""
    scores = Scores(runs)
    spans = [span for span in study.lengths or (ALL,) if scores.count(span)]
    confidence = 1 - 0.05 / max(1, len(study.order) * len(spans))
    return {
        "study": study.name,
        "title": study.title,
        "table": study.table,
        "note": study.note,
        "whose": study.whose,
        "seeds": len({run.seed for run in runs}),
        "unit": scores.unit,
        "arms": [_arm(arm, span, scores, runs) for span in spans for arm in study.arms],
        "pairs": [_pair(a, b, span, scores, confidence) for span in spans for a, b in study.order],
        "confidence_of_pairs": confidence,
    }


def _arm(
    arm: Arm, span: tuple[float, float], scores: Scores, runs: Sequence[Run]
) -> dict[str, Any]:
    own = [run for run in runs if run.arm.name == arm.name]
    wer = scores.wer(arm.name, span)
    trained = [] if arm.without_lora else [seconds_of(run) for run in own]
    return {
        "arm": arm.name,
        "label": arm.label,
        "seconds": _finite(span),
        "wer": wer.value,
        "wer_ci": wer.limits,
        "wer_of_seeds": [float(e.sum() / scores.words.sum()) for e in scores.errors[arm.name]]
        if span == ALL
        else None,
        "gates": scores.gates[arm.name],
        "paper_wer": arm.paper and arm.paper / 100,
        "training_seconds": float(np.mean(trained)) if trained else None,
        "clips": scores.count(span),
        "steps": sum(stage.steps for stage in own[0].recipe.data.stages),
        "took_over": bool(own[0].recipe.model.lora and own[0].recipe.model.lora.init),
        "runs": [str(run.folder) for run in own],
    }


def _pair(
    a: str, b: str, span: tuple[float, float], scores: Scores, confidence: float
) -> dict[str, Any]:
    found = scores.difference(a, b, span, confidence)
    # Two deaf models differ in how they guess.
    hears = any(gate["passed"] for arm in (a, b) for gate in scores.gates[arm])
    verdict = "not resolved"
    if hears and found.high < 0:
        verdict = "agrees"
    elif hears and found.low > 0:
        verdict = "disagrees"
    return {
        "lower": a,
        "higher": b,
        "seconds": _finite(span),
        "difference": found.value,
        "difference_ci": found.limits,
        "verdict": verdict,
    }


def _finite(bounds: tuple[float, float]) -> list[float] | None:
    return list(bounds) if all(map(math.isfinite, bounds)) else None
