"""Muon for many small matrices: torch's, with matrices of one shape orthogonalised together.

torch.optim.Muon takes them one by one. LoRA has hundreds, too small to fill a core, let alone a
GPU: mel-mini's 140 take 56 ms one by one and 9 ms together (one core).
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

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
                gradients = torch.stack([m.grad for m in matrices if m.grad is not None])
                momenta = [self._momentum_of(m) for m in matrices]
                torch._foreach_lerp_(momenta, list(gradients.unbind()), 1 - group["momentum"])
                nesterov = gradients.lerp_(torch.stack(momenta), group["momentum"])
                rate = group["lr"] * 0.2 * max(nesterov.shape[1:]) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                updates = orthogonalise(nesterov).to(gradients.dtype)
                torch._foreach_add_(matrices, list(updates.unbind()), alpha=-rate)

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
