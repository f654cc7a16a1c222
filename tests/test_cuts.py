"""Knock-out and bypass: what hiding positions from the others must satisfy. Skips: test_skip.py."""

import pytest
import torch

from melprobe.audio.patches import patch_middle
from melprobe.errors import UsageError
from melprobe.hooks.anatomy import anatomy
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.positions import Kind, position_kinds, selected
from tests.tiny import N_LAYERS, TEXTS, tiny_listener

EVERY_BLOCK = range(N_LAYERS)


def cut_by_hand(lm, inputs, layer, positions, *, process, readers=None, beyond=0.0):
    """Logits of the answer from a plain loop over blocks, with one mask written out in full."""
    decoder, grabbed = lm.model.get_decoder(), {}

    def grab(module, args, kwargs):
        grabbed.update(hidden=args[0], rest=kwargs)

    handle = decoder.layers[0].register_forward_pre_hook(grab, with_kwargs=True)
    lm.model(**inputs)
    handle.remove()
    kinds = position_kinds(
        inputs["input_ids"], lm.processor.audio_token_id, inputs["attention_mask"], inputs["labels"]
    )
    cut = selected(kinds, positions, anatomy(lm.model))
    reads = ~cut if readers is None else selected(kinds, readers, anatomy(lm.model))
    rows, width = cut.shape
    first = [row.index(Kind.SPEECH) for row in kinds.tolist()]
    allowed = torch.zeros(rows, 1, width, width, dtype=torch.bool)
    for row in range(rows):
        for query in range(width):
            for key in range(query + 1):
                hidden = cut[row, key] and reads[row, query] and key != query
                if beyond:
                    when = [patch_middle(place - first[row], 8) for place in (key, query)]
                    hidden = hidden and when[1] - when[0] > beyond
                present = inputs["attention_mask"][row, key] or key == query
                allowed[row, 0, query, key] = bool(present) and not hidden
    hidden = grabbed["hidden"]
    for number, block in enumerate(decoder.layers):
        if number != layer:
            hidden = block(hidden, **grabbed["rest"])
            continue
        output = block(hidden, **(grabbed["rest"] | {"attention_mask": allowed}))
        hidden = output if process else torch.where(cut[..., None], hidden, output)
    logits = lm.model.get_output_embeddings()(decoder.norm(hidden))
    return logits[:, :-1][inputs["labels"][:, 1:] != -100]


@pytest.mark.parametrize("positions", ["bos", "prompt", "speech", "answer", "text"])
@pytest.mark.parametrize("layer", [0, 2, N_LAYERS - 1])
def test_cuts_equal_a_loop_over_blocks_with_the_mask_written_out(lm, clips, layer, positions):
    inputs = lm.processor(clips, TEXTS)
    plain = lm.model(**inputs).logits
    for name, process in (("knock_out", True), ("bypass", False)):
        expected = cut_by_hand(lm, inputs, layer, positions, process=process)
        with getattr(lm, name)({layer}, positions):
            found = lm.model(**inputs).logits
        assert torch.allclose(found, expected, atol=1e-5)
        # Here nothing but the answer itself comes after prompt and answer.
        nobody_reads = process and positions in {"answer", "text"}
        assert torch.allclose(found, plain, atol=1e-4) == nobody_reads
    assert torch.equal(lm.model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("positions", "readers", "beyond"),
    [
        ("speech", "text", 0.0),
        ("speech", "answer", 0.0),
        ("speech", "speech", 0.0),
        ("speech", "speech", 0.25),
        ("bos", "speech", 0.0),
        ("text", "text", 0.0),
        ("all", "all", 0.0),
        ("speech:0.2-0.5", "speech:0.4-1", 0.0),
    ],
)
def test_positions_can_be_hidden_from_some_readers_only(lm, clips, positions, readers, beyond):
    inputs = lm.processor(clips, TEXTS)
    plain = lm.model(**inputs).logits
    how = {"readers": readers, "beyond": beyond}
    expected = cut_by_hand(lm, inputs, 1, positions, process=True, **how)
    with lm.knock_out({1}, positions, readers, beyond):
        found = lm.model(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-4)


@pytest.mark.parametrize("patches", [1, 3, 5])
def test_beyond_leaves_what_is_exactly_so_far(lm, clips, patches):
    """Whatever float32 makes of the difference of two times."""
    inputs = lm.processor(clips, TEXTS)
    found = []
    for beyond in (0.08 * patches, 0.08 * patches + 0.03):
        with lm.knock_out({1}, "speech", "speech", beyond):
            found.append(lm.model(**inputs).logits)
    assert torch.equal(*found)


def test_speech_hidden_from_text_is_hidden_from_all_others(lm, clips):
    """What stands before it can't read it."""
    with lm.knock_out({1, 2}):
        expected = lm.score(clips, TEXTS).log_probs
    with lm.knock_out({1, 2}, "speech", "text"):
        assert torch.allclose(lm.score(clips, TEXTS).log_probs, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["knock_out", "bypass"])
def test_a_model_that_reads_speech_nowhere_is_deaf(lm, clips, name):
    other = [wave[::-1].copy() for wave in clips]
    assert not torch.equal(lm.score(clips, TEXTS).log_probs, lm.score(other, TEXTS).log_probs)
    with getattr(lm, name)(EVERY_BLOCK, "speech"):
        assert torch.equal(lm.score(clips, TEXTS).log_probs, lm.score(other, TEXTS).log_probs)
        assert lm.transcribe(clips) == lm.transcribe(other)


