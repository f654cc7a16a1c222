"""Framewise targets: where they stand, and what their losses are taken over."""

from pathlib import Path

import pytest
import torch

from melprobe.audio.patches import patch_span
from melprobe.corpus.manifest import Span, Utterance
from melprobe.corpus.phones import CLASSES, PHONES, fold
from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.training.frames import (
    UNKNOWN,
    PhoneHead,
    check_phones,
    phone_targets,
    token_loss,
    token_targets,
    tokens_of_words,
)
from melprobe.training.reading import Residual, TokenReader
from tests.tiny import N_LAYERS, tiny_listener, waves

LAYER = 1


def names(targets: torch.Tensor) -> list[list[str]]:
    return [[CLASSES[i] for i in row] for row in targets.tolist()]


def test_two_alphabets_fold_into_one():
    assert [fold(label) for label in ("ʃ", "SH", "sh")] == [("sh",)] * 3
    assert fold("AH0") == fold("ə") == fold("ax") == ("ah",)
    assert fold("əl") == ("ah", "l")
    assert len(set(PHONES)) == 39


def test_an_unknown_symbol_is_one_line():
    with pytest.raises(UsageError, match="phone 'ʘ'"):
        fold("ʘ")
    clip = Utterance("a", Path("a"), "", 1.0, phones=(Span("ʘ", 0, 1),), where="own.jsonl:3")
    with pytest.raises(UsageError, match=r"own\.jsonl:3: phone 'ʘ'"):
        check_phones([clip])


def test_targets_are_the_phones_at_their_moments():
    lead = patch_span(0, 4)[0]
    phones = (Span("k", lead + 0.02, lead + 0.04), Span("əl", lead + 0.04, lead + 0.08))
    targets = phone_targets(phones, 3, 4, start=0.0, speed=1.0)
    assert names(targets) == [["sil", "k"], ["ah", "l"], ["sil", "sil"]]


def test_targets_follow_the_cut_and_the_speed():
    lead = patch_span(0, 4)[0]
    # Cut at 1 s and played twice as fast, a moment t of the clip was 1 + 2 t.
    phones = (Span("k", 1 + 2 * lead, 1 + 2 * (lead + 0.02)),)
    targets = phone_targets(phones, 2, 4, start=1.0, speed=2.0)
    assert names(targets) == [["k", "sil"], ["sil", "sil"]]


def test_a_clip_without_times_has_no_targets():
    assert (phone_targets((), 3, 8, start=0.0, speed=1.0) == UNKNOWN).all()


def test_the_loss_is_over_known_targets_one_patch_late():
    torch.manual_seed(0)
    head = PhoneHead(8, frames_per_patch=2)
    residual = torch.randn(2, 5, 8)
    speech = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    targets = torch.tensor([[[4], [UNKNOWN], [6]], [[9], [2], [UNKNOWN]]])
    loss, accuracy = head(residual, speech, targets)
    # Positions 2 and 3 of the first clip hear patches 0 and 1 (unknown), 2 of the second patch 0.
    scores = head.linear(head.norm(residual))
    expected = -(scores[0, 2].log_softmax(0)[4] + scores[1, 2].log_softmax(0)[9]) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    right = [scores[0, 2].argmax() == 4, scores[1, 2].argmax() == 9]
    assert accuracy.item() == pytest.approx(sum(map(int, right)) / 2)


def test_no_known_target_is_no_loss():
    head = PhoneHead(8, frames_per_patch=8)
    speech = torch.ones(1, 3, dtype=torch.bool)
    loss, _ = head(torch.randn(1, 3, 8), speech, torch.full((1, 3, 4), UNKNOWN))
    assert loss.item() == 0


def test_tokens_stand_at_the_ends_of_their_words():
    lead, patch = patch_span(0, 8)[0], 0.08
    words = (
        Span("one", lead, lead + 1.5 * patch),
        Span("camera", lead + 2 * patch, lead + 6 * patch),
    )
    targets = token_targets(words, [[7], [8, 9]], 1, 10, 8, start=0.0, speed=1.0)
    assert targets.tolist() == [1, 7, 1, 1, 8, 1, 9, 1, 1, 1]
    # Twice as fast, they come closer; a patch completes one token at most.
    targets = token_targets(words, [[5, 6, 7], [8, 9]], 1, 5, 8, start=0.0, speed=2.0)
    assert targets.tolist() == [5, 6, 7, 8, 9]


def test_tokens_that_no_patch_can_answer_for_are_left_out():
    words = (Span("hello", 0.0, 0.2),)
    targets = token_targets(words, [[5, 6, 7]], 1, 2, 8, start=0.0, speed=1.0)
    assert targets.tolist() == [5, 6]
    assert (token_targets((), [[5]], 1, 2, 8, start=0.0, speed=1.0) == UNKNOWN).all()


def test_every_token_of_a_text_belongs_to_a_word():
    processor = tiny_listener().processor
    text = "please hold unhearable"
    words = tokens_of_words(processor.tokenizer, text)
    assert [token for word in words for token in word] == processor.answer_ids(text)[:-1]
    assert [processor.decode(word) for word in words] == text.split()


def test_tokens_and_blanks_are_averaged_apart():
    lm = tiny_listener()
    eos = lm.processor.tokenizer.eos_token_id
    reader = TokenReader(lm.model, {5, 6}, eos)
    speech = torch.ones(1, 5, dtype=torch.bool)
    targets = torch.tensor([[5, eos, 6, UNKNOWN, 6]])  # the last one's answer would be too late
    residual = torch.randn(1, 5, 32)
    loss, right = token_loss(reader, residual, speech, targets)
    decoder = lm.model.get_decoder()
    logits = decoder.norm(residual[0]) @ decoder.embed_tokens.weight[[eos, 5, 6]].T
    p = -logits.log_softmax(-1)
    assert loss.item() == pytest.approx((p[2, 0] + (p[1, 1] + p[3, 2]) / 2).item(), rel=1e-4)
    hits = (logits[1].argmax() == 1) + (logits[3].argmax() == 2).int()
    assert right.item() == pytest.approx(hits.item() / 2)


def test_the_residual_is_that_of_the_whole_model_and_its_gradient_stops():
    lm = tiny_listener()
    batch = lm.processor(waves(0.5, 0.9), ["the press", "one"])
    residual = Residual(lm.model, LAYER, "frames.phones_after")
    lm.model(**batch)
    whole = residual.last().detach().clone()
    alone = residual.of(lm.model, batch)
    assert torch.equal(alone, whole)
    alone.sum().backward()
    moved = [block.mlp.down_proj.weight.grad is not None for block in decoder_blocks(lm.model)]
    assert moved == [layer <= LAYER for layer in range(N_LAYERS)]


def test_the_last_block_has_no_next_one_to_listen_at():
    message = f"ctc.layer {N_LAYERS - 1}: take a block from 0 to {N_LAYERS - 2}"
    with pytest.raises(UsageError, match=message):
        Residual(tiny_listener().model, N_LAYERS - 1, "ctc.layer")
