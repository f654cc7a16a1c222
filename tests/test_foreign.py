"""Other people's speech LLMs, and a plain one: cuts equal a loop over their blocks by hand, to 0.

All on random weights of each class's own kind; no real ones were at hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from melprobe.errors import UsageError
from melprobe.hooks.anatomy import anatomy
from melprobe.hooks.cuts import bypass, knock_out, skip, watch_blocks
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.positions import position_kinds, selected
from tests.foreign import FOREIGN, N_LAYERS, SPEECH, positions_of, prompts
from tests.tiny import waves

HEARING = [name for name in FOREIGN if name != "llama"]


@pytest.fixture(scope="module", params=FOREIGN)
def foreign(request):
    """A model, its prompts, and where it is cut."""
    torch.manual_seed(0)
    model = FOREIGN[request.param].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # most begin too small to tell apart
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.generation_config.eos_token_id = None  # random weights end at once, or never
    inputs = prompts(request.param, waves(0.9, 0.5))
    return model, inputs, "text" if request.param == "llama" else "speech"


@contextmanager
def noting(model) -> Iterator[list]:
    """What each block of the running pass is given, in order."""
    calls, handles = [], []
    for block in decoder_blocks(model):
        handle = block.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, args, kwargs)), with_kwargs=True
        )
        handles.append(handle)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def by_hand(model, inputs, skipped, where):
    """Final residuals (B, S, D) when blocks leave `where` (B, S) as it was."""
    with noting(model) as calls:
        model(**inputs, position_ids=positions_of(inputs), use_cache=False)
    hidden = calls[0][1][0] if calls[0][1] else calls[0][2]["hidden_states"]
    for layer, (block, args, kwargs) in enumerate(calls):
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        new = block(hidden, *args[1:], **rest)
        hidden = torch.where(where[..., None], hidden, new) if layer in skipped else new
    return model.get_decoder().norm(hidden)


@torch.no_grad()
def final(model, inputs):
    """Final residuals (B, S, D) of a pass under whatever hooks are active."""
    seen = []
    handle = model.get_decoder().norm.register_forward_hook(
        lambda m, a, output: seen.append(output)
    )
    try:
        model(**inputs, position_ids=positions_of(inputs), use_cache=False, labels=None)
    finally:
        handle.remove()
    return seen[0]


def places(model, inputs, positions):
    kinds = position_kinds(
        inputs["input_ids"], anatomy(model).audio_token_id, inputs["attention_mask"]
    )
    return selected(kinds, positions, anatomy(model))


@pytest.mark.parametrize("layers", [{0}, {1, 2}, {N_LAYERS - 1}, set(range(N_LAYERS))])
def test_a_skip_is_the_loop_by_hand(foreign, layers):
    model, inputs, positions = foreign
    expected = by_hand(model, inputs, layers, places(model, inputs, positions))
    plain = final(model, inputs)
    with skip(model, layers, positions):
        assert torch.equal(final(model, inputs), expected)
    assert not torch.equal(plain, expected)
    assert torch.equal(final(model, inputs), plain)


@torch.no_grad()
def hidden_by_hand(model, inputs, layers, where, *, process):
    """Final residuals when other positions of these blocks don't see `where` (B, S)."""
    unread = where[:, None, None, :] & ~where[:, None, :, None]
    with noting(model) as calls:
        model(**inputs, position_ids=positions_of(inputs), use_cache=False)
    hidden = calls[0][1][0] if calls[0][1] else calls[0][2]["hidden_states"]
    width = hidden.shape[1]
    for layer, (block, args, kwargs) in enumerate(calls):
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        if layer in layers:
            mask = rest["attention_mask"]
            if mask is None:
                mask = torch.ones(width, width, dtype=torch.bool).tril()[None, None]
            rest["attention_mask"] = mask & ~unread
        new = block(hidden, *args[1:], **rest)
        hidden = (
            torch.where(where[..., None], hidden, new) if layer in layers and not process else new
        )
    return model.get_decoder().norm(hidden)


@pytest.mark.parametrize(("cut", "process"), [(bypass, False), (knock_out, True)])
def test_hiding_is_the_loop_by_hand(foreign, cut, process):
    model, inputs, positions = foreign
    expected = hidden_by_hand(
        model, inputs, {0, 2}, places(model, inputs, positions), process=process
    )
    with cut(model, {0, 2}, positions):
        assert torch.equal(final(model, inputs), expected)


@pytest.mark.parametrize("cut", [skip, bypass])
def test_generate_decodes_what_whole_passes_would(foreign, cut):
    model, inputs, positions = foreign
    n_new, written, options = 6, inputs, {"do_sample": False, "suppress_tokens": [SPEECH]}
    with cut(model, {0, 1, 2}, positions):
        output = model.generate(**inputs, max_new_tokens=n_new, **options)
        for _ in range(n_new):
            with torch.no_grad():
                hidden = final(model, written)
                logits = model.get_output_embeddings()(hidden[:, -1:])
                logits[..., SPEECH] = -torch.inf  # it would stand for audio that isn't there
                tokens = logits.argmax(-1)
            ids = torch.cat([written["input_ids"], tokens], 1)
            mask = torch.cat([written["attention_mask"], torch.ones_like(tokens)], 1)
            written = {**written, "input_ids": ids, "attention_mask": mask}
    assert torch.equal(output, written["input_ids"])
    plain = model.generate(**inputs, max_new_tokens=n_new, **options)
    assert not torch.equal(output, plain)


def test_the_loss_is_that_of_the_answer_alone(foreign):
    model, inputs, _ = foreign
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with torch.no_grad(), skip(model, {1}, "answer"):
        loss = model(**inputs, labels=labels).loss
    with torch.no_grad(), skip(model, {1}, "bos"):
        assert loss.isfinite() and loss != model(**inputs, labels=labels).loss


def test_blocks_are_watched(foreign):
    model, inputs, positions = foreign
    with torch.no_grad(), watch_blocks(model, positions) as change, skip(model, {1}, positions):
        model(**inputs)
    assert [cosine[0].shape for cosine in change.cosine] == [(2,)] * N_LAYERS
    assert change.cosine[1][0].tolist() == pytest.approx([1, 1])
    assert all((angle[0] > 0).all() for layer, angle in enumerate(change.angle) if layer != 1)


@pytest.mark.parametrize("name", HEARING)
def test_seconds_find_their_positions(name):
    model, inputs = FOREIGN[name].build(), prompts(name, waves(0.9, 0.5))
    step = anatomy(model).seconds
    early = places(model, inputs, f"speech:0-{2 * step}").sum(1)
    assert early.tolist() == [2, 2]
    whole = places(model, inputs, "speech").sum(1)
    assert torch.equal(places(model, inputs, "speech:0-60").sum(1), whole)
    # A clip of 0.9 s and the seconds that its positions stand for, but for padded windows.
    if name in {"phi4_multimodal", "gemma4_unified", "qwen2_audio", "qwen3_asr"}:
        assert whole[0] * step == pytest.approx(0.9, abs=step)


def test_a_model_that_only_reads_has_no_speech():
    with (
        pytest.raises(UsageError, match="LlamaForCausalLM hears nothing"),
        skip(FOREIGN["llama"].build(), {1}, "speech"),
    ):
        pass


def test_an_unknown_class_says_what_it_needs():
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    model = BertLMHeadModel(config)
    model.config.model_type = "my_speech_model"
    with pytest.raises(UsageError, match=r"BertLMHeadModel \(my_speech_model\) has no adapter"):
        anatomy(model)
