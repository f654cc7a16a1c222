"""A replayed batch is what the model under the same hooks gives, for less work."""

import pytest
import torch

from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.replay import Replay
from tests.tiny import N_LAYERS, tiny_listener, waves

TEXTS = ["please hold", "the new number three", "one"]
LIMIT = 12


@pytest.fixture(scope="module")
def lm():
    return tiny_listener()


@pytest.fixture(scope="module")
def clips():
    return waves(1.0, 0.7, 1.3)


@pytest.fixture(scope="module")
def replay(lm, clips):
    return Replay(lm.model, lm.processor, clips, TEXTS, LIMIT)


def same(lm, clips, heard):
    scores = lm.score(clips, TEXTS)
    assert torch.allclose(heard.scores.nll, scores.nll, atol=1e-4)
    assert torch.equal(heard.scores.tokens, scores.tokens)
    assert torch.allclose(heard.scores.logits, scores.logits, atol=1e-4)
    assert lm.processor.batch_decode(heard.answers) == lm.transcribe(clips, LIMIT)


def test_the_intact_run_is_that_of_the_plain_model(lm, clips, replay):
    same(lm, clips, replay.intact)
    same(lm, clips, replay.hear())
    assert replay.hear(N_LAYERS).answers == replay.intact.answers


@pytest.mark.parametrize("positions", ["bos", "prompt", "speech", "answer", "text", "all"])
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_skips_reuse_all_blocks_up_to_their_own(lm, clips, replay, layer, positions):
    with lm.skip({layer}, positions):
        same(lm, clips, replay.hear(layer + 1))
    same(lm, clips, replay.hear())


@pytest.mark.parametrize("positions", ["bos", "prompt", "speech"])
@pytest.mark.parametrize("name", ["knock_out", "bypass"])
@pytest.mark.parametrize("layers", [{0}, {2}, {1, 3}, set(range(N_LAYERS))])
def test_hidden_positions_reuse_the_blocks_below(lm, clips, replay, layers, name, positions):
    with getattr(lm, name)(layers, positions):
        same(lm, clips, replay.hear(min(layers)))


def test_nothing_is_left_behind(lm, replay):
    replay.hear(2)
    for block in decoder_blocks(lm.model):
        assert "forward" not in vars(block)
        assert not block._forward_hooks and not block._forward_pre_hooks
