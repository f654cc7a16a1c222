"""What `melprobe.report.track` draws of a clip: the labels of its patches, as probes get them."""

from typing import Any

import numpy as np

from melprobe.audio.load import SAMPLE_RATE
from melprobe.audio.mel import HOP, WINDOW
from melprobe.audio.patches import patch_count, patch_rate
from melprobe.corpus.manifest import Utterance
from melprobe.corpus.phones import SILENCE
from melprobe.probing.clip import edges_of, frames_of, heard, said, sounds_of


def picture(u: Utterance, r: int) -> dict[str, Any]:
    """A clip with patches of r mel frames; T frames, P patches.

    `words`, `phones`: [label, start, end] as timed; `patch_words`, `patch_phones` (P,) with None
    where unknown; `edges` (P + 1,) and `frames` (T,), their middles, in seconds; `mel` (T, M);
    `f0` in Hz (T,), `patch_f0` (P,); `energy` in dB (T,), `patch_energy` (P,); `patch_rate` (P,) in
    phones a second. UsageError where audio or a phone is unusable.
    """
    frames = frames_of(u)
    count = patch_count(len(frames.mel), r)
    labels, sounds = said(u, count, r), heard(frames, count, r)
    edges = edges_of(count, r)
    timed = sounds_of(u, float(edges[-1])) if u.phones else []
    return {
        "id": u.id,
        "text": u.text,
        "times": u.times,
        "no_times": u.no_times,
        "patches_per_second": patch_rate(r),
        "words": list(u.words),
        "phones": [span for span in timed if span.label != SILENCE],
        "patch_words": labels.words,
        "patch_phones": labels.phones,
        "patch_rate": labels.rate[:, 0],
        "edges": edges,
        "frames": (np.arange(len(frames.mel)) * HOP + WINDOW / 2) / SAMPLE_RATE,
        "mel": frames.mel,
        "f0": 100 * 2 ** frames.octaves[:, 0],
        "patch_f0": 100 * 2 ** sounds.f0[:, 0],
        "energy": frames.energy[:, 0],
        "patch_energy": sounds.energy[:, 0],
    }
