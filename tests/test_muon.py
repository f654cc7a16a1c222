"""Muon over matrices of one shape at once is torch's Muon."""

import torch
from torch import nn

from melprobe.training.muon import Muon, orthogonalise

SHAPES = [(6, 20), (20, 6), (6, 20), (9, 9), (20, 6)]


def _matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_steps_as_torch_does():
    ours, theirs = _matrices(), _matrices()
    optimizers = (
        Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = torch.randn(a.shape, generator=generator)
            if step == 2 and number == 3:
                a.grad = None  # not part of this step's loss
            b.grad = None if a.grad is None else a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, _matrices(), strict=True):
        moved = (b - start).norm()
        assert moved > 0.01
        assert (a - b).norm() < 0.02 * moved  # bfloat16 rounds as the order of sums wants
    momenta = [
        [o.state[m]["momentum_buffer"] for m in ms]
        for o, ms in zip(optimizers, (ours, theirs), strict=True)
    ]
    for a, b in zip(*momenta, strict=True):
        torch.testing.assert_close(a, b)


def test_orthogonalised_matrices_have_singular_values_about_one():
    for shape in ((7, 40), (40, 7)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(5, *shape)).float())
        assert values.shape == (5, 7)
        assert 0.5 < values.min() <= values.max() < 1.5
