"""LoRA switched off block by block gives the base model's blocks, and comes back."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

import melprobe
from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from tests.tiny import N_LAYERS, tiny_checkpoint, waves

TEXTS = ["please hold", "the new number three"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("lora")
    tiny_checkpoint(place)
    return place / "model"


def loaded(folder):
    return melprobe.load(folder, device="cpu", dtype=torch.float32, merge=False)


def logits(lm):
    return lm.score(waves(0.9, 0.6), TEXTS).logits


@pytest.mark.parametrize("layers", [{0}, {1, 3}, set(range(N_LAYERS))])
def test_a_block_without_lora_is_the_bases(folder, layers):
    lm, other = loaded(folder), loaded(folder)
    for layer in layers:
        for module in decoder_blocks(other.model)[layer].modules():
            if isinstance(module, LoraLayer):
                module.lora_B["default"].weight.data.zero_()
    plain, trained = logits(lm), [p.requires_grad for p in lm.model.parameters()]
    with lm.without_lora(layers):
        assert torch.equal(logits(lm), logits(other))
        assert not torch.allclose(logits(lm), plain, atol=1e-3)
    assert torch.equal(logits(lm), plain)
    assert [p.requires_grad for p in lm.model.parameters()] == trained


def test_contexts_nest_and_exceptions_restore(folder):
    lm = loaded(folder)
    plain = logits(lm)
    with lm.without_lora({0, 1}):
        both = logits(lm)
        with lm.without_lora({1}):
            assert torch.equal(logits(lm), both)
        assert torch.equal(logits(lm), both)
    with pytest.raises(KeyError), lm.without_lora({0}):
        raise KeyError
    assert torch.equal(logits(lm), plain)


def test_lora_that_was_folded_in_cannot_be_switched_off(folder):
    folded = melprobe.load(folder, device="cpu", dtype=torch.float32)
    assert torch.allclose(logits(folded), logits(loaded(folder)), atol=1e-4)
    with pytest.raises(UsageError, match=r"block 2 has no LoRA.*merge=False"):
        folded.without_lora({2}).__enter__()
