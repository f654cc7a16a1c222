"""Facts that skipping a block must satisfy, against rebuilt models and independent tools."""

import copy

import pytest
import torch
from torch import nn

from melprobe.hooks.anatomy import anatomy
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.positions import position_kinds, selected
from tests.tiny import N_LAYERS, TEXTS, log_probs, without_layer


def greedy_ids(lm, clips, **options):
    inputs = lm.processor(clips)
    return lm.model.generate(
        **inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12, **options
    )


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_skipping_a_block_everywhere_equals_the_model_without_it(lm, clips, layer):
    smaller = without_layer(lm, layer)
    with lm.skip({layer}, positions="all"):
        assert torch.equal(log_probs(lm, clips), log_probs(smaller, clips))
        assert torch.equal(greedy_ids(lm, clips), greedy_ids(smaller, clips))


def test_the_empty_skip_is_the_baseline_bit_for_bit(lm, clips):
    plain = log_probs(lm, clips)
    with lm.skip(set(), positions="all"):
        assert torch.equal(log_probs(lm, clips), plain)


@pytest.mark.parametrize("positions", ["bos", "prompt", "speech", "answer", "text", "all"])
def test_a_skip_changes_the_positions_of_its_kind_and_no_others(lm, clips, positions):
    inputs = lm.processor(clips, TEXTS)
    kinds = position_kinds(
        inputs["input_ids"], lm.processor.audio_token_id, inputs["attention_mask"], inputs["labels"]
    )
    where, plain = selected(kinds, positions, anatomy(lm.model)), log_probs(lm, clips)
    before, after = first_block(lm, inputs)
    with lm.skip({0}, positions):
        skipped = first_block(lm, inputs)
        assert not torch.equal(log_probs(lm, clips), plain)
    assert where.any() and torch.equal((skipped[1] != after).any(-1), where)
    assert torch.equal(skipped[1][where], before[where])
    assert torch.equal(log_probs(lm, clips), plain)


def first_block(lm, inputs):
    """What goes into block 0 and what comes out."""
    seen = []
    block = decoder_blocks(lm.model)[0]
    handle = block.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    lm.model(**inputs)
    handle.remove()
    return seen


@pytest.mark.parametrize("positions", ["speech", "all"])
def test_what_stands_in_the_padding_before_a_prompt_changes_nothing(lm, clips, positions):
    inputs = lm.processor(clips)
    padding = ~inputs["attention_mask"].bool()[..., None]
    assert padding[:, 0].any() and not padding[:, -1].any()
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}

    def poison(module, args, output):
        return output.masked_fill(padding, 1e4)

    with lm.skip({1}, positions):
        plain = lm.model.generate(**inputs, do_sample=False, **options).logits
        handle = lm.model.get_input_embeddings().register_forward_hook(poison)
        poisoned = lm.model.generate(**inputs, do_sample=False, **options).logits
        handle.remove()
    assert torch.equal(torch.stack(poisoned), torch.stack(plain))


def test_an_exception_restores_the_model(lm, clips):
    plain = log_probs(lm, clips)
    with pytest.raises(KeyError), lm.skip({1, 2}):
        raise KeyError
    assert torch.equal(log_probs(lm, clips), plain)
    assert not lm.model._forward_pre_hooks
    assert not any(block._forward_hooks for block in decoder_blocks(lm.model))


@pytest.mark.parametrize("positions", ["bos", "speech", "text", "all"])
@pytest.mark.parametrize("layers", [{0}, {1, 3}])
def test_cached_decoding_equals_uncached_under_skipping(lm, clips, positions, layers):
    with lm.skip(layers, positions):
        cached = greedy_ids(lm, clips)
        assert torch.equal(cached, greedy_ids(lm, clips, use_cache=False))
        assert torch.equal(cached, greedy_ids(lm, clips, cache_implementation="static"))


@pytest.mark.parametrize("positions", ["answer", "prompt"])
def test_answers_that_cannot_be_told_from_the_prompt_are_refused(lm, clips, positions):
    with lm.skip({1}, positions):
        cached = greedy_ids(lm, clips)
        with pytest.raises(ValueError, match=f"'{positions}': without a cache, prompt and answer"):
            greedy_ids(lm, clips, use_cache=False)
        assert torch.equal(greedy_ids(lm, clips), cached)
        lm.model(**lm.processor(clips, TEXTS), use_cache=False)  # labels tell them apart


