"""A capture's frames of speech as features: residuals or what blocks add, raw or standardised.

Residuals h_l, and what each block adds, Δ_l = h_{l+1} − h_l; raw, where a few wide dimensions
decide, and standardised, where all count alike. Knows no models.
"""

from functools import cached_property
from itertools import product
from typing import NamedTuple

from torch import Tensor

from melprobe.analysis.pairing import Frames
from melprobe.analysis.similarity import Moments
from melprobe.captured import Capture
from melprobe.errors import UsageError


class View(NamedTuple):
    """What of the residuals is compared."""

    of: str
    """h or delta"""
    scaling: str
    """raw or standardised"""


VIEWS = [View(*view) for view in product(("h", "delta"), ("raw", "standardised"))]


class Speech:
    """A capture's frames of speech, and how its features are scaled."""

    def __init__(self, captured: Capture):
        self.captured = captured
        self.rate = float(captured.index["patches_per_second"])
        rows = captured.rows
        rows = rows[rows.kind == "speech"]
        if rows.empty:
            raise UsageError(f"{captured.folder}: holds no speech; capture with --positions speech")
        first = captured.utterances.first_row
        self.clips = {
            str(name): Frames(part.index.to_numpy() - int(first[name]), part.seconds.to_numpy())
            for name, part in rows.groupby("utterance", observed=True)
        }
        """By utterance."""

    def h(self, utterance: str) -> Tensor:
        """(R, n, D), of the frames of speech."""
        return self.captured.clip(utterance)[:, self.clips[utterance].places]

    def layers(self, of: str) -> list[int]:
        """Numbers of the layers that there are of a view."""
        numbers = self.captured.numbers
        return numbers if of == "h" else [x for x in numbers if x + 1 in numbers]

    def features(self, h: Tensor, view: View) -> Tensor:
        """(layers, n, D) float32 of a view, from residuals (R, n, D)."""
        if view.of == "delta":
            at = [self.captured.numbers.index(x) for x in self.layers("delta")]
            h = h[[i + 1 for i in at]].float() - h[at].float()
        return self.moments[view.of].standardised(h) if view.scaling != "raw" else h.float()

    @cached_property
    def moments(self) -> dict[str, Moments]:
        found = {"h": Moments(), "delta": Moments()}
        for utterance in self.clips:
            h = self.h(utterance)
            for of, moments in found.items():
                moments.add(self.features(h, View(of, "raw")))
        return found
