"""Ablated parts of blocks: what must hold whatever the weights are."""

import pytest
import torch

from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.parts import Part, ablate, in_place, parts_of, watch_means, watch_parts
from tests.tiny import N_LAYERS, TEXTS, log_probs


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


def prompt_patches(lm, clips):
    return lm.processor(clips)["input_ids"] == lm.processor.audio_token_id


@pytest.mark.parametrize("part", [Part(1, "attention"), Part(2, "mlp"), Part(0, "head", 3)])
def test_a_part_gives_to_a_clip_what_it_gave_to_another(lm, clips, part):
    """Written out: the k-th patch gets what the other clip's k-th patch got, and round again."""
    others = [clips[1], clips[2], clips[0]]
    inputs = lm.processor(clips, TEXTS)
    with watch_parts(lm.model, [part]) as seen:
        lm.model(**lm.processor(others))
    given = seen[part]
    where = inputs["input_ids"] == lm.processor.audio_token_id
    values = in_place(given, where)
    for row, width in enumerate(where.sum(1).tolist()):
        expected = torch.stack([given[row][k % len(given[row])] for k in range(width)])
        assert torch.equal(values[row][where[row]], expected)
    with watch_parts(lm.model, [part]) as now, ablate(lm.model, [part], values={part: values}):
        lm.model(**inputs)
    for row, got in enumerate(now[part]):
        assert torch.allclose(got, values[row][where[row]], atol=1e-6)
    with ablate(lm.model, [part], values={part: in_place(given, prompt_patches(lm, clips))}):
        assert len(lm.transcribe(clips, 8)) == len(clips)  # no such positions in decoding steps


def test_a_clip_that_hears_its_own_contributions_is_intact(lm, clips):
    parts = [*parts_of(lm.model, "attention"), *parts_of(lm.model, "mlp")]
    inputs = lm.processor(clips, TEXTS)
    with watch_parts(lm.model, parts) as seen:
        plain = lm.model(**inputs).logits
    where = inputs["input_ids"] == lm.processor.audio_token_id
    values = {part: in_place(rows, where) for part, rows in seen.items()}
    with ablate(lm.model, parts, values=values):
        assert torch.allclose(lm.model(**inputs).logits, plain, atol=1e-5)


def test_nothing_can_stand_in_for_something_only_if_it_is_there():
    with pytest.raises(ValueError, match="nothing to put"):
        in_place([torch.zeros(0, 4)], torch.ones(1, 3, dtype=torch.bool))
