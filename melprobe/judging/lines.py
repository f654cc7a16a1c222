"""Lines of evidence on agreement, from rows: what two runs are to each other, layer by layer.

Of each block l that can be judged, between every two runs:

- `exchanged`: one run's block l does the other's work, between fitted maps; damage d of the one
  that got it, mean of both directions;
- `stitched`: what leaves one run's block l, mapped, goes into the other's block l + 1; likewise;
- `h`: debiased CKA of what leaves block l, raw, at the better of the lags that were searched;
- `delta`: that of what block l adds;

and of every run `probe`: what linear probes read of what leaves block l. Each comes with what it
would be without each of some blocks of clips. Knows no models.

Shapes: U clips, L judged blocks, K blocks of clips.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from melprobe.analysis.agreement import (
    Differences,
    difference_of_means,
    within_and_between,
    within_less_between,
)
from melprobe.analysis.comparison import REAL
from melprobe.analysis.comparison_scores import best_lag
from melprobe.analysis.statistics import Floats, clusters
from melprobe.analysis.stitching import ARMS, EXCHANGED, STITCHED
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import UsageError
from melprobe.judging.evidence import between, pairs, probes
from melprobe.judging.question import Question
from melprobe.probing.sources import MODEL
from melprobe.probing.study import RIDGE

BETWEEN = ("exchanged", "stitched", "h", "delta")
MOST_BLOCKS = 30
"""of clips"""

Pairwise = dict[str, tuple[Floats, Floats]]
"""By line: [L], and [K, L] without each block of clips"""


class Ratio(NamedTuple):
    """A figure of each layer as a ratio of sums over clips."""

    above: Floats
    """[U, L]"""
    below: Floats
    """[U, L] or [U, 1]"""

    def value(self) -> Floats:
        """[L]"""
        return self.above.sum(0) / self.below.sum(0)

    def by_block(self, block_of: NDArray[np.int64]) -> Floats:
        """[K, L] without each block of clips; block_of: [U]."""
        above, below = (_sums(part, block_of) for part in self)
        return (above.sum(0) - above) / (below.sum(0) - below)


def blocks_of_clips(speakers: Sequence[str]) -> NDArray[np.int64]:
    """[U] the block of each clip: speakers stay together where there are at least ten."""
    unit_of, n_units = clusters(speakers)
    return unit_of % min(n_units, MOST_BLOCKS)


def _sums(values: Floats, block_of: NDArray[np.int64]) -> Floats:
    found = np.zeros((int(block_of.max()) + 1, values.shape[1]))
    np.add.at(found, block_of, values)
    return found


def stitching(rows: pd.DataFrame, layers: Sequence[int], speakers: Mapping[str, str]) -> Pairwise:
    """`exchanged` and `stitched` of two runs, as similarity: damage, negative.

    rows: of `melprobe.stitch`; layers: [L] blocks; speakers: by utterance.
    """
    names = sorted(rows.utterance.unique())
    tables = {
        key: part.pivot(index="utterance", columns="layer", values="nll").loc[names]
        for key, part in rows.groupby(["arm", "condition"])
    }
    nll = {(arm, c): tables[arm, c].to_numpy()[:, 0] for arm in ARMS for c in ("intact", "swapped")}
    worse = max(ARMS, key=lambda arm: nll[arm, "intact"].sum())
    block_of = blocks_of_clips([speakers[name] for name in names])
    found = {}
    for line, condition, at in (("exchanged", EXCHANGED[1], 0), ("stitched", STITCHED[1], 1)):
        directions = []
        for arm in ARMS:
            of = arm if condition in EXCHANGED else worse
            cut = tables[arm, condition][[layer + at for layer in layers]].to_numpy()
            gap = nll[of, "swapped"] - nll[of, "intact"]
            directions.append(Ratio(nll[of, "intact"][:, None] - cut, gap[:, None]))
        found[line] = _mean([(one.value(), one.by_block(block_of)) for one in directions])
    return found


def _mean(figures: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    whole, by_block = zip(*figures, strict=True)
    return np.mean(whole, axis=0), np.mean(by_block, axis=0)


def likeness(rows: pd.DataFrame, layers: Sequence[int], speakers: Mapping[str, str]) -> Pairwise:
    """`h` and `delta` of two runs, from the rows of `melprobe.compare`."""
    rows = rows[(rows.pairing == REAL) & (rows.scaling == "raw")]
    names = pd.Index(sorted(rows.utterance.unique()))
    block_of = blocks_of_clips([speakers[name] for name in names])
    found = {}
    for line, at in (("h", 1), ("delta", 0)):
        lags, pseudo = best_lag(rows[rows.of == line], names)
        where = [lags.index.get_loc((layer + at, layer + at)) for layer in layers]
        # Pseudo-values of clips, whose mean is CKA.
        ratio = Ratio(pseudo[:, where], np.ones((len(names), 1)))
        found[line] = ratio.value(), ratio.by_block(block_of)
    return found


def reading(rows: pd.DataFrame, layers: Sequence[int], label: str) -> tuple[Floats, Floats]:
    """`probe` of a run: accuracy [L], and [K, L] without each block of voices.

    rows: of `melprobe.probe`.
    """
    rows = rows[(rows.series == MODEL) & (rows.probe == RIDGE) & (rows.label == label)]
    if rows.empty:
        raise UsageError(f"{label} could not be probed; see the results.json of probes for why")
    voices = rows.drop_duplicates("utterance").set_index("utterance").voice.sort_index()
    wide = {
        column: rows.pivot(index="utterance", columns="layer", values=column)
        .loc[voices.index, [f"h_{layer + 1}" for layer in layers]]
        .to_numpy(np.float64)
        for column in ("right", "n")
    }
    ratio = Ratio(wide["right"], wide["n"])
    return ratio.value(), ratio.by_block(blocks_of_clips(voices.tolist()))


def read_rows(folder: Path) -> pd.DataFrame:
    """UsageError where they are missing or damaged."""
    try:
        return pd.read_parquet(folder / "rows.parquet")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder}: rows missing or damaged ({type(error).__name__}); delete {folder}.done, "
            "and they are made anew"
        ) from None


class PairLines:
    """All lines between all runs of a study."""

    def __init__(
        self,
        between: Mapping[frozenset[str], Pairwise],
        read: Mapping[str, tuple[Floats, Floats]],
    ):
        """between: by the names of two runs; read: `probe` by the name of a run."""
        self._between, self._read = between, read

    @classmethod
    def of_study(cls, question: Question, out: Path, layers: Sequence[int]) -> Self:
        """From its evidence."""
        manifest = read_manifest(find_manifest(question.file.data))
        speakers = {u.id: u.speaker for u in manifest}
        found = {}
        for a, b in pairs(question):
            stitched, compared = (read_rows(between(out, x, a, b)) for x in ("stitch", "compare"))
            found[frozenset((a.name, b.name))] = {
                **stitching(stitched, layers, speakers),
                **likeness(compared, layers, speakers),
            }
        probed = {run.name: read_rows(probes(out, run)) for run in question.runs}
        label = question.file.probe
        return cls(found, {name: reading(rows, layers, label) for name, rows in probed.items()})

    def differences(self, arms: Mapping[str, Sequence[str]]) -> dict[str, Differences]:
        """Of each line; `probe` is the first arm's mean less the other's. arms: names of runs."""
        arm_of = [arm for arm, runs in arms.items() for _ in runs]
        found = {}
        for line in BETWEEN:
            whole, by_block = self._matrix(arms, line)
            found[line] = within_less_between(whole, arm_of, by_block)
        read = [self._read[run] for runs in arms.values() for run in runs]
        scores, by_block = (np.stack(part, axis=-1) for part in zip(*read, strict=True))
        return found | {"probe": difference_of_means(scores, arm_of, by_block)}

    def figures(self, arms: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Floats]]:
        """[L] of each line: `within` arms and `between` them; of `probe` each arm's mean."""
        arm_of = [arm for arm, runs in arms.items() for _ in runs]
        found = {}
        for line in BETWEEN:
            within, across = within_and_between(self._matrix(arms, line)[0], arm_of)
            found[line] = {"within": within, "between": across}
        return found | {
            "probe": {
                arm: np.mean([self._read[run][0] for run in runs], axis=0)
                for arm, runs in arms.items()
            }
        }

    def _matrix(self, arms: Mapping[str, Sequence[str]], line: str) -> tuple[Floats, Floats]:
        """[L, M, M] and [K, L, M, M] of M runs; NaN on the diagonal."""
        names = [run for runs in arms.values() for run in runs]
        whole, by_block = next(iter(self._between.values()))[line]
        m = np.full((*whole.shape, len(names), len(names)), np.nan)
        by = np.full((*by_block.shape, len(names), len(names)), np.nan)
        for (i, a), (j, b) in combinations(enumerate(names), 2):
            one, its = self._between[frozenset((a, b))][line]
            m[..., i, j] = m[..., j, i] = one
            by[..., i, j] = by[..., j, i] = its
        return m, by
