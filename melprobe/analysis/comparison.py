"""Two captures, or one with itself, frame by frame: rows of HSIC by utterance, and grids of CKA.

Each view (see `views`) has a grid, every layer with every layer, and pairs of layers with rows: the
same layer of two models; within a model each layer with the next. Pairs are taken twice: real, and
re-paired (see `pairing`), both at every lag.

The captures are read window by window, so memory is bounded whatever their size. Knows no models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from melprobe.analysis.pairing import Places, matched, minibatches, partners, windows
from melprobe.analysis.raw_mel import RawMel
from melprobe.analysis.secondary import INDICES
from melprobe.analysis.similarity import CkaGrid, shares, u_centred
from melprobe.analysis.views import VIEWS, Speech, View
from melprobe.errors import UsageError

BATCH = 256
"""Frames in a minibatch"""
WINDOW = 4096
"""Frames of a capture in memory, of all its layers, unless sixteen clips have more"""
SAMPLE = 1500
"""Frames at most for the secondary indices, which don't stream"""
SAMPLE_APART = 0.5
"""Seconds between a clip's frames in it"""
REAL, REPAIRED = "real", "re-paired"


@dataclass
class Compared:
    """What a comparison found."""

    rows: pd.DataFrame
    """pairing, lag, of, scaling, layer_a, layer_b, utterance, speaker, frames; hsic_ab, hsic_aa,
    hsic_bb: what the utterance's frames bring to each (see `similarity.shares`)"""
    grids: dict[View, np.ndarray]
    """CKA (A's layers, B's layers), at lag 0"""
    secondary: pd.DataFrame
    """pairing, of, layer_a, layer_b, frames, and a column for each index"""


@dataclass
class Comparison:
    """What is compared with what; `run` does it. Within one model b is a."""

    a: Speech
    b: Speech
    lags: Sequence[int]
    """frames of the coarser capture that B may be late, tried one by one"""
    seed: int = 0
    utterances: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.utterances = [name for name in self.a.clips if name in self.b.clips]

    @property
    def within(self) -> bool:
        return self.a is self.b

    def pairs(self, of: str) -> list[tuple[int, int]]:
        """Numbers of the layers that have rows."""
        first, second = self.a.layers(of), self.b.layers(of)
        if self.within:
            return list(pairwise(first))
        if isinstance(self.b, RawMel):
            return [(x, 0) for x in first]
        return [(x, x) for x in first if x in second]

    def run(self, tell: Callable[[], None] = lambda: None) -> Compared:
        """tell: is called once a clip. UsageError where no minibatch can be made."""
        rows, secondary = [], []
        grids = {
            view: CkaGrid() for view in VIEWS if self.a.layers(view.of) and self.b.layers(view.of)
        }
        others = partners(self.a.captured.utterances)
        pairings = {
            REAL: {name: name for name in self.utterances},
            REPAIRED: {u: v for u in self.utterances if (v := others.get(u)) in self.b.clips},
        }
        for pairing, partner in pairings.items():
            sums, sample = _Sums(self, grids), _Sample(self)
            for window in self._windows(partner, tell):
                sums.add(window, with_grid=pairing == REAL)
                sample.add(window)
            if pairing == REAL and not sums.frames.any():
                raise UsageError(
                    f"{self.a.captured.folder}: fewer than four clips with frames of speech at the "
                    "same times; capture more"
                )
            rows.append(sums.rows().assign(pairing=pairing))
            secondary.append(sample.rows().assign(pairing=pairing))
        return Compared(
            pd.concat(rows, ignore_index=True),
            {view: grid.cka().numpy() for view, grid in grids.items()},
            pd.concat(secondary, ignore_index=True),
        )

    def _windows(self, partner: Mapping[str, str], tell: Callable[[], None]) -> Iterator["_Window"]:
        rng = np.random.default_rng(self.seed)
        rates = (self.a.rate, self.b.rate)
        names = list(partner)
        places = [
            matched(self.a.clips[u].seconds, self.b.clips[v].seconds, rates, self.lags)
            for u, v in partner.items()
        ]
        frames = [
            len(self.a.clips[u].seconds) + len(self.b.clips[partner[u]].seconds) for u in names
        ]
        for window in windows(frames, 2 * WINDOW, rng):
            chosen = [(names[i], *places[i]) for i in window if places[i][0].size]
            if chosen:
                yield _Window.read(self, chosen, partner, rng)
            for _ in window:
                tell()