def test_cached_decoding_equals_teacher_forcing_under_skipping(lm, clips):
    """The kinds that decoding infers step by step are those that labels spell out."""
    inputs = lm.processor(clips)
    with lm.skip({1}, positions="text"):
        ids = greedy_ids(lm, clips)
        n_prompt = inputs["input_ids"].shape[1]
        labels = torch.full_like(ids, -100)
        labels[:, n_prompt:] = ids[:, n_prompt:]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, n_prompt:])], 1)
        features = {k: v for k, v in inputs.items() if "feature" in k}
        forced = lm.model(input_ids=ids, attention_mask=mask, labels=labels, **features).logits
    assert torch.equal(forced.argmax(-1), ids[:, n_prompt:].flatten())


def test_what_the_last_block_writes_at_speech_positions_is_read_by_nobody(lm, clips):
    plain = log_probs(lm, clips)
    with lm.skip({N_LAYERS - 1}, positions="speech"):
        assert torch.equal(log_probs(lm, clips), plain)


def test_a_planted_identity_block_costs_exactly_nothing(lm, clips):
    planted = copy.deepcopy(lm.model)
    block = decoder_blocks(planted)[2]
    nn.init.zeros_(block.self_attn.o_proj.weight)
    nn.init.zeros_(block.mlp.down_proj.weight)
    planted = type(lm)(planted, lm.processor)
    plain = log_probs(planted, clips)
    for positions in ("speech", "text", "all"):
        with planted.skip({2}, positions):
            assert torch.equal(log_probs(planted, clips), plain)


def test_nested_skips_add_up(lm, clips):
    with lm.skip({1}), lm.skip({2}):
        nested = log_probs(lm, clips)
    with lm.skip({1, 2}):
        assert torch.equal(log_probs(lm, clips), nested)


def test_a_skipped_position_is_still_read_through_its_unchanged_input(lm, clips):
    """By hand: run blocks in a loop, and put h_l back at speech positions after block 1."""
    inputs = lm.processor(clips, TEXTS)
    decoder = lm.model.get_decoder()
    kinds = position_kinds(
        inputs["input_ids"], lm.processor.audio_token_id, inputs["attention_mask"], inputs["labels"]
    )
    speech = selected(kinds, "speech", anatomy(lm.model))[..., None]
    grabbed = {}

    def grab(module, args, kwargs):
        grabbed.setdefault("hidden", args[0])
        grabbed.setdefault("kwargs", kwargs)

    handle = decoder.layers[0].register_forward_pre_hook(grab, with_kwargs=True)
    lm.model(**inputs)
    handle.remove()
    hidden = grabbed["hidden"]
    for number, block in enumerate(decoder.layers):
        output = block(hidden, **grabbed["kwargs"])
        hidden = torch.where(speech, hidden, output) if number == 1 else output
    expected = lm.model.get_output_embeddings()(decoder.norm(hidden))
    targets = inputs["labels"][:, 1:] != -100
    with lm.skip({1}):
        assert torch.equal(lm.model(**inputs).logits, expected[:, :-1][targets])


def test_skip_equals_nnsights_to_zero(lm, clips):
    nnsight = pytest.importorskip("nnsight")
    inputs = lm.processor(clips, TEXTS)
    kinds = position_kinds(
        inputs["input_ids"], lm.processor.audio_token_id, inputs["attention_mask"], inputs["labels"]
    )
    speech = selected(kinds, "speech", anatomy(lm.model))[..., None]
    other = nnsight.NNsight(copy.deepcopy(lm.model))
    with other.trace(**inputs):
        block = other.language_model.model.layers[1]
        before = block.input
        block.output = torch.where(speech, before, block.output)
        theirs = other.output.logits.save()
    with lm.skip({1}):
        assert torch.equal(lm.model(**inputs).logits, theirs)


def test_skip_equals_transformer_lens(lm, clips):
    """Through the bridge's own hook points, around a copy: the bridge rewires what it wraps."""
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    inputs = lm.processor(clips, TEXTS)
    kinds = position_kinds(
        inputs["input_ids"], lm.processor.audio_token_id, inputs["attention_mask"], inputs["labels"]
    )
    speech = selected(kinds, "speech", anatomy(lm.model))[..., None]
    other = copy.deepcopy(lm.model)
    bridge = build_bridge_from_module(
        other.language_model,
        "LlamaForCausalLM",
        hf_config=other.language_model.config,
    )
    seen = {}

    def remember(residual, hook):
        seen["before"] = residual.clone()

    def put_back(residual, hook):
        return torch.where(speech, seen["before"], residual)

    hooks = [("blocks.1.hook_in", remember), ("blocks.1.hook_out", put_back)]
    with bridge.hooks(fwd_hooks=hooks):
        theirs = other(**inputs).logits
    with lm.skip({1}):
        assert torch.allclose(lm.model(**inputs).logits, theirs, atol=1e-4)
    assert not torch.allclose(lm.model(**inputs).logits, theirs, atol=1e-2)
