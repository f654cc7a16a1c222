"""Framewise targets on speech positions, where it is known when each phone and word is said.

A next-token loss says three times a second whether a guess was right, and only once the model has
found out by itself which patch each word came from. Known times say it at every patch, as in hybrid
speech recognisers (Bourlard & Morgan 1994): which phones sound (a linear head reads them after one
block, and is thrown away with the training run), and which token has just been completed (read
after a later block through the decoder's own final norm and output embeddings; most often none,
which the end token stands for).

They shape which blocks hear: a checkpoint trained with them says so, and after which blocks.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melprobe.audio.patches import patch_at, patch_span
from melprobe.corpus.manifest import Span, Utterance
from melprobe.corpus.phones import CLASSES, SILENCE, fold
from melprobe.errors import UsageError
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.training.processes import Mean, own_mean
from melprobe.training.reading import Residual, TokenReader
from melprobe.training.recipe import Frames

UNKNOWN = -100
DELAY = 1
"""Patches by which answers are late: attention is causal, and sounds are told by what follows."""
LENGTH_STEP = 8
"""Sequences are padded to a multiple of it: each shape has kernels of its own, and oneDNN, which
keeps a thousand, made them anew at most steps (a fifth of a step on a CPU)."""
_CLASS = {name: number for number, name in enumerate(CLASSES)}


def check_phones(utterances: Iterable[Utterance]) -> None:
    """UsageError for a phone that has no class: before training, not an hour into it."""
    known: set[str] = set()
    for u in utterances:
        for label in {phone.label for phone in u.phones} - known:
            try:
                fold(label)
            except UsageError as error:
                raise UsageError(f"{u.where}: {error}") from None
            known.add(label)


def slots_per_patch(frames_per_patch: int) -> int:
    """Phone targets in a patch: one every 20 ms, at least one."""
    return max(1, frames_per_patch // 2)


def phone_targets(
    phones: Sequence[Span], n_patches: int, frames_per_patch: int, start: float, speed: float
) -> Tensor:
    """`CLASSES` numbers (patches, slots), `UNKNOWN` throughout for a clip without phone times.

    start: seconds into the recording at which the clip begins; speed: how fast it is played.
    """
    slots = slots_per_patch(frames_per_patch)
    if not phones:
        return torch.full((n_patches, slots), UNKNOWN)
    edges, classes = _steps(phones)
    targets = []
    for patch in range(n_patches):
        first, last = patch_span(patch, frames_per_patch)
        for slot in range(slots):
            moment = first + (slot + 0.5) * (last - first) / slots
            targets.append(classes[bisect_right(edges, start + moment * speed)])
    return torch.tensor(targets).view(n_patches, slots)


def _steps(phones: Sequence[Span]) -> tuple[list[float], list[int]]:
    """Moments at which the class changes, and the classes before, between and after them."""
    edges, classes = [], [_CLASS[SILENCE]]
    for label, start, end in phones:
        parts = fold(label)
        edges.append(start)  # what was silence until now
        for number, part in enumerate(parts, 1):
            classes.append(_CLASS[part])
            edges.append(start + (end - start) * number / len(parts))
        classes.append(_CLASS[SILENCE])
    return edges, classes


def token_targets(
    words: Sequence[Span],
    tokens: Sequence[Sequence[int]],
    blank: int,
    n_patches: int,
    frames_per_patch: int,
    start: float,
    speed: float,
) -> Tensor:
    """The token that each patch completes (patches,), `blank` where it completes none.

    words: when each word of the answer is said; tokens: those of each word, which share its time
    evenly. A patch completes one token at most, so hurried ones are put off; what is left at the
    end of the clip has no target. `UNKNOWN` throughout for a clip without word times.
    """
    if len(words) != len(tokens):
        return torch.full((n_patches,), UNKNOWN)
    targets = torch.full((n_patches,), blank)
    free = 0
    for (_, begin, end), pieces in zip(words, tokens, strict=True):
        for number, token in enumerate(pieces, 1):
            moment = begin + (end - begin) * number / len(pieces)
            patch = patch_at((moment - start) / speed, frames_per_patch)
            patch = max(min(patch, n_patches - 1 - DELAY), free)
            if patch < n_patches:
                targets[patch] = token
            free = patch + 1
    return targets


def tokens_of_words(tokenizer: Any, text: str) -> list[list[int]]:
    """Token ids of `text`, a list for each of its space-separated words."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    words: list[list[int]] = [[] for _ in text.split()]
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        words[text.count(" ", 0, end)].append(token)
    return words


