"""Four other indices of similarity between two sets of features, (n, D) and (n, E) of n frames.

They stand beside debiased CKA, never in its place: each calls other things equal, and none is
debiased, so read them beside their floors. All are 1 for equal features.

| index | is 1 (does not change) under |
|---|---|
| `pwcca` | any invertible affine map |
| `procrustes` | rotation, reflection, one scale, shift |
| `mutual_neighbours` | rotation, reflection, one scale, shift; sees near frames only |
| `rsa` | a monotone map of all distances; scale of each frame, shift of all its dimensions |

SVD and QR alone: torch's batched LU is wrong on CPUs from n = 256 (2.13).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

NEIGHBOURS = 10
_TINY = 1e-6
"""Singular values below this share of the largest are rounding, in float32 captures at least."""


def pwcca(x: Tensor, y: Tensor) -> float:
    """Canonical correlations, weighted by how much of x each canonical direction carries.

    Morcos et al. 2018 (arXiv 1806.05759). Not symmetric: pwcca(y, x) weighs by y. NaN where n is
    not above D + E + 1: some correlations are then 1 by counting dimensions.
    """
    if len(x) <= x.shape[1] + y.shape[1] + 1:
        return float("nan")
    x, y = _centred(x), _centred(y)
    basis_x, basis_y = _basis(x), _basis(y)
    left, correlations, _ = torch.linalg.svd(basis_x.T @ basis_y, full_matrices=False)
    weights = (x.T @ (basis_x @ left)).abs().sum(0)
    return float((weights * correlations.clamp(max=1)).sum() / weights.sum())


def procrustes(x: Tensor, y: Tensor) -> float:
    """‖X'Y‖_* / (‖X‖ ‖Y‖): cosine of the angle after the best rotation (Williams et al. 2021).

    arXiv 2110.14739; their distance is its arccos. NaN where one of them never varies.
    """
    x, y = _centred(x), _centred(y)
    return float(torch.linalg.svdvals(x.T @ y).sum() / (x.norm() * y.norm()))


def mutual_neighbours(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of each frame's k nearest frames, by Euclidean distance, that are the same in both.

    Huh et al. 2024 (arXiv 2405.07987). k is cut to n − 1. By chance it is k / (n − 1).
    """
    k = min(k, len(x) - 1)
    near = []
    for features in (_centred(x), _centred(y)):
        distance = torch.cdist(features, features)
        distance.fill_diagonal_(torch.inf)
        among = torch.zeros_like(distance, dtype=torch.bool)
        near.append(among.scatter_(1, distance.topk(k, largest=False).indices, True))
    return (near[0] & near[1]).sum().item() / (k * len(x))


def rsa(x: Tensor, y: Tensor) -> float:
    """Spearman correlation of the two tables of correlation distances between frames.

    Kriegeskorte et al. 2008 (doi:10.3389/neuro.06.004.2008).
    """
    first, second = (rankdata(_distances(features)) for features in (x, y))
    return float(np.corrcoef(first, second)[0, 1])


def _distances(x: Tensor) -> NDArray[np.float64]:
    """1 − Pearson's correlation of each pair of frames, (n (n − 1) / 2,)."""
    x = x.double()
    x = x - x.mean(1, keepdim=True)
    x = x / x.norm(dim=1, keepdim=True)
    above = torch.triu_indices(len(x), len(x), 1)
    return (1 - x @ x.T)[above[0], above[1]].numpy()


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)


def _basis(x: Tensor) -> Tensor:
    """An orthonormal basis (n, rank) of the columns' span."""
    vectors, values, _ = torch.linalg.svd(x, full_matrices=False)
    return vectors[:, values > _TINY * values[0]]


INDICES = {
    "pwcca": pwcca,
    "procrustes": procrustes,
    "mutual_neighbours": mutual_neighbours,
    "rsa": rsa,
}
