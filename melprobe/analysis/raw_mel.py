"""Raw log-mel patches in the place of a second model: what a model has in common with its input.

A floor of its own kind: two models that are no more alike than each is to raw mel need not hear
alike. The patches are those of a capture's clips, at its rate, as a single "layer" 0 that stands
for h and for Δ. Knows audio and manifests, no models.
"""

import torch
from torch import Tensor

from melprobe.analysis.pairing import Frames
from melprobe.analysis.views import Speech, View
from melprobe.audio.load import load_utterance
from melprobe.audio.mel import frame_count, log_mel
from melprobe.audio.patches import FRAMES_PER_PATCH, patch_middle
from melprobe.captured import Capture
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import UsageError
from melprobe.wheels import file_sha256


class RawMel(Speech):
    """Log-mel (80 bins, not normalised) of a capture's clips, stacked to patches."""

    def __init__(self, captured: Capture):
        """UsageError where the capture's manifest isn't there, or is another than it was."""
        self.captured = captured
        path = find_manifest(captured.index["data"])
        if file_sha256(path) != captured.index["settings"]["data"]:
            raise UsageError(
                f"{path}: is not as it was when {captured.folder} was made; capture anew"
            )
        known = {u.id: u for u in read_manifest(path)}
        self._utterances = {name: known[name] for name in captured.utterances.index}
        self.rate = captured.index["patches_per_second"]
        self._frames_per_patch = FRAMES_PER_PATCH[self.rate]
        self.clips = {
            name: self._patches(len(load_utterance(u))) for name, u in self._utterances.items()
        }

    def _patches(self, samples: int) -> Frames:
        whole = torch.arange(frame_count(samples) // self._frames_per_patch)
        return Frames(whole.numpy(), patch_middle(whole, self._frames_per_patch).float().numpy())

    def h(self, utterance: str) -> Tensor:
        """(1, n, 80 · frames in a patch)."""
        mel = log_mel(torch.from_numpy(load_utterance(self._utterances[utterance]))[None])
        n = len(self.clips[utterance].places)
        return mel[:, : n * self._frames_per_patch].reshape(1, n, -1)

    def layers(self, of: str) -> list[int]:
        return [0]

    def features(self, h: Tensor, view: View) -> Tensor:
        return super().features(h, View("h", view.scaling))
