"""Ablated parts of blocks: what must hold whatever the weights are."""

import pytest
import torch

from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.parts import Part, ablate, parts_of, watch_means
from tests.tiny import N_LAYERS, log_probs


@pytest.mark.parametrize("positions", ["bos", "speech", "text", "all"])
@pytest.mark.parametrize("layer", [0, N_LAYERS - 1])
def test_without_attention_and_mlp_a_block_is_skipped(lm, clips, layer, positions):
    with lm.skip({layer}, positions):
        skipped, answers = log_probs(lm, clips), lm.transcribe(clips, 8)
    parts = [Part(layer, "attention"), Part(layer, "mlp")]
    with ablate(lm.model, parts, positions):
        assert torch.allclose(log_probs(lm, clips), skipped, atol=1e-5)
        assert lm.transcribe(clips, 8) == answers
    with ablate(lm.model, parts[:1], positions):
        alone = log_probs(lm, clips)
    with ablate(lm.model, parts[:1], positions), ablate(lm.model, parts[1:], positions):
        assert torch.allclose(log_probs(lm, clips), skipped, atol=1e-5)
    assert layer == N_LAYERS - 1 or not torch.allclose(alone, skipped, atol=1e-3)


def test_without_any_head_there_is_no_attention(lm, clips):
    with ablate(lm.model, parts_of(lm.model, "attention", {1})):
        expected = log_probs(lm, clips)
    heads = parts_of(lm.model, "head", {1})
    assert len(heads) == 4
    with ablate(lm.model, heads):
        assert torch.allclose(log_probs(lm, clips), expected, atol=1e-5)
    with ablate(lm.model, heads[:1]):
        assert not torch.allclose(log_probs(lm, clips), expected, atol=1e-3)


@pytest.mark.parametrize("part", [Part(1, "attention"), Part(2, "mlp"), Part(0, "head", 3)])
def test_means_are_those_of_what_was_replaced(lm, clips, part):
    """Replaced by its mean everywhere, a part has that mean and nothing else."""
    with watch_means(lm.model, [part]) as first:
        plain = log_probs(lm, clips)
    with (
        watch_means(lm.model, [part]) as second,
        ablate(lm.model, [part], values=first.values()),
    ):
        assert not torch.allclose(log_probs(lm, clips), plain, atol=1e-4)
    assert torch.allclose(first.values()[part], second.values()[part], atol=1e-5)
    assert first.values()[part].abs().max() > 1e-3


def test_a_part_that_says_the_same_everywhere_is_its_mean(lm, clips):
    mlp = decoder_blocks(lm.model)[2].mlp
    same = mlp.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    with watch_means(lm.model, [Part(2, "mlp")]) as means:
        plain = log_probs(lm, clips)
    with ablate(lm.model, [Part(2, "mlp")], values=means.values()):
        assert torch.equal(log_probs(lm, clips), plain)
    same.remove()


def test_parts_that_are_not_there_are_refused(lm):
    for part, message in (
        (Part(9, "mlp"), "layers 9: this model has blocks 0 to 3"),
        (Part(0, "head", 4), "head 4: blocks have heads 0 to 3"),
        (Part(0, "head"), "head None"),
        (Part(0, "ears"), "part 'ears': there are attention, mlp, head"),
    ):
        with pytest.raises(UsageError, match=message):
            ablate(lm.model, [part]).__enter__()
    with watch_means(lm.model, [Part(0, "mlp")]) as means, pytest.raises(UsageError, match="means"):
        means.values()


def test_nothing_is_left_behind(lm, clips):
    plain = log_probs(lm, clips)
    with pytest.raises(KeyError), ablate(lm.model, parts_of(lm.model, "head")):
        raise KeyError
    assert torch.equal(log_probs(lm, clips), plain)
