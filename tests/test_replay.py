"""A replayed batch is what the model under the same hooks gives, for less work."""

from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.replay import Replay, Variant
from melprobe.model.inference import greedy_ids, kl_per_clip
from tests.tiny import N_LAYERS, TEXTS, WORDS, tiny_listener, waves

LIMIT = 12


@pytest.fixture(scope="module")
def replay(lm, clips):
    return Replay(lm.model, lm.processor, clips, TEXTS, LIMIT)


def same(lm, clips, heard):
    scores = lm.score(clips, TEXTS)
    assert torch.allclose(heard.nll, scores.nll, atol=1e-4)
    assert torch.equal(heard.tokens, scores.tokens)
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


@pytest.mark.parametrize("seed", range(3))
def test_rounding_alone_changes_no_answer(seed):
    """In bf16 a wide pass and decoding step by step prefer different tokens now and then."""
    lm = tiny_listener(seed)
    lm.model.to(torch.bfloat16)
    clips = waves(*np.random.default_rng(0).uniform(0.3, 1.6, 40))
    replay = Replay(lm.model, lm.processor, clips, ["one"] * 40, LIMIT)
    assert (replay.preferred != replay.drafts)[replay.drafts >= 0].any()
    assert replay.hear(N_LAYERS).answers == replay.intact.answers
    with lm.skip({N_LAYERS - 1}, "speech"):
        assert replay.hear(N_LAYERS).answers == replay.intact.answers


@pytest.mark.parametrize("positions", ["speech", "text", "answer", "all"])
def test_how_blocks_turn_the_residual_is_that_of_teacher_forcing(lm, clips, replay, positions):
    with lm.watch_blocks(positions) as watched:
        lm.score(clips, TEXTS)
    for layer, (cosine, angle) in enumerate(replay.block_change(positions)):
        assert torch.allclose(cosine, watched.cosine[layer][0], atol=1e-5)
        assert torch.allclose(angle, watched.angle[layer][0], atol=1e-4)


def test_room_is_counted_by_place_not_by_width(lm, clips):
    """Reference and draft share their places."""
    small = tiny_listener()
    prompt = small.processor(clips)["input_ids"].shape[1]
    small.model.config.text_config.max_position_embeddings = prompt + LIMIT
    Replay(small.model, small.processor, clips, TEXTS, LIMIT)
    with pytest.raises(UsageError, match="the decoder has"):
        Replay(small.model, small.processor, clips, TEXTS, LIMIT + 1)


def test_a_sliding_window_that_the_batch_would_not_fit_is_refused(lm, clips, monkeypatch):
    config = lm.model.get_decoder().config
    monkeypatch.setattr(config, "sliding_window", 20, raising=False)
    with pytest.raises(UsageError, match="sliding window sees 20"):
        Replay(lm.model, lm.processor, clips, TEXTS, LIMIT)


def test_a_sliding_window_must_hold_what_is_decoded_behind_the_draft_too(lm, clips, monkeypatch):
    width = Replay(lm.model, lm.processor, clips, TEXTS, LIMIT).kinds.shape[1]
    config = lm.model.get_decoder().config
    monkeypatch.setattr(config, "sliding_window", width + LIMIT, raising=False)
    Replay(lm.model, lm.processor, clips, TEXTS, LIMIT)
    monkeypatch.setattr(config, "sliding_window", width + LIMIT - 1)
    with pytest.raises(UsageError, match="sliding window"):
        Replay(lm.model, lm.processor, clips, TEXTS, LIMIT)


def test_nothing_is_left_behind(lm, replay):
    replay.hear(2)
    for block in decoder_blocks(lm.model):
        assert "forward" not in vars(block)
        assert not block._forward_hooks and not block._forward_pre_hooks


def test_thousands_of_answers_are_those_of_plain_decoding():
    """Short, endless and changed ones; cuts one beside another in a batch, of any size; in float32,

    so that no rounding decides.
    """
    lm = tiny_listener(seed=1)
    end = lm.processor.tokenizer.eos_token_id
    lm.model.get_input_embeddings().weight.data[end] *= 1.6  # likely to be chosen now and then
    rng = np.random.default_rng(0)
    clips = waves(*rng.uniform(0.3, 1.6, 40))
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in clips]
    replay = Replay(lm.model, lm.processor, clips, texts, LIMIT)
    variants = [
        Variant(partial(getattr(lm, name), {layer}, positions), layer + (name == "skip"))
        for name in ("skip", "knock_out", "bypass")
        for positions in ("bos", "prompt", "speech", "text", "all")
        for layer in range(N_LAYERS)
    ]
    plain = []
    for variant in variants:
        with variant.cut():
            ids = greedy_ids(lm.model, lm.processor(clips), LIMIT).tolist()
        plain.append([row[: row.index(end) + 1] if end in row else row for row in ids])
    for memory_mb in (0.001, 0.5, 512):
        heards = list(replay.hear_each(variants, memory_mb))
        assert [heard.answers for heard in heards] == plain
    rows = [row for answers in plain for row in answers]
    intact = replay.intact.answers * len(variants)
    assert len(rows) == 2400
    assert 300 < sum(a != b for a, b in zip(rows, intact, strict=True)) < 2100
    assert 300 < sum(row[-1] == end for row in rows) < 2100


def test_a_cut_that_knows_no_rows_is_decoded_alone(lm, clips, replay):
    """Without LoRA, say: its hooks don't go by positions."""
    head = lm.model.get_output_embeddings()

    @contextmanager
    def other_words():
        handle = head.register_forward_hook(lambda module, args, output: output.flip(-1))
        yield
        handle.remove()

    skip = Variant(partial(lm.skip, {1}), 2)
    heards = list(replay.hear_each([skip, Variant(other_words, N_LAYERS, by_position=False), skip]))
    assert heards[0].answers == heards[2].answers
    with other_words():
        same(lm, clips, heards[1])
    with lm.skip({1}):
        same(lm, clips, heards[0])


def test_kl_is_that_between_two_plain_runs(lm, clips, replay):
    (heard,) = replay.hear_each([Variant(partial(lm.skip, {0}), 1)])
    intact = lm.score(clips, TEXTS)
    with lm.skip({0}):
        skipped = lm.score(clips, TEXTS)
    assert torch.allclose(heard.kl, kl_per_clip(intact, skipped), atol=1e-4)
    assert (heard.kl > 1e-3).all() and not replay.intact.kl.any()
