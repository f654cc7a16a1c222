"""The online code: its blocks, and its length where that is known."""

import math

import numpy as np
import pytest
import torch

from melprobe.probing.mdl import BLOCKS, block_of_clips, online_code
from melprobe.probing.ridge import Target

N, D, K = 3200, 8, 4


def clips_and_rows(clips=64):
    return np.repeat(np.arange(clips), N // clips), torch.ones(N, dtype=torch.bool)


def test_blocks_double_and_split_no_clip():
    utterance, rows = clips_and_rows()
    rows[:100] = False
    block = block_of_clips(utterance, rows, 0)
    assert (block[:100] == -1).all() and (block[100:] >= 0).all()
    sizes = block[100:].bincount().double() / 3100
    expected = torch.tensor([1, 1, 2, 4, 8, 16]).double() / 32
    torch.testing.assert_close(sizes, expected, rtol=0, atol=0.03)
    for clip in range(2, 64):
        assert len(set(block[utterance == clip].tolist())) == 1
    assert not torch.equal(block, block_of_clips(utterance, rows, 1))


def test_few_clips_leave_no_block_empty_and_fewer_are_refused():
    utterance, rows = clips_and_rows(8)
    assert set(block_of_clips(utterance, rows, 0).tolist()) == set(range(BLOCKS))
    with pytest.raises(ValueError, match="4 clips make no 6 blocks"):
        block_of_clips(*clips_and_rows(4), 0)


def code(x, y, penalty=1e-2):
    utterance, rows = clips_and_rows()
    block = block_of_clips(utterance, rows, 0)
    return block, online_code(
        [lambda layer=layer: layer.split(700) for layer in x],
        Target(y, K),
        block,
        torch.full((len(x),), penalty),
    )


def test_what_is_there_costs_few_bits_and_what_is_not_costs_them_all():
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, K, (N,), generator=rng)
    noise = torch.randn(N, D, generator=rng)
    plain = noise.clone()
    plain[:, :K] += 8 * torch.eye(K)[y]
    block, bits = code([noise, plain], y)
    assert bits.shape == (2, N)
    known = bits[:, block == 0]
    assert (known == math.log2(K)).all()
    later = bits[:, block > 0].mean(1)
    assert later[0] == pytest.approx(math.log2(K), abs=0.1) and later[1] < 0.15


def test_a_label_that_is_not_even_has_its_entropy():
    rng = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.7, 0.1, 0.1, 0.1])
    y = shares.multinomial(N, replacement=True, generator=rng)
    block, bits = code([torch.randn(N, D, generator=rng)], y, 10.0)
    entropy = -(shares * shares.log2()).sum().item()
    assert bits[:, block > 1].mean() == pytest.approx(entropy, abs=0.05)
