"""Muon for many small matrices: torch's, with matrices of one shape orthogonalised together.

torch.optim.Muon takes them one by one. LoRA has hundreds, too small to fill a core, let alone a
GPU: mel-mini's 140 take 56 ms one by one and 9 ms together (one core). Where each process holds
some rows of every matrix (FSDP), momentum needs no more, and the matrices are shared out whole to
be orthogonalised.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from melprobe.training.processes import own_part

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_ITERATIONS = 5
_EPSILON = 1e-7


class Muon(torch.optim.Muon):
    """Momentum whose update is orthogonalised (Jordan 2024, kellerjordan.github.io/posts/muon).

    Rates match AdamW's (Liu et al. 2025, arXiv 2502.16982: times 0.2 sqrt(longer side)), so that
    `lr` means the same in both. Equals torch.optim.Muon with adjust_lr_fn="match_rms_adamw", to
    the rounding of bfloat16.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrices in _of_one_shape(group["params"]):
                gradients = torch.stack([own_part(m.grad) for m in matrices if m.grad is not None])
                momenta = [own_part(self._momentum_of(m)) for m in matrices]
                torch._foreach_lerp_(momenta, list(gradients.unbind()), 1 - group["momentum"])
                nesterov = gradients.lerp_(torch.stack(momenta), group["momentum"])
                rate = group["lr"] * 0.2 * max(matrices[0].shape) ** 0.5
                moved = [own_part(m) for m in matrices]
                torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
                updates = _orthogonal_rows(nesterov, matrices[0]).to(gradients.dtype)
                torch._foreach_add_(moved, list(updates.unbind()), alpha=-rate)

    def _momentum_of(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def _of_one_shape(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those that have a gradient, shape by shape."""
    moved = sorted((m for m in matrices if m.grad is not None), key=lambda m: m.shape)
    for _, alike in groupby(moved, key=lambda m: m.shape):
        yield list(alike)


def _orthogonal_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """`orthogonalise` of matrices like `matrix` (R, C), of which this process has `rows` (N, r, C).

    Every process orthogonalises some of the N and gets its rows of all of them back.
    """
    if not isinstance(matrix, DTensor):
        return orthogonalise(rows)
    shape = torch.Size((len(rows), *matrix.shape))
    strides = (matrix.numel(), matrix.shape[1], 1)

    def moved(part: Tensor, dim: int, to: int) -> Tensor:
        tensor = DTensor.from_local(
            part, matrix.device_mesh, [Shard(dim)], shape=shape, stride=strides
        )
        return tensor.redistribute(placements=[Shard(to)]).to_local()

    return moved(orthogonalise(moved(rows, 1, 0)), 0, 1)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Each of `matrices` (N, R, C) with its singular values moved to about 1 (0.5 to 1.5).

    Newton-Schulz iteration in bfloat16, with Jordan's coefficients.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)  # largest singular value under 1
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