def test_the_last_blocks_reading_is_no_zero_by_construction(lm, clips):
    plain = lm.score(clips, TEXTS).log_probs
    for name in ("knock_out", "bypass"):
        with getattr(lm, name)({N_LAYERS - 1}, "speech"):
            assert not torch.allclose(lm.score(clips, TEXTS).log_probs, plain, atol=1e-4)


def test_where_no_other_position_is_left_nothing_is_hidden(lm, clips):
    plain = lm.score(clips, TEXTS).log_probs
    with lm.knock_out({1}, "all"):
        assert torch.allclose(lm.score(clips, TEXTS).log_probs, plain, atol=1e-5)
    with lm.skip({1}, "all"):
        skipped = lm.score(clips, TEXTS).log_probs
    with lm.bypass({1}, "all"):
        assert torch.allclose(lm.score(clips, TEXTS).log_probs, skipped, atol=1e-5)


def test_a_bypass_is_a_skip_and_a_knock_out_together(lm, clips):
    with lm.bypass({1, 2}):
        whole = lm.score(clips, TEXTS).log_probs
    with lm.skip({1, 2}), lm.knock_out({1, 2}):
        assert torch.equal(lm.score(clips, TEXTS).log_probs, whole)


@pytest.mark.parametrize("positions", ["bos", "speech", "prompt"])
@pytest.mark.parametrize("name", ["knock_out", "bypass"])
def test_cached_decoding_equals_uncached(lm, clips, name, positions):
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    inputs = lm.processor(clips)
    with getattr(lm, name)({0, 2}, positions):
        cached = lm.model.generate(**inputs, **options)
        if positions != "prompt":  # not to be told from the answer without a cache
            assert torch.equal(cached, lm.model.generate(**inputs, use_cache=False, **options))
        static = lm.model.generate(**inputs, cache_implementation="static", **options)
        assert torch.equal(cached, static)
    assert not torch.equal(cached, lm.model.generate(**inputs, **options))


@pytest.mark.parametrize(("readers", "beyond"), [("text", 0.0), ("speech", 0.3)])
def test_cached_decoding_with_some_readers_equals_uncached(lm, clips, readers, beyond):
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    inputs = lm.processor(clips)
    with lm.knock_out({0, 2}, "speech", readers, beyond):
        cached = lm.model.generate(**inputs, **options)
        assert torch.equal(cached, lm.model.generate(**inputs, use_cache=False, **options))
    assert not torch.equal(cached, lm.model.generate(**inputs, **options))


def test_a_clip_alone_is_cut_as_in_a_padded_batch(lm, clips):
    """Alone it needs no padding, and the model gets no mask at all."""
    with lm.knock_out({1}):
        together = lm.score(clips, TEXTS).nll
        alone = [lm.score([c], [t]).nll[0] for c, t in zip(clips, TEXTS, strict=True)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)


def test_masks_that_are_added_hide_as_masks_that_allow(lm, clips):
    other = tiny_listener()
    other.model.set_attn_implementation("eager")
    with lm.knock_out({1, 3}), other.knock_out({1, 3}):
        ours, theirs = lm.score(clips, TEXTS).log_probs, other.score(clips, TEXTS).log_probs
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_attention_without_masks_is_refused(lm, monkeypatch):
    monkeypatch.setattr(lm.model.get_decoder().config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(UsageError, match="'flash_attention_2' can't hide positions"):
        lm.knock_out({1}).__enter__()
    with lm.skip({1}):  # needs none
        pass


def test_a_cache_from_before_the_intervention_is_refused(lm, clips):
    inputs = lm.processor(clips)
    start = lm.model(**inputs, use_cache=True)
    token = start.logits[:, -1:].argmax(-1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    with lm.knock_out({1}), pytest.raises(ValueError, match="before the intervention began"):
        lm.model(input_ids=token, attention_mask=mask, past_key_values=start.past_key_values)


def test_exceptions_restore_the_model(lm):
    with pytest.raises(KeyError), lm.bypass({1, 2}):
        raise KeyError
    for block in decoder_blocks(lm.model):
        assert not block._forward_hooks and not block._forward_pre_hooks


def test_times_choose_the_patches_that_sound_then(lm, clips):
    inputs = lm.processor(clips)
    kinds = position_kinds(
        inputs["input_ids"], lm.processor.audio_token_id, inputs["attention_mask"]
    )
    speech, early, late = (
        selected(kinds, positions, anatomy(lm.model))
        for positions in ("speech", "speech:0-0.4", "speech:0.4-1000000")
    )
    assert torch.equal(early | late, speech) and not (early & late).any()
    # Patches last 80 ms and the first begins at 7.5 ms, so that the fifth's middle is at 367.5.
    assert early.sum(1).tolist() == [5, 5, 5]
    for row in range(3):
        assert late[row].nonzero().min() > early[row].nonzero().max()
    whole = lm.score(clips, TEXTS).log_probs
    with lm.skip({1}, "speech:0-0.4"), lm.skip({1}, "speech:0.4-9"):
        apart = lm.score(clips, TEXTS).log_probs
    with lm.skip({1}, "speech:0-0.4"):
        assert not torch.equal(lm.score(clips, TEXTS).log_probs, whole)
    with lm.skip({1}, "speech"):
        assert torch.equal(lm.score(clips, TEXTS).log_probs, apart)


@pytest.mark.parametrize(
    "positions", ["vowels", "text:0-1", "speech:", "speech:1-0", "speech:a-b", "speech:0-inf"]
)
def test_positions_that_make_no_sense_are_refused(lm, positions):
    with pytest.raises(UsageError, match="positions '"):
        lm.skip({1}, positions).__enter__()