@dataclass
class _Window:
    """Matched frames of some clips: n of them, one clip's after another's."""

    a: Tensor
    """(R, n, D)"""
    b: Tensor
    """(R, all frames of B's clips, D)"""
    in_b: Tensor
    """(lags, n) places in b"""
    utterance: Tensor
    """(n,) number among the comparison's"""
    batches: list[Tensor]
    """places among the n"""
    sample: Tensor
    """places among the n of frames for the secondary indices"""

    @classmethod
    def read(
        cls,
        what: Comparison,
        chosen: Sequence[tuple[str, Places, Places]],
        partner: Mapping[str, str],
        rng: np.random.Generator,
    ) -> "_Window":
        a, b, in_b, utterance, start = [], [], [], [], 0
        for name, places_a, places_b in chosen:
            a.append(what.a.h(name)[:, places_a])
            b.append(what.b.h(partner[name]))
            in_b.append(torch.from_numpy(places_b) + start)
            utterance += [what.utterances.index(name)] * len(places_a)
            start += b[-1].shape[1]
        frames = [x.shape[1] for x in a]
        apart = max(1, round(SAMPLE_APART * min(what.a.rate, what.b.rate)))
        within = np.concatenate([np.arange(n) for n in frames])
        return cls(
            torch.cat(a, 1),
            torch.cat(b, 1),
            torch.cat(in_b, 1),
            torch.tensor(utterance),
            [torch.from_numpy(places) for places in minibatches(frames, BATCH, rng)],
            torch.from_numpy(np.flatnonzero(within % apart == 0)),
        )


class _Sums:
    """HSIC of a pairing's pairs, by utterance, and the grids of the real one."""

    def __init__(self, what: Comparison, grids: Mapping[View, CkaGrid]):
        self.what, self.grids = what, grids
        n = len(what.utterances)
        self.frames = torch.zeros(n, dtype=torch.int64)
        self.sums = {
            view: torch.zeros(len(what.lags), 3, n, len(what.pairs(view.of)), dtype=torch.float64)
            for view in grids
        }

    def add(self, window: _Window, with_grid: bool) -> None:
        n = len(self.what.utterances)
        for places in window.batches:
            self.frames += torch.bincount(window.utterance[places], minlength=n)
            for view in self.grids:
                self._add(view, window, places, with_grid)

    def _add(self, view: View, window: _Window, places: Tensor, with_grid: bool) -> None:
        what = self.what
        at_a = [what.a.layers(view.of).index(x) for x, _ in what.pairs(view.of)]
        at_b = [what.b.layers(view.of).index(y) for _, y in what.pairs(view.of)]
        a = u_centred(what.a.features(window.a[:, places], view))
        of = window.utterance[places]
        for number, lag in enumerate(what.lags):
            same = with_grid and what.within
            frames = window.in_b[number, places]
            b = a if same else u_centred(what.b.features(window.b[:, frames], view))
            self.sums[view][number] += shares(a[at_a], b[at_b], of, len(what.utterances))
            if with_grid and lag == 0:
                self.grids[view].add(a, None if same else b)

    def rows(self) -> pd.DataFrame:
        """One for each utterance that has frames, lag, view and pair."""
        what, tables = self.what, []
        there = np.flatnonzero(self.frames.numpy())
        names = np.array(what.utterances)[there]
        speakers = what.a.captured.utterances.speaker.fillna("").loc[names].to_numpy()
        for view, sums in self.sums.items():
            for lag, by_lag in zip(what.lags, sums.numpy(), strict=True):
                for number, (x, y) in enumerate(what.pairs(view.of)):
                    columns = dict(zip(("hsic_ab", "hsic_aa", "hsic_bb"), by_lag, strict=True))
                    table = {name: part[there, number] for name, part in columns.items()}
                    about = {"lag": lag, **view._asdict(), "layer_a": x, "layer_b": y}
                    who = {"utterance": names, "speaker": speakers}
                    who["frames"] = self.frames.numpy()[there]
                    tables.append(pd.DataFrame({**about, **who, **table}))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


class _Sample:
    """Frames for the secondary indices, at lag 0."""

    def __init__(self, what: Comparison):
        self.what = what
        self.a: list[Tensor] = []
        self.b: list[Tensor] = []
        self.n = 0

    def add(self, window: _Window) -> None:
        zero = list(self.what.lags).index(0)
        places = window.sample[: SAMPLE - self.n]
        self.a.append(window.a[:, places])
        self.b.append(window.b[:, window.in_b[zero, places]])
        self.n += len(places)

    def rows(self) -> pd.DataFrame:
        what, found = self.what, []
        if not self.n:
            return pd.DataFrame()
        h_a, h_b = torch.cat(self.a, 1), torch.cat(self.b, 1)
        for of in ("h", "delta"):
            first, second = what.a.layers(of), what.b.layers(of)
            x, y = (s.features(h, View(of, "raw")) for s, h in ((what.a, h_a), (what.b, h_b)))
            for layer_a, layer_b in what.pairs(of):
                pair = x[first.index(layer_a)], y[second.index(layer_b)]
                about = {"of": of, "layer_a": layer_a, "layer_b": layer_b, "frames": self.n}
                found.append(about | {name: index(*pair) for name, index in INDICES.items()})
        return pd.DataFrame(found)
