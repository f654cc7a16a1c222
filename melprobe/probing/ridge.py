"""Ridge regression of many targets on one layer, its moments summed up piece by piece.

Features are centred and brought to unit variance, and |y - Wx|² / n + λ|W|² is least. All targets
known at the same rows share a layer's covariance, and so one Cholesky factor for each λ (never LU:
torch 2.13's batched LU is silently wrong on a CPU at 256 and more). Classes are targets of 0 and 1,
the largest wins: scikit-learn's RidgeClassifier. Memory is one piece and a few D × D matrices,
however many rows there are.

Shapes: N rows, n of a piece, D width, C columns of all targets together, Λ penalties.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from melprobe.errors import UsageError

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""λ, where a feature has unit variance: scikit-learn's alpha is λ times the training rows."""
PIECE = 4096
"""Rows that are multiplied in single precision; the sum over pieces is in double."""
_LEAST_SHARE = 1e-12

Pieces = Callable[[], Iterable[Tensor]]
"""A layer's rows (n, D) piece by piece, always in the same order; asked for in every pass."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be read from rows: a class or some numbers."""

    values: Tensor
    """(N,) int64 classes, or (N, K) float32; anything where it is not known"""
    n_classes: int = 0
    """0 where the target is numbers"""

    @property
    def columns(self) -> int:
        return self.n_classes or self.values.shape[1]


@dataclass(slots=True)
class Fitted:
    """Linear maps from a layer to the columns of targets, one for each of Λ penalties."""

    mean: Tensor
    """(D,) of the training rows"""
    weights: Tensor
    """(Λ, D, C), for centred features"""
    bias: Tensor
    """(Λ, C)"""

    def predict(self, x: Tensor) -> Tensor:
        """(Λ, n, C) of rows (n, D)."""
        centred = (x.float() - self.mean).expand(len(self.weights), -1, -1)
        return torch.baddbmm(self.bias[:, None], centred, self.weights)


class Moments:
    """Sums over training rows of features, targets and their products."""

    def __init__(self, targets: Sequence[Target], rows: Tensor):
        """rows (N,) bool: those to train on, at which every target is known."""
        self.targets, self.rows = targets, rows
        self.count, self.shift = 0, torch.empty(0)
        self.xx = self.xy = self.x = self.y = torch.empty(0)

    def add(self, x: Tensor, start: int) -> None:
        """Rows (n, D), the first of which is row number `start`; those not asked for are left."""
        device = x.device
        chosen = self.rows[start : start + len(x)].to(device)
        numbers = chosen.nonzero()[:, 0]
        for part in numbers.split(PIECE):
            self._add(x[part].float(), part + start)

    def _add(self, x: Tensor, numbers: Tensor) -> None:
        if not self.count:  # what all rows share would drown what they differ in
            self.shift = x.mean(0)
            columns = sum(target.columns for target in self.targets)
            nothing = torch.zeros(1, dtype=torch.float64, device=x.device)
            width = x.shape[1]
            self.xx, self.xy = nothing.new_zeros(width, width), nothing.new_zeros(width, columns)
            self.x, self.y = nothing.new_zeros(width), nothing.new_zeros(columns)
        x = x - self.shift
        self.count += len(x)
        self.xx += x.T @ x
        self.x += x.sum(0, dtype=torch.float64)
        at = 0
        for target in self.targets:
            values = target.values[numbers.cpu()].to(x.device)
            span = slice(at, at + target.columns)
            if target.n_classes:  # the sum of each class's rows: no product with zeros
                sums = x.new_zeros(target.n_classes, x.shape[1]).index_add_(0, values, x)
                self.xy[:, span] += sums.T
                self.y[span] += values.bincount(minlength=target.n_classes)
            else:
                self.xy[:, span] += x.T @ values
                self.y[span] += values.sum(0, dtype=torch.float64)
            at += target.columns

    def solve(self, penalties: Sequence[float] = PENALTIES) -> Fitted:
        """The map for each penalty, by one batched Cholesky factorisation.

        UsageError where there is no row, or where features are not finite.
        """
        if self.count < 2:
            raise UsageError(f"{self.count} rows to train a probe on: capture more clips")
        n = self.count
        mean, middle = self.x / n, self.y / n
        covariance = self.xx / n - torch.outer(mean, mean)
        if not covariance.isfinite().all():
            raise UsageError("a captured layer holds numbers that are not finite; capture anew")
        products = self.xy / n - torch.outer(mean, middle)
        variance = covariance.diagonal()
        # Dimensions that don't vary carry nothing; their rounding errors must not be blown up.
        alive = variance > _LEAST_SHARE * (self.xx.diagonal() / n).clamp(min=1e-30)
        scale = torch.where(alive, variance.clamp(min=1e-300).rsqrt(), 0.0)
        covariance = covariance * torch.outer(scale, scale)
        strengths = torch.tensor(penalties, dtype=torch.float64, device=covariance.device)
        eye = torch.eye(len(scale), dtype=torch.float64, device=covariance.device)
        factors = torch.linalg.cholesky(covariance + strengths[:, None, None] * eye)
        right = (products * scale[:, None]).expand(len(factors), -1, -1)
        weights = torch.cholesky_solve(right, factors) * scale[:, None]
        bias = middle - (mean @ weights)  # for features that are shifted
        return Fitted(self.shift, weights.float(), bias.float())


def numbered(pieces: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each piece with the number of its first row."""
    start = 0
    for piece in pieces:
        yield start, piece
        start += len(piece)
