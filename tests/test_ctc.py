"""CTC on speech positions against the sum over all alignments, written out."""

from collections.abc import Iterable
from itertools import groupby, product

import pytest
import torch

from melprobe.hooks.layers import decoder_blocks
from melprobe.listener import Listener
from melprobe.training.ctc import SpeechCTC
from melprobe.training.reading import Residual, TokenReader
from tests.tiny import N_LAYERS, tiny_listener, waves

LAYER = 1


def speech_ctc(lm: Listener, token_ids: Iterable[int]) -> SpeechCTC:
    reader = TokenReader(lm.model, token_ids, lm.processor.tokenizer.eos_token_id)
    return SpeechCTC(reader, Residual(lm.model, LAYER, "ctc.layer"))


def test_it_is_the_likelihood_of_all_alignments():
    lm = tiny_listener(frames_per_patch=16)
    batch = lm.processor(waves(0.5, 0.7), ["one", "please one"])  # 3 and 5 patches
    answers = [lm.processor.answer_ids(text)[:-1] for text in ("one", "please one")]
    ctc = speech_ctc(lm, {t for answer in answers for t in answer})
    captured = {}
    decoder_blocks(lm.model)[LAYER].register_forward_hook(
        lambda module, args, output: captured.update(residual=output)
    )
    lm.model(**batch)
    loss = ctc.loss(batch)

    decoder = lm.model.get_decoder()
    rows = decoder.embed_tokens.weight[ctc.reader.classes]
    scores = (decoder.norm(captured["residual"]) @ rows.T).log_softmax(-1)
    speech = batch["input_ids"] == lm.processor.audio_token_id
    expected = []
    for row, answer in enumerate(answers):
        log_p = scores[row][speech[row]]
        wanted = [ctc.reader.classes.tolist().index(token) for token in answer]
        paths = [
            sum(log_p[t, c] for t, c in enumerate(path))
            for path in product(range(len(ctc.reader.classes)), repeat=len(log_p))
            if [c for c, _ in groupby(path) if c != 0] == wanted
        ]
        expected.append(-torch.stack(paths).logsumexp(0) / len(answer))
    assert loss.item() == pytest.approx((sum(expected) / 2).item(), rel=1e-4)


def test_its_gradient_stops_at_its_layer():
    lm = tiny_listener()
    batch = lm.processor(waves(0.9), ["the press"])
    ids = lm.processor.answer_ids("the press")
    ctc = speech_ctc(lm, ids)
    lm.model(**batch)
    ctc.loss(batch).backward()
    moved = [block.mlp.down_proj.weight.grad is not None for block in decoder_blocks(lm.model)]
    assert moved == [layer <= LAYER for layer in range(N_LAYERS)]


def test_more_tokens_than_patches_count_nothing():
    lm = tiny_listener(frames_per_patch=16)
    batch = lm.processor(waves(0.2), ["the press call message number"])
    ids = lm.processor.answer_ids("the press call message number")
    ctc = speech_ctc(lm, ids)
    lm.model(**batch)
    assert ctc.loss(batch).item() == 0
