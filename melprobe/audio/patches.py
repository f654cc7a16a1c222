"""Patches: r consecutive mel frames that become one position of the language model.

Knows the map between patches and seconds; every analysis that draws or aligns a patch uses it.
"""

from typing import Any

from melprobe.audio.load import SAMPLE_RATE
from melprobe.audio.mel import FRAMES_PER_SECOND, HOP, WINDOW

# Patches per second → mel frames per patch (the token rates of arXiv 2606.10231, Table IV).
FRAMES_PER_PATCH = {100.0: 1, 50.0: 2, 25.0: 4, 12.5: 8, 6.25: 16}


def patch_count(n_frames: int, frames_per_patch: int) -> int:
    """Patches that cover `n_frames`; the last one may be partly padding."""
    return -(-n_frames // frames_per_patch)


def patch_rate(frames_per_patch: int) -> float:
    """Patches a second."""
    return FRAMES_PER_SECOND / frames_per_patch


def patch_span(patch: int, frames_per_patch: int) -> tuple[float, float]:
    """Start and end in seconds of the hops that patch number `patch` (from 0) stands for.

    A frame's window is longer than its hop, so neighbouring patches hear 15 ms of each other;
    spans are centred on the windows and tile the clip without overlap.
    """
    lead = (WINDOW - HOP) / 2 / SAMPLE_RATE
    seconds = frames_per_patch * HOP / SAMPLE_RATE
    return lead + patch * seconds, lead + (patch + 1) * seconds


def patch_middle(patch: Any, frames_per_patch: int) -> Any:
    """Middle of `patch_span` in seconds, of a number of a patch or of a tensor of them."""
    start, end = patch_span(patch, frames_per_patch)
    return (start + end) / 2


def patch_at(seconds: float, frames_per_patch: int) -> int:
    """The patch whose span holds `seconds`; times before the first span belong to patch 0."""
    lead = (WINDOW - HOP) / 2 / SAMPLE_RATE
    # The tiny shift keeps a span's own start inside it, whatever the last bit of the division says.
    return max(0, int((seconds - lead) * SAMPLE_RATE / (frames_per_patch * HOP) + 1e-9))
