"""Patching: what is put in is what comes out, and attribution is its derivative."""

import pytest
import torch

from melprobe.analysis.study import clip_bytes
from melprobe.errors import UsageError
from melprobe.hooks.maps import ResidualMap
from melprobe.hooks.patching import patch
from melprobe.model.memory import peak_bytes
from tests.tiny import N_LAYERS, TEXTS, log_probs, tiny_listener, waves


@pytest.fixture
def other():
    """Clips as long as `clips`, that sound otherwise."""
    return [wave[::-1].copy() for wave in waves(0.8, 0.5, 0.3)]


@pytest.fixture
def clips():
    return waves(0.8, 0.5, 0.3)


def test_a_run_patched_with_itself_is_the_same(lm, clips):
    plain, entering = log_probs(lm, clips), lm.entering(clips)
    with lm.patch(entering):  # which was computed without answers: rounding differs
        assert torch.allclose(log_probs(lm, clips), plain, atol=1e-5)
    assert torch.equal(log_probs(lm, clips), plain)


def test_all_of_speech_patched_at_the_bottom_is_the_other_run(lm, clips, other):
    clean, entering = log_probs(lm, clips), lm.entering(clips)
    assert not torch.equal(log_probs(lm, other), clean)
    with lm.patch({0: entering[0]}):
        assert torch.equal(log_probs(lm, other), clean)
        assert lm.transcribe(other, 12) == lm.transcribe(clips, 12)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_patch_is_the_loop_over_blocks_with_it_put_in(lm, clips, other, layer):
    """What blocks below made of the other clip stays in their keys and values."""
    entering, model = lm.entering(clips), lm.model
    batch = lm.processor(other, TEXTS)
    speech = batch["input_ids"] == lm.processor.audio_token_id
    calls = []
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, args, kwargs)), with_kwargs=True
        )
        for block in model.get_decoder().layers
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    hidden = calls[0][1][0] if calls[0][1] else calls[0][2]["hidden_states"]
    with torch.no_grad():
        for number, (block, args, kwargs) in enumerate(calls):
            if number == layer:
                hidden = hidden.clone()
                hidden[speech] = torch.cat(entering[layer])
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            hidden = block(hidden, *args[1:], **rest)
        logits = model.get_output_embeddings()(model.get_decoder().norm(hidden))
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    expected = logits[targets != -100].log_softmax(-1)
    with lm.patch({layer: entering[layer]}):
        assert torch.allclose(log_probs(lm, other), expected, atol=1e-5)


def test_replay_under_a_patch_is_generate_under_it(lm, clips, other):
    entering = lm.entering(clips)
    replay = lm.replay(other, TEXTS, 12)
    for layer in range(N_LAYERS):
        with lm.patch({layer: entering[layer]}):
            heard = replay.hear(layer)
            assert lm.processor.batch_decode(heard.answers) == lm.transcribe(other, 12)
            assert torch.allclose(heard.nll, lm.score(other, TEXTS).nll, atol=1e-4)


def test_attribution_is_the_derivative_of_patching(clips, other):
    lm = tiny_listener()
    lm.model.double()
    estimate = lm.attribution(clips, other, TEXTS)
    assert estimate.shape == (N_LAYERS, 3)
    clean, corrupted = lm.entering(clips), lm.entering(other)
    plain, step = lm.score(other, TEXTS).nll, 1e-3
    for layer in range(N_LAYERS):
        there = [a + step * (b - a) for a, b in zip(corrupted[layer], clean[layer], strict=True)]
        back = [a - step * (b - a) for a, b in zip(corrupted[layer], clean[layer], strict=True)]
        with lm.patch({layer: there}):
            ahead = lm.score(other, TEXTS).nll
        with lm.patch({layer: back}):
            behind = lm.score(other, TEXTS).nll
        assert torch.allclose((ahead - behind) / (2 * step), estimate[layer], rtol=2e-2, atol=1e-3)
    assert torch.equal(lm.score(other, TEXTS).nll, plain)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_a_part_of_the_clip_can_be_patched(lm, clips, other):
    where = "speech:0.2-0.4"
    entering = lm.entering(clips, where)
    assert [len(row) for row in entering[0]] == [3, 3, 2]
    with lm.patch({1: entering[1]}, where):
        some = log_probs(lm, other)
    with lm.patch({1: lm.entering(clips)[1]}):
        assert not torch.equal(log_probs(lm, other), some)
    assert not torch.equal(log_probs(lm, other), some)


def test_what_cannot_be_patched_is_said(lm, clips):
    entering = lm.entering(clips)
    with (
        pytest.raises(UsageError, match="two runs answer with other words"),
        lm.patch(entering, "text"),
    ):
        pass
    with (
        pytest.raises(UsageError, match="layers 9: this model has blocks 0 to 3"),
        lm.patch({9: entering[0]}),
    ):
        pass
    longer = waves(0.9, 0.5, 0.3)
    with lm.patch(entering), pytest.raises(UsageError, match="positions there: give clips as long"):
        log_probs(lm, longer)
    with pytest.raises(ZeroDivisionError), patch(lm.model, entering):
        raise ZeroDivisionError
    for block in lm.model.get_decoder().layers:
        assert not block._forward_pre_hooks


def test_another_model_is_patched_in_through_a_fitted_map(clips, other):
    """Planted: the other model's residual is this one's, turned and moved."""
    lm = tiny_listener()
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))

    def elsewhere(rows):
        return [row @ turn + 0.7 for row in rows]

    fitted_on = lm.entering(waves(3.0, 2.5, 2.0, seed=5))
    fitted = ResidualMap(elsewhere(fitted_on[2]), fitted_on[2], ridge=1e-6)
    assert fitted.r2 > 0.999999
    entering = lm.entering(clips)[2]
    with lm.patch({2: fitted(elsewhere(entering))}):
        through_map = log_probs(lm, other)
    with lm.patch({2: entering}):
        assert torch.allclose(log_probs(lm, other), through_map, atol=1e-3)
    with lm.patch({2: elsewhere(entering)}):
        assert not torch.allclose(log_probs(lm, other), through_map, atol=0.1)


def test_a_map_needs_the_same_positions_and_enough_of_them(lm, clips):
    rows = lm.entering(clips)[1]
    with pytest.raises(UsageError, match="a map needs one for one"):
        ResidualMap(rows, [row[1:] for row in rows])
    with pytest.raises(UsageError, match="positions for a map from 32 dimensions"):
        ResidualMap(rows, rows)


def test_the_memory_of_attribution_is_counted(lm):
    """Of what a study holds and of the graph that the backward pass needs."""
    clips, texts = waves(2.0, 2.0, 2.0, 2.0), ["please hold the number three"] * 4
    weights = sum(p.nbytes for p in (*lm.model.parameters(), *lm.model.buffers()))
    taken = peak_bytes(lm.model, lambda: lm.attribution(clips, clips[::-1], texts)) - weights
    counted = sum(clip_bytes(lm, clip, texts[0], 0, gradients=True) for clip in clips)
    without = sum(clip_bytes(lm, clip, texts[0], 0) for clip in clips)
    assert without < taken  # or there would be nothing to count
    assert 0.5 < taken / counted < 1.2
