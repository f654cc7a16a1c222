"""LoRA switched off block by block gives the base model's blocks, and comes back."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

import melprobe
from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.lora import without_lora
from melprobe.hooks.positions import position_kinds, selected
from tests.tiny import N_LAYERS, tiny_checkpoint, waves

TEXTS = ["please hold", "the new number three"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("lora")
    tiny_checkpoint(place)
    return place / "model"


def loaded(folder):
    return melprobe.load(folder, device="cpu", dtype=torch.float32, merge=False)


def log_probs(lm):
    return lm.score(waves(0.9, 0.6), TEXTS).log_probs


@pytest.mark.parametrize("layers", [{0}, {1, 3}, set(range(N_LAYERS))])
def test_a_block_without_lora_is_the_bases(folder, layers):
    lm, other = loaded(folder), loaded(folder)
    for layer in layers:
        for module in decoder_blocks(other.model)[layer].modules():
            if isinstance(module, LoraLayer):
                module.lora_B["default"].weight.data.zero_()
    plain, trained = log_probs(lm), [p.requires_grad for p in lm.model.parameters()]
    with lm.without_lora(layers):
        assert torch.equal(log_probs(lm), log_probs(other))
        assert not torch.allclose(log_probs(lm), plain, atol=1e-3)
    assert torch.equal(log_probs(lm), plain)
    assert [p.requires_grad for p in lm.model.parameters()] == trained


@pytest.mark.parametrize("positions", ["speech", "text", "speech:0.2-0.5"])
def test_it_goes_off_at_these_positions_only(folder, positions):
    lm, outputs = loaded(folder), []
    inputs = lm.processor(waves(0.9, 0.6), TEXTS)
    ids, audio = inputs["input_ids"], lm.processor.audio_token_id
    kinds = position_kinds(ids, audio, inputs["attention_mask"], inputs["labels"])
    where = selected(kinds, positions, lm.processor.speech)
    module = decoder_blocks(lm.model)[0].mlp.down_proj
    with torch.no_grad(), without_lora(lm.model, {0}, positions):
        # Called after the cut's own hook, which is put in front.
        handle = module.register_forward_hook(lambda *args: outputs.append(args[1:]))
        lm.model(**inputs)
        handle.remove()
    (((x,), output),) = outputs
    base = module.base_layer(x)
    assert torch.equal(output[where], base[where])
    others = ~where & inputs["attention_mask"].bool()
    assert (output[others] != base[others]).any(-1).all()


def test_contexts_nest_and_exceptions_restore(folder):
    lm = loaded(folder)
    plain = log_probs(lm)
    with lm.without_lora({0, 1}):
        both = log_probs(lm)
        with lm.without_lora({1}):
            assert torch.equal(log_probs(lm), both)
        assert torch.equal(log_probs(lm), both)
    with pytest.raises(KeyError), lm.without_lora({0}):
        raise KeyError
    assert torch.equal(log_probs(lm), plain)


def test_lora_that_was_folded_in_cannot_be_switched_off(folder):
    folded = melprobe.load(folder, device="cpu", dtype=torch.float32)
    assert torch.allclose(log_probs(folded), log_probs(loaded(folder)), atol=1e-4)
    with pytest.raises(UsageError, match=r"block 2 has no LoRA.*merge=False"):
        folded.without_lora({2}).__enter__()
