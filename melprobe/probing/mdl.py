"""Minimum description length of a label given a layer, by the online code.

Voita & Titov 2020 (arXiv 2003.12298): the labels of a first block of rows are sent as they are,
log2 K bits each; a probe trained on all blocks so far then codes the next, which is twice as large.
It tells how easily a label is read, not only how well in the end: the fewer bits, the better.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from melprobe.probing.logistic import batches_of, held, log_chances, solve, standardised, standards
from melprobe.probing.ridge import Pieces, Target

BLOCKS = 6
"""The first is a 32nd of the rows, as the second, and each later one twice the one before."""


def block_of_clips(utterance: NDArray[np.int64], rows: Tensor, seed: int) -> Tensor:
    """The block (N,) of each of the chosen rows, -1 for others: clips are never in two blocks.

    utterance (N,): each row's; clips come in chance's order. Raises ValueError with fewer clips
    than blocks.
    """
    chosen = rows.numpy()
    clips = np.random.default_rng(seed).permutation(np.unique(utterance[chosen]))
    if len(clips) < BLOCKS:
        raise ValueError(f"{len(clips)} clips make no {BLOCKS} blocks")
    sizes = np.bincount(utterance[chosen], minlength=utterance.max() + 1)[clips]
    reached = np.cumsum(sizes) / sizes.sum()
    ends = 2.0 ** np.arange(1 - BLOCKS, 1)
    place = np.minimum(np.searchsorted(ends, reached - 1e-9), BLOCKS - 1)
    # Clips that are longer than a block would leave it empty.
    place[:BLOCKS] = np.minimum(place[:BLOCKS], np.arange(BLOCKS))
    block = np.full(utterance.max() + 1, -1)
    block[clips] = place
    return torch.from_numpy(np.where(chosen, block[utterance], -1))


def online_code(
    layers: Sequence[Pieces], target: Target, block: Tensor, penalties: Tensor
) -> Tensor:
    """Bits (L, n) that the label of each row that is in a block costs, given each layer.

    block (N,) as `block_of_clips` makes it; penalties (L,) of the probes.
    """
    bits = torch.zeros(len(layers), len(block))
    bits[:, block == 0] = math.log2(target.n_classes)
    weights: Tensor | None = None
    for number in range(1, int(block.max()) + 1):
        seen, coming = (block >= 0) & (block < number), block == number
        mean, scale, correlation = standards(batches_of(layers, target, seen))
        if weights is None:
            weights = mean.new_zeros(len(layers), mean.shape[2] + 1, target.n_classes)
        batches = held(standardised(batches_of(layers, target, seen), mean, scale))
        strengths = penalties.to(mean.device)
        weights = solve(batches, weights, strengths, int(seen.sum()), correlation)
        cost = [
            -log_chances(weights, x).gather(2, y.expand(len(x), -1)[..., None])[..., 0]
            for x, y in standardised(batches_of(layers, target, coming), mean, scale)()
        ]
        bits[:, coming] = torch.cat(cost, 1).cpu() / math.log(2)
    return bits[:, block >= 0]
