"""Phone targets on speech positions: a warm-up for the lower blocks where phone times are known.

A next-token loss says three times a second whether a guess was right, and only once the model has
found out by itself which patch each word came from. Phone times say it fifty times a second. The
targets are framewise, as in hybrid speech recognisers (Bourlard & Morgan 1994); a linear head reads
them from the residual after one block, and is thrown away with the training run.

It shapes which blocks hear: a checkpoint trained with it says so, and after which block.
"""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melprobe.audio.patches import patch_span
from melprobe.corpus.manifest import Span
from melprobe.corpus.phones import CLASSES, SILENCE, fold

UNKNOWN = -100
_CLASS = {name: number for number, name in enumerate(CLASSES)}


def slots_per_patch(frames_per_patch: int) -> int:
    """Targets in a patch: one every 20 ms, at least one."""
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


class PhoneHead(nn.Module):
    """Reads phones from residuals at speech positions, one patch late.

    The delay lets a patch hear how its phones go on: attention is causal.
    """

    DELAY = 1

    def __init__(self, width: int, frames_per_patch: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.slots = slots_per_patch(frames_per_patch)
        self.linear = nn.Linear(width, self.slots * len(CLASSES))

    def forward(self, residual: Tensor, speech: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nat and share of right answers, over all targets that are known.

        residual (B, S, D); speech (B, S) marks the patches; targets (B, P, slots), P the patches
        of the longest clip. Both are 0 when no target is known.
        """
        late = F.pad(targets, (0, 0, self.DELAY, 0), value=UNKNOWN)[:, : targets.shape[1]]
        counts = speech.sum(1)
        valid = torch.arange(targets.shape[1], device=speech.device) < counts[:, None]
        wanted = late[valid].flatten()
        logits = self.linear(self.norm(residual[speech])).float().view(len(wanted), len(CLASSES))
        known = wanted != UNKNOWN
        if not known.any():
            return logits.sum() * 0, logits.new_zeros(())
        loss = F.cross_entropy(logits[known], wanted[known])
        return loss, (logits[known].argmax(1) == wanted[known]).float().mean()
