"""Debiased linear CKA (centred kernel alignment) of many layers, streaming over minibatches.

HSIC of two sets of features is the inner product of their centred Gram matrices; CKA divides it by
both norms (Kornblith et al. 2019, arXiv 1905.00414). With D of the order of the number of frames
that is near 1 even for independent features. So the unbiased HSIC_1 (Song et al. 2012) takes its
place: its diagonals are zero and its matrices U-centred (Székely & Rizzo 2014), and for independent
features its mean is 0 (Murphy et al. 2024, arXiv 2405.01012). It can lie just below 0 or above 1.

Over minibatches HSIC_1 is averaged, and the ratio taken at the end (Nguyen et al. 2021, arXiv
2010.15327); batches count by their frames. A layer's Gram matrix serves all pairs, so a grid of L
layers costs L Gram matrices and one product of (L, n²) matrices. The other road, X'Y of all frames
in one pass, gives HSIC_1 over all pairs of frames, but costs D² a frame for each of L² / 2 pairs of
layers (35 times as much for 31 layers, D = 576, n = 256). Nor may it be asked to leave out pairs of
frames from one clip, which no minibatch here holds (see `pairing`), and it is hardly less spread,
since which clips there are matters more than which of their frames meet (LOG.md, 2026-11-30).

Letters: n frames in a minibatch, D width, L layers, U utterances. Knows no captures and no models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from melprobe.errors import UsageError

FEWEST = 4
"""Frames in a minibatch: HSIC_1 of fewer is not defined."""


def u_centred(x: Tensor) -> Tensor:
    """U-centred Gram matrices (L, n, n) of features (L, n, D), in their dtype; diagonals are 0.

    The sum of the product of two, over n (n − 3), is HSIC_1. UsageError below four frames.
    """
    n = x.shape[-2]
    if n < FEWEST:
        raise UsageError(f"{n} frames in a minibatch: unbiased CKA needs {FEWEST} at least")
    # A shift of the features changes nothing but rounding: unshifted, float32 would lose it all.
    x = x - x.mean(-2, keepdim=True)
    gram = x @ x.mT
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    rows = gram.sum(-1) / (n - 2)
    rows -= rows.sum(-1, keepdim=True) / (2 * (n - 1))
    gram -= rows[..., :, None]
    gram -= rows[..., None, :]
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    return gram


class CkaGrid:
    """CKA of each layer of one list with each of another, over any number of minibatches."""

    def __init__(self) -> None:
        self._between = self._first = self._second = torch.zeros((), dtype=torch.float64)

    def add(self, a: Tensor, b: Tensor | None = None) -> None:
        """U-centred Gram matrices (A, n, n) and (B, n, n) of the same frames; None: a's again."""
        weight = 1 / (a.shape[-1] - 3)  # n of HSIC_1's 1 / (n (n − 3)): batches count by frames
        first = a.flatten(1)
        second = first if b is None else b.flatten(1)
        self._between = self._between + weight * (first @ second.T).double().cpu()
        self._first = self._first + weight * _squares(first)
        self._second = self._second + weight * _squares(second)

    def cka(self) -> Tensor:
        """(A, B) float64, NaN for a layer that never varies; UsageError when nothing was added."""
        if not self._between.ndim:
            raise UsageError("no minibatch was added, so there is nothing to compare")
        return ratio(self._between, self._first[:, None], self._second)


def _squares(flat: Tensor) -> Tensor:
    return torch.linalg.vecdot(flat, flat).double().cpu()


def ratio(between: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """CKA from HSIC of both and of each with itself; NaN where one of these is not above 0."""
    positive = (first > 0) & (second > 0)
    norm = (first.clamp(min=0) * second.clamp(min=0)).sqrt()
    return torch.where(positive, between / norm, torch.nan)


def shares(a: Tensor, b: Tensor, frames_of: Tensor, n_utterances: int) -> Tensor:
    """What each utterance's frames bring to HSIC_1 of P pairs of layers: (3, U, P) float64.

    a, b: (P, n, n) U-centred Gram matrices, the pairs' first and second layers. frames_of: (n,)
    number of each frame's utterance. First axis: the pair, a with itself, b with itself. Sums over
    U and over minibatches give the HSIC_1 that `CkaGrid` takes the ratio of; and since Gram
    matrices are centred, an utterance's share is also what HSIC_1 leans on it (half its influence).
    """
    products = torch.stack([torch.linalg.vecdot(x, y) for x, y in ((a, b), (a, a), (b, b))])
    found = products.new_zeros(3, n_utterances, len(a), dtype=torch.float64)
    by_frame = products.mT.double() / (a.shape[-1] - 3)  # (3, n, P)
    return found.index_add_(1, frames_of.to(found.device), by_frame).cpu()


@dataclass
class Moments:
    """Mean and standard deviation of each dimension, gathered piece by piece (Chan et al. 1983)."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    """Σ (x − mean)²"""

    def add(self, x: Tensor) -> None:
        """x: (L, n, D); moments are over n."""
        x, n = x.double(), x.shape[1]
        mean = x.mean(1, keepdim=True)
        total = self.count + n
        gap = mean - self.mean
        self.squares = (
            self.squares
            + ((x - mean) ** 2).sum(1, keepdim=True)
            + gap**2 * (self.count * n / total)
        )
        self.mean = self.mean + gap * (n / total)
        self.count = total

    def standardised(self, x: Tensor) -> Tensor:
        """(L, n, D) float32, each dimension with mean 0, deviation 1; 0 where it never varies."""
        assert isinstance(self.mean, Tensor) and isinstance(self.squares, Tensor)
        deviation = (self.squares / max(self.count - 1, 1)).sqrt().float()
        centred = x.float() - self.mean.float()
        return torch.where(deviation > 0, centred / deviation, 0.0)
