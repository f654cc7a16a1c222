"""Audio fronts: normalised mel frames to one embedding per patch. No speech encoder in sight.

Shapes: B batch, T mel frames, M mel bins, r frames per patch, P = ceil(T / r) patches, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melprobe.model.config import MelLLMConfig


def _blank_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """`x` (B, T, ...) with zeros from each row's length on, whatever stood there (NaN included)."""
    valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x.where(valid.view(*valid.shape, *(1,) * (x.dim() - 2)), x.new_zeros(()))


class LinearFront(nn.Module):
    """Stack r frames and project them: the paper's title (arXiv 2606.10231)."""

    def __init__(self, config: MelLLMConfig):
        super().__init__()
        self.frames_per_patch = config.frames_per_patch
        width = config.text_config.hidden_size
        self.projection = nn.Linear(config.frames_per_patch * config.n_mels, width)

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, M) frames, of which `lengths` (B,) are valid, to (B, P, D)."""
        mel = _blank_padding(mel, lengths)
        mel = F.pad(mel, (0, 0, 0, -mel.shape[1] % self.frames_per_patch))
        patches = mel.unflatten(1, (-1, self.frames_per_patch)).flatten(2)  # (B, P, r*M)
        return self.projection(patches.to(self.projection.weight.dtype))


class ConvFront(nn.Module):
    """Strided depth-wise convolutions, then a two-layer projection.

    The shape of Phi-4-multimodal's subsampler (NeMo's `dw_striding`): log2(r) stages of kernel 3
    and stride 2 in time and frequency. At r = 1 only the projection is left.
    """

    def __init__(self, config: MelLLMConfig):
        super().__init__()
        channels, n_mels = config.conv_channels, config.n_mels
        width = config.text_config.hidden_size
        self.stages = nn.ModuleList()
        for stage in range(int(math.log2(config.frames_per_patch))):
            if stage == 0:
                conv = nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.GELU())
            else:
                conv = nn.Sequential(
                    nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels),
                    nn.Conv2d(channels, channels, 1),
                    nn.GELU(),
                )
            self.stages.append(conv)
            n_mels = -(-n_mels // 2)
        features = channels * n_mels if self.stages else n_mels
        self.projection = nn.Sequential(
            nn.Linear(features, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, M) frames, of which `lengths` (B,) are valid, to (B, P, D)."""
        dtype = next(self.projection.parameters()).dtype
        x = _blank_padding(mel, lengths).to(dtype)[:, None]
        for conv in self.stages:
            x = conv(x)  # (B, C, T/2, M/2)
            # A shorter clip must see zeros beyond its end at every stage, as it would alone.
            lengths = (lengths + 1) // 2
            x = _blank_padding(x.transpose(1, 2), lengths).transpose(1, 2)
        return self.projection(x.transpose(1, 2).flatten(2))


FRONTS: dict[str, type[LinearFront] | type[ConvFront]] = {"linear": LinearFront, "conv": ConvFront}


@torch.no_grad()
def match_scale(front: nn.Module, embeddings: Tensor) -> None:
    """Set a fresh front's output to the size of the decoder's own token embeddings (V, D).

    A decoder reads its first layer through a norm, but adds its updates to the raw residual: an
    embedding ten times too large would drown them, one ten times too small would be drowned.
    """
    last = [module for module in front.modules() if isinstance(module, nn.Linear)][-1]
    last.bias.zero_()
    nn.init.normal_(last.weight, std=embeddings.float().std().item() / math.sqrt(last.in_features))
