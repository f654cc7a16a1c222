"""From rows to the verdict: what is said of every block, with all that it rests on.

Blocks whose work at speech positions nobody reads (the last one) are not judged: there it is zero
by construction, and no finding.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melprobe.analysis.claims import LayerClaim
from melprobe.analysis.damage import damage_tests
from melprobe.analysis.statistics import Tests
from melprobe.errors import UsageError
from melprobe.hooks.layers import format_layers
from melprobe.judging.agree import agreements, also_at
from melprobe.judging.evidence import COPYING, TOP, ablation, top_quarter
from melprobe.judging.lines import PairLines, read_rows
from melprobe.judging.need import detectable, needs, top_quarter_claim
from melprobe.judging.question import Question, Run

Found = dict[str, Any]


@dataclass(frozen=True)
class Judge:
    """Reads a study's evidence; `verdict` is what it comes to."""

    question: Question
    out: Path
    n_layers: int

    def verdict(self) -> Found:
        """`arms`, `nearest_wer`, `reader`, `gates_passed`, `data`, `layers` and `top_quarter` of

        verdict.json. UsageError where evidence is damaged.
        """
        question, judged = self.question, self.judged()
        copying = self._results(COPYING)
        hears = {run.name: self._results("speech", run)["gate"]["passed"] for run in question.runs}
        passed = all(hears.values()) and copying["gate"]["passed"]
        layers: list[Found] = [
            {"layer": layer, "judged": layer in judged, "need": {}, "agreement": None}
            for layer in range(self.n_layers)
        ]
        quarter: Found = {}
        for arm, runs in question.arms.items():
            quarter[arm] = self._top_quarter(runs, judged, passed)
            for layer, one in zip(judged, self._needs(runs, judged, passed), strict=True):
                layers[layer]["need"][arm] = one
        if len(question.arms) == 2:
            for layer, one in zip(judged, self._agreement(judged, passed), strict=True):
                layers[layer]["agreement"] = one
        return {
            "arms": {arm: list(map(self._run, runs)) for arm, runs in question.arms.items()},
            "nearest_wer": {a: list(map(self._run, runs)) for a, runs in question.nearest.items()},
            "reader": {"name": question.file.reader, "gate": copying["gate"]},
            "gates_passed": passed,
            "data": self._results("speech", question.runs[0])["data"],
            "layers": layers,
            "top_quarter": quarter,
        }

    def judged(self) -> list[int]:
        """Blocks that are not zero by construction where speech stands, or words to be copied."""
        found = [self._results("speech", run) for run in self.question.runs]
        free = {
            layer["layer"]
            for results in (*found, self._results(COPYING))
            for layer in results["layers"]
            if layer["zero_by_construction"]
        }
        return [layer for layer in range(self.n_layers) if layer not in free]

    def _needs(self, runs: Sequence[Run], judged: Sequence[int], passed: bool) -> list[Found]:
        """Of each judged block of an arm."""
        labels = [str(layer) for layer in judged]
        speech, answer = (
            [self._tests(labels, what, run) for run in runs] for what in ("speech", "answer")
        )
        copying = self._tests(labels, COPYING)
        least = detectable(speech)
        found = []
        for i, one in enumerate(needs(speech, answer, copying, self._margin)):
            claims = {
                name: _claim(claim) for name, claim in one._asdict().items() if name != "need"
            }
            claims["speech"]["damage"] = [_finite(test.values[i]) for test in speech]
            claims["answer"]["damage"] = [_finite(test.values[i]) for test in answer]
            claims["copying"]["damage"] = _finite(copying.values[i])
            found.append(
                {
                    "need": one.need if passed else "undecided: gate",
                    "margin": self._margin,
                    "detectable_margin": _finite(least[i]),
                    **claims,
                }
            )
        return found

    def _top_quarter(self, runs: Sequence[Run], judged: Sequence[int], passed: bool) -> Found:
        blocks = top_quarter(self.n_layers)
        top = [self._tests([format_layers(blocks)], TOP, run) for run in runs]
        speech = [self._tests([str(layer) for layer in judged], "speech", run) for run in runs]
        below = sum(layer < blocks[0] for layer in judged)
        found = top_quarter_claim(top, speech, below, self._margin)
        told: str = found.verdict
        if below == len(judged):
            told = "undecided: zero by construction"
        return {
            "blocks": blocks,
            "verdict": told if passed else "undecided: gate",
            "top": {**_claim(found.top), "damage": [_finite(one.values[0]) for one in top]},
            "rest": _claim(found.rest),
            "spare_below": [judged[i] for i in found.spare],
        }

    def _agreement(self, judged: Sequence[int], passed: bool) -> list[Found]:
        """Of each judged block of the pair."""
        question, lines = self.question, PairLines.of_study(self.question, self.out, judged)
        arms, later = (
            {arm: [run.name for run in runs] for arm, runs in which.items()}
            for which in (question.arms, question.nearest)
        )
        m = question.file.margins
        margins = {"exchanged": m.exchange, "stitched": m.exchange}
        margins |= {"h": m.similarity, "delta": m.similarity, "probe": m.probe}
        differences, figures = lines.differences(arms), lines.figures(arms)
        equal, nearest = agreements(differences, margins), None
        if later and self._hear_alike(question.arms | question.nearest):
            nearest = agreements(lines.differences(arms | later), margins)
        elif self._hear_alike(question.arms):
            nearest = equal
        found = []
        for i, (label, one) in enumerate(zip(also_at(equal, nearest), equal, strict=True)):
            its: Found = {}
            for name, claim in one.lines.items():
                line = differences[name]
                its[name] = {
                    **{part: _finite(values[i]) for part, values in figures[name].items()},
                    "difference": _finite(line.values[i]),
                    "error": _finite(line.errors[i]),
                    "margin": margins[name],
                    "detectable_margin": _finite(line.detectable()[i]),
                    **_claim(claim),
                }
            found.append(
                {
                    "agreement": label if passed else "undecided: gate",
                    "at_equal_computing": one.agreement,
                    "at_nearest_wer": nearest[i].agreement if nearest else None,
                    "smallest_margin": one.together.smallest_margin,
                    "lines": its,
                }
            )
        return found

    def _hear_alike(self, arms: Mapping[str, Sequence[Run]]) -> bool:
        rates = [
            np.mean([self._results("speech", run)["baseline"]["wer"] for run in runs])
            for runs in arms.values()
        ]
        return bool(np.ptp(rates) <= self.question.file.margins.wer)

    @property
    def _margin(self) -> float:
        return self.question.file.margins.damage

    def _run(self, run: Run) -> Found:
        results = self._results("speech", run)
        baseline = results["baseline"]
        return {
            "name": run.name,
            "sha256": run.sha256,
            "wer": baseline["wer"],
            "wer_ci": baseline["wer_ci"],
            "gate": results["gate"],
        }

    def _tests(self, labels: Sequence[str], what: str, run: Run | None = None) -> Tests:
        rows, seed = read_rows(ablation(self.out, what, run)), self.question.file.seed
        return damage_tests(rows, "skip", labels, seed, copy_text=what == COPYING)

    def _results(self, what: str, run: Run | None = None) -> Found:
        folder = ablation(self.out, what, run)
        try:
            return json.loads((folder / "results.json").read_text())
        except (OSError, ValueError):
            raise UsageError(
                f"{folder}: results missing or damaged; delete {folder}.done, and they are made "
                "anew"
            ) from None


def _claim(claim: LayerClaim) -> Found:
    return claim._asdict()


def _finite(value: float | np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None
