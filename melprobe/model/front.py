"""Audio fronts: mel frames to one embedding per patch, without a speech encoder or with one.

Shapes: B batch, T mel frames, M mel bins, r frames per patch, P = ceil(T / r) patches, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from melprobe.audio.mel import FRAMES_PER_SECOND
from melprobe.errors import UsageError
from melprobe.model.config import MelLLMConfig
from melprobe.model.phi4 import audio_encoder


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

    Much like Phi-4-multimodal's subsampler (NeMo's `dw_striding`): log2(r) stages of kernel 3 and
    stride 2 in time and frequency. That one has ReLU for GELU and one more linear layer, so its
    weights go into `Phi4Front`. At r = 1 only the projection is left.
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


class WhisperFront(nn.Module):
    """Whisper's encoder, r / 2 of its outputs in each patch, and a two-layer projection.

    The encoder hears a clip alone, not in 30 s of silence as Whisper has it: a 20th of the work
    for a short clip. Whisper's decoder needs that silence to stop, and no other does: of outputs
    made so, with those of silence put behind them, it writes as good a transcript (LOG.md).
    """

    def __init__(self, config: MelLLMConfig):
        super().__init__()
        self.encoder = WhisperEncoder(config.encoder_config)
        self.stacked = config.frames_per_patch // 2
        width = config.text_config.hidden_size
        features = self.stacked * config.encoder_config.d_model
        self.projection = nn.Sequential(
            nn.Linear(features, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, M) frames, of which `lengths` (B,) are valid, to (B, P, D).

        UsageError for a clip longer than the encoder has positions for (30 s).
        """
        dtype = self.encoder.conv1.weight.dtype
        heard = self._encode(_blank_padding(mel, lengths).to(dtype), lengths)  # (B, T/2, E)
        heard = F.pad(heard, (0, 0, 0, -heard.shape[1] % self.stacked))
        patches = heard.unflatten(1, (-1, self.stacked)).flatten(2)
        return self.projection(patches.to(self.projection[0].weight.dtype))

    def _encode(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """What `WhisperEncoder.forward` computes, of clips of any length, each as if alone."""
        encoder, room = self.encoder, self.encoder.config.max_source_positions
        if -(-mel.shape[1] // 2) > room:
            raise UsageError(
                f"a clip lasts {mel.shape[1] / FRAMES_PER_SECOND:.1f} s, and Whisper's encoder "
                f"hears {2 * room / FRAMES_PER_SECOND:g} s: cut it"
            )
        x = F.gelu(encoder.conv1(mel.transpose(1, 2)))
        x = _blank_padding(x.transpose(1, 2), lengths).transpose(1, 2)
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)
        lengths = (lengths + 1) // 2
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        beyond = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        mask = torch.zeros_like(beyond, dtype=x.dtype)
        mask = mask.masked_fill(beyond, torch.finfo(x.dtype).min)[:, None, None]
        for layer in encoder.layers:
            x = layer(x, mask.expand(-1, 1, x.shape[1], -1))
        return _blank_padding(encoder.layer_norm(x), lengths)


# Positions that Phi-4's encoder hears at once, 40 s; it takes up a longer clip in such windows.
_WINDOW = 500


class Phi4Front(nn.Module):
    """Phi-4-multimodal's audio encoder, a Conformer (arXiv 2503.01743), and two-layer projection.

    Without Conformer blocks (`encoder_config.num_blocks` 0) its convolutional subsampler is left,
    which is the encoder-free front of arXiv 2606.10231. Frames come normalised by that model's own
    means and deviations. Of one clip it makes what transformers does. In a batch transformers lets
    shorter clips hear the padding (its mask adds 1 to the scores of what is valid, and hides
    nothing), and here each clip is heard as if alone.
    """

    def __init__(self, config: MelLLMConfig):
        super().__init__()
        self.encoder = audio_encoder(config.encoder_config)
        width = config.text_config.hidden_size
        self.projection = nn.Sequential(
            nn.Linear(config.encoder_config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, M) frames, of which `lengths` (B,) are valid, to (B, P, D)."""
        subsampler = self.encoder.embed
        x = mel[:, :, None].to(next(self.encoder.parameters()).dtype)  # (B, T, C, M)
        for layer in subsampler.conv:
            if getattr(layer, "stride", None) == (2, 2):
                # As in `ConvFront`, a clip sees zeros beyond its end at every stage.
                x = _blank_padding(x, lengths)
                lengths = (lengths + 1) // 2
            x = layer(x.transpose(1, 2)).transpose(1, 2)
        x = subsampler.out(x.flatten(2))  # (B, P, E)
        if len(self.encoder.encoders):
            x = self._attend(_blank_padding(x, lengths), lengths)
        return self.projection(x.to(next(self.projection.parameters()).dtype))

    def _attend(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The Conformer blocks on (B, P, E), each clip as if alone, in windows if it is long."""
        rows, width, _ = x.shape
        size = min(width, _WINDOW)
        x = F.pad(x, (0, 0, 0, -width % size)).unflatten(1, (-1, size))  # (B, windows, size, E)
        # The zeros that fill a long clip's last window are heard, as they are in transformers.
        heard = lengths.where(lengths <= _WINDOW, -(-lengths // _WINDOW) * _WINDOW)
        starts = torch.arange(x.shape[1], device=x.device) * size
        # A window behind a clip's end hears its first zero: hearing nothing would make it NaN.
        heard = (heard[:, None] - starts).clamp(1, size).flatten()
        x = x.flatten(0, 1)
        beyond = torch.arange(size, device=x.device) >= heard[:, None]
        mask = self.encoder.relative_attention_bias_layer(x)  # (1, heads, size, size)
        mask = mask.masked_fill(beyond[:, None, None], torch.finfo(mask.dtype).min)
        for block in self.encoder.encoders:
            x = block(x, mask)
        return x.unflatten(0, (rows, -1)).flatten(1, 2)[:, :width]


FRONTS: dict[str, type[nn.Module]] = {
    "linear": LinearFront,
    "conv": ConvFront,
    "whisper": WhisperFront,
    "phi4": Phi4Front,
}


@torch.no_grad()
def match_scale(front: nn.Module, embeddings: Tensor) -> None:
    """Set a fresh front's output to the size of the decoder's own token embeddings (V, D).

    A decoder reads its first layer through a norm, but adds its updates to the raw residual: an
    embedding ten times too large would drown them, one ten times too small would be drowned.
    """
    last = [module for module in front.modules() if isinstance(module, nn.Linear)][-1]
    last.bias.zero_()
    nn.init.normal_(last.weight, std=embeddings.float().std().item() / math.sqrt(last.in_features))
