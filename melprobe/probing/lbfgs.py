"""L-BFGS on many problems at once: one function call evaluates all of them.

Each problem has its own memory, step and end (Liu & Nocedal 1989, doi:10.1007/BF01589116, with
backtracking until the loss falls enough). Those that have ended stand still while others go on.

Shapes: L problems, P parameters of each, m remembered steps.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Parameters (L, P) to losses (L,) in double precision and their gradients (L, P)."""
Precondition = Callable[[Tensor], Tensor]
"""Gradients (L, P) times a first guess at the inverse Hessian, of the right scale or below."""

MEMORY = 10
ENOUGH = 1e-4
"""Share of the fall in loss that the slope promises, at which a step is taken (Armijo)."""
HALVINGS = 20


def minimise(
    evaluate: Evaluate, start: Tensor, precondition: Precondition, *, tolerance: float, steps: int
) -> Tensor:
    """Parameters (L, P) where no gradient exceeds `tolerance`, or after so many steps.

    For smooth convex losses. A problem whose loss no step lowers any more has ended too.
    """
    at = start.clone()
    loss, gradient = evaluate(at)
    past: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
    ended = gradient.abs().amax(1) <= tolerance
    for _ in range(steps):
        if ended.all():
            break
        direction = -_times_inverse(gradient, past, precondition)
        direction[ended] = 0
        slope = _dot(direction, gradient)
        size = torch.ones_like(loss)
        for _ in range(HALVINGS):
            new = at + size[:, None].to(at.dtype) * direction
            new_loss, new_gradient = evaluate(new)
            failed = (new_loss > loss + ENOUGH * size * slope) & ~ended
            if not failed.any():
                break
            size = torch.where(failed, size / 2, size)
        moved = ~ended & ~failed
        step, change = new - at, new_gradient - gradient
        curved = _dot(step, change)
        use = moved & (curved > 1e-12 * _dot(change, change))
        past.append((step, change, torch.where(use, 1 / curved.clamp(min=1e-300), 0.0)))
        at = torch.where(moved[:, None], new, at)
        loss = torch.where(moved, new_loss, loss)
        gradient = torch.where(moved[:, None], new_gradient, gradient)
        ended = ended | failed | (gradient.abs().amax(1) <= tolerance)
    return at


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(L,) of (L, P), in double precision."""
    return (a * b).sum(1, dtype=torch.float64)


def _times_inverse(
    gradient: Tensor, past: deque[tuple[Tensor, Tensor, Tensor]], precondition: Precondition
) -> Tensor:
    """The gradient times the inverse Hessian that past steps tell of (the two loops)."""
    found, shares = gradient.clone(), []
    for step, change, weight in reversed(past):
        share = weight * _dot(step, found)
        found -= share[:, None].to(found.dtype) * change
        shares.append(share)
    found = precondition(found)
    if past:
        _, change, weight = past[-1]
        curve = weight * _dot(change, precondition(change))
        scale = torch.where(weight > 0, 1 / curve.clamp(min=1e-300), 1.0)
        found *= scale[:, None].to(found.dtype)
    for (step, change, weight), share in zip(past, reversed(shares), strict=True):
        back = share - weight * _dot(change, found)
        found += back[:, None].to(found.dtype) * step
    return found
