"""Listening: transcripts and answer likelihoods of clips, in batches that fit.

The two measurements that everything else stands on: greedy transcripts (`transcribe`) and the
negative log-likelihood of the reference given the audio (`answer_scores`). Where the model reads,
texts stand in the place of clips.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, PreTrainedModel

from melprobe.hooks.anatomy import anatomy
from melprobe.hooks.positions import kinds_are, position_kinds
from melprobe.model.config import token_ids_only
from melprobe.model.prompts import Given, Prompts


class AnswerScores(NamedTuple):
    """Teacher-forced likelihood of each clip's reference."""

    nll: Tensor
    """(B,) negative log-likelihood in nat, summed over the answer's tokens, end token included."""
    tokens: Tensor
    """(B,) number of those tokens."""
    log_probs: Tensor
    """(N, V) float32, of every token at all places of the answers, clip after clip."""


def batches_by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first; padded size at most `most`.

    A clip that is longer than `most` alone gets a batch of its own.
    """
    batch: list[int] = []
    for index in np.argsort([-length for length in lengths], kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def transcribe(
    model: PreTrainedModel,
    processor: Prompts,
    given: Sequence[Given],
    max_new_tokens: int = 64,
) -> list[str]:
    """Greedy transcripts of one batch of waves (float32, mono, 16 kHz), or copies of texts."""
    inputs = processor(given).to(model.device)
    return processor.batch_decode(greedy_ids(model, inputs, max_new_tokens))


@torch.no_grad()
def greedy_ids(model: PreTrainedModel, inputs: BatchFeature, max_new_tokens: int) -> Tensor:
    """Ids (B, at most `max_new_tokens`) of greedy answers to prompts, padded behind the end token.

    Greedy whatever `model.generation_config` holds: of that only the token ids are used.
    """
    kept = model.generation_config
    model.generation_config = token_ids_only(kept)  # `generate` fills in what isn't given from it
    try:
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    finally:
        model.generation_config = kept
    return output[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def answer_scores(
    model: PreTrainedModel,
    processor: Prompts,
    given: Sequence[Given],
    texts: Sequence[str],
) -> AnswerScores:
    """Score one batch of references under their audio, or under texts."""
    return score_tokens(*_answer_logits(model, processor(given, list(texts)).to(model.device)))


def answer_nll(model: PreTrainedModel, inputs: BatchFeature) -> Tensor:
    """NLL of all answers that `labels` mark in a batch, summed, nat; with a gradient."""
    logits, targets = _answer_logits(model, inputs)
    return F.cross_entropy(logits.float(), targets[targets != -100], reduction="sum")


def _answer_logits(model: PreTrainedModel, inputs: BatchFeature) -> tuple[Tensor, Tensor]:
    """Logits (N, V) where an answer's token is foretold, and those tokens (B, S), else -100."""
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    labels, speech = inputs["labels"], anatomy(model).audio_token_id
    kinds = position_kinds(inputs["input_ids"], speech, inputs["attention_mask"], labels)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    with kinds_are(kinds):
        return logits_at(model, targets != -100, **rest, use_cache=False), targets


def logits_at(model: PreTrainedModel, where: Tensor, **inputs: Any) -> Tensor:
    """Next-token logits (N, V) at the positions `where` (B, S), in reading order."""
    if anatomy(model).masks_logits:
        return model(**inputs, logits_to_keep=where).logits
    columns = where.any(0).nonzero()[:, 0]
    logits = model(**inputs, logits_to_keep=columns).logits
    if logits.shape[1] == where.shape[1]:  # Qwen2Audio computes them all
        return logits[where]
    return logits[where[:, columns]]


def score_tokens(logits: Tensor, targets: Tensor) -> AnswerScores:
    """Scores of `targets` (B, T), -100 where there is none, each under its row of logits (N, V)."""
    log_probs = logits.float().log_softmax(-1)
    labelled = targets != -100
    nll = -log_probs.gather(1, targets[labelled][:, None])[:, 0]
    row = labelled.nonzero()[:, 0]
    total = torch.zeros(len(targets), dtype=nll.dtype, device=nll.device).index_add_(0, row, nll)
    return AnswerScores(total, labelled.sum(1), log_probs)


def kl_per_clip(intact: AnswerScores, other: AnswerScores) -> Tensor:
    """(B,) KL(intact ‖ other) of the next token, summed over each clip's answer, nat."""
    kl = F.kl_div(other.log_probs, intact.log_probs, reduction="none", log_target=True).sum(-1)
    kl = kl.clamp(min=0)  # below only by rounding
    clip = torch.repeat_interleave(intact.tokens)
    return torch.zeros(len(intact.tokens), device=kl.device).index_add_(0, clip, kl)