def _late(targets: Tensor, speech: Tensor) -> Tensor:
    """Targets (B, P, ...) moved to the patch that answers for them, in reading order (N, ...)."""
    moved = targets.roll(DELAY, 1)
    moved[:, :DELAY] = UNKNOWN
    counts = speech.sum(1)
    return moved[torch.arange(targets.shape[1], device=speech.device) < counts[:, None]]


class PhoneHead(nn.Module):
    """Reads phones from residuals at speech positions."""

    def __init__(self, width: int, frames_per_patch: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, slots_per_patch(frames_per_patch) * len(CLASSES))

    def forward(
        self, residual: Tensor, speech: Tensor, targets: Tensor, mean: Mean = own_mean
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nat and share of right answers, over all targets that are known.

        residual (B, S, D); speech (B, S) marks the patches; targets (B, P, slots), P the patches
        of the longest clip. Both are 0 when no target is known.
        """
        wanted = _late(targets, speech).flatten()
        logits = self.linear(self.norm(residual[speech])).float().view(len(wanted), len(CLASSES))
        loss = F.cross_entropy(logits, wanted, ignore_index=UNKNOWN, reduction="sum")
        right, known = logits.argmax(1) == wanted, (wanted != UNKNOWN).sum()
        return mean(loss, known), mean(right.sum(), known)


def token_loss(
    reader: TokenReader,
    residual: Tensor,
    speech: Tensor,
    targets: Tensor,
    mean: Mean = own_mean,
) -> tuple[Tensor, Tensor]:
    """Nat per completed token plus nat per patch that completes none, and share of tokens right.

    Shapes as in `PhoneHead`, targets (B, P). Tokens and blanks are averaged apart: there are four
    times as many blanks. Both are 0 when no target is known.
    """
    wanted = _late(targets, speech)
    known = wanted != UNKNOWN
    scores = reader.scores(residual[speech][known])
    classes = reader.classes_of(wanted[known])
    nll = F.nll_loss(scores, classes, reduction="none")
    blank = classes == 0
    spoken = ~blank
    right = (scores.argmax(1) == classes) & spoken
    loss = mean(nll[blank].sum(), blank.sum()) + mean(nll[spoken].sum(), spoken.sum())
    return loss, mean(right.sum(), spoken.sum())


class FrameLosses(nn.Module):
    """Phone and token losses of a Mel-LLM that is being trained, at the blocks a recipe names."""

    def __init__(
        self, model: MelLLMForConditionalGeneration, reader: TokenReader, settings: Frames
    ):
        super().__init__()
        config = model.config
        self.phones = PhoneHead(config.text_config.hidden_size, config.frames_per_patch)
        self.audio_token_id = config.audio_token_id
        self.token_weight = settings.token_weight
        self.reader = reader
        self.residuals = {
            "phones": Residual(model, settings.phones_after, "frames.phones_after"),
            "tokens": Residual(model, settings.tokens_after, "frames.tokens_after"),
        }

    def run(self, model: Any, batch: Mapping[str, Tensor], learn: str) -> dict[str, Tensor]:
        """`batch` through the blocks that `learn` (phones or tokens) needs; what was run."""
        speech = _speech_only(batch, self.audio_token_id)
        self.residuals[learn].of(model, speech)
        return speech

    def forward(
        self,
        batch: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        *,
        tokens: bool,
        mean: Mean = own_mean,
    ) -> dict[str, Tensor]:
        """Losses and accuracies in the pass that just ran on `batch`; `frames` is their sum.

        targets: `phone_targets` and `token_targets`; tokens: whether these count.
        """
        speech = batch["input_ids"] == self.audio_token_id
        phones, right = self.phones(
            self.residuals["phones"].last(), speech, targets["phone_targets"], mean
        )
        losses = {"frames": phones, "phones": phones, "phones_right": right}
        if tokens:
            losses["tokens"], losses["tokens_right"] = token_loss(
                self.reader, self.residuals["tokens"].last(), speech, targets["token_targets"], mean
            )
            losses["frames"] = phones + self.token_weight * losses["tokens"]
        return losses


def _speech_only(batch: Mapping[str, Tensor], audio_token_id: int) -> dict[str, Tensor]:
    """`batch` without labels, cut soon behind the last patch of its longest clip."""
    last = int((batch["input_ids"] == audio_token_id).any(0).nonzero().max())
    kept = {key: value for key, value in batch.items() if key != "labels"}
    for key in ("input_ids", "attention_mask"):
        kept[key] = kept[key][:, : (last // LENGTH_STEP + 1) * LENGTH_STEP]
    return kept
