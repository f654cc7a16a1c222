"""Waves to log-mel frames: batched, on CPU or GPU, differentiable.

The `phi4` front end follows transformers' `Phi4MultimodalFeatureExtractor` (16 kHz, 25 ms Hamming
window, 10 ms hop, pre-emphasis inside each frame, Kaldi mel scale, log of power clamped at 1, no
padding at the edges). The Fourier transform is in double precision, as there: in a loud frame's
quiet bins single precision is off by more than 1e-3. On a CPU the batch is cut into pieces that
stay in its cache, which halves the time.

Shapes: B batch, N samples, T mel frames, M mel bins, W window samples, F frequency bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from melprobe.audio.load import SAMPLE_RATE

WINDOW = 400
HOP = 160
N_FFT = 512
PREEMPHASIS = 0.97
FRAMES_PER_SECOND = SAMPLE_RATE / HOP
_FRAMES_IN_CACHE = 1000  # per core

Normalisation = Literal["none", "utterance", "global"]
Spectrogram = Literal["phi4", "whisper"]


@dataclass(frozen=True, slots=True)
class MelSettings:
    """Everything that turns a wave into frames; saved in a checkpoint's preprocessor file."""

    n_mels: int = 80
    f_max: float = 7690.0
    """Upper edge of the mel bank in Hz. Lower it to hear band-limited corpora alike."""


@lru_cache(maxsize=8)
def _window(device: torch.device) -> Tensor:
    """(N_FFT,) Hamming window, zero beyond WINDOW, in double precision.

    Scaled to the 16-bit range that the log's floor of 1 refers to.
    """
    window = np.pad(32768.0 * np.hamming(WINDOW), (0, N_FFT - WINDOW))
    return torch.tensor(window, device=device)


@lru_cache(maxsize=8)
def _mel_bank(n_mels: int, f_max: float, device: torch.device) -> Tensor:
    """(2F, M) triangular filters on Kaldi's mel scale, each row twice: real and imaginary part."""
    bank = mel_filter_bank(
        num_frequency_bins=N_FFT // 2 + 1,
        num_mel_filters=n_mels,
        min_frequency=0.0,
        max_frequency=f_max,
        sampling_rate=SAMPLE_RATE,
        triangularize_in_mel_space=True,
        mel_scale="kaldi",
    )
    return torch.tensor(bank.repeat(2, axis=0), dtype=torch.float32, device=device)


def frame_count(n_samples: int) -> int:
    """Mel frames that a wave of `n_samples` gives: only windows that lie whole inside it."""
    return max(0, (n_samples - WINDOW) // HOP + 1)


def log_mel(waves: Tensor, settings: MelSettings | None = None) -> Tensor:
    """Natural-log mel power of `waves` (B, N) in [-1, 1] at 16 kHz, as (B, T, M) float32.

    Frames that reach into a shorter wave's padding are not marked here: lengths travel beside,
    see `frame_count`. Raises ValueError when a wave is shorter than one window (25 ms).
    """
    settings = settings or MelSettings()
    if waves.shape[-1] < WINDOW:
        raise ValueError(
            f"a wave of {waves.shape[-1]} samples is shorter than one window, {WINDOW}"
        )
    bank = _mel_bank(settings.n_mels, settings.f_max, waves.device)
    in_cache = _FRAMES_IN_CACHE * torch.get_num_threads() * HOP // waves.shape[-1]
    rows = len(waves) if waves.is_cuda else max(1, in_cache)
    # The bfloat16 of a surrounding autocast would cost three decimal digits of the log.
    with torch.autocast(waves.device.type, enabled=False):
        return torch.cat([_log_mel(piece, bank) for piece in waves.float().split(rows)])


def _log_mel(waves: Tensor, bank: Tensor) -> Tensor:
    window = _window(waves.device)  # (N_FFT,), zeros beyond WINDOW
    emphasised = F.pad(waves[:, 1:] - PREEMPHASIS * waves[:, :-1], (1, N_FFT - WINDOW))
    frames = emphasised.double().unfold(-1, N_FFT, HOP) * window  # (B, T, N_FFT)
    # A frame's first sample has no predecessor inside the frame and stands in for it.
    first = waves.unfold(-1, WINDOW, HOP)[..., 0]
    frames[..., 0] = first * ((1 - PREEMPHASIS) * window[0])
    spectrum = torch.view_as_real(torch.fft.rfft(frames)).float()  # (B, T, F, 2)
    return (spectrum.square().flatten(-2) @ bank).clamp(min=1.0).log()


def whisper_log_mel(waves: Sequence[Tensor], n_mels: int = 80) -> Tensor:
    """Whisper's own log-mel (B, T, M) of waves (N,), which lie between -1 and about 1.5.

    Its frames are those of `log_mel` in number, and sound 2.5 ms earlier: Whisper's first frame,
    half of which lies before the clip, is left out, and those that reach beyond its end.
    """
    extract = _whisper_extractor(n_mels)
    arrays = [wave.numpy() for wave in waves]
    made = extract(
        arrays, sampling_rate=SAMPLE_RATE, padding="longest", truncation=False, return_tensors="pt"
    )
    longest = max(frame_count(len(wave)) for wave in waves)
    return made.input_features.transpose(1, 2)[:, 1 : 1 + longest]


@lru_cache(maxsize=2)
def _whisper_extractor(n_mels: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=n_mels)


def normalise(
    mel: Tensor,
    lengths: Tensor,
    kind: Normalisation,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Mean-variance normalisation per mel bin over the valid frames; padding becomes 0.

    `mel` (B, T, M), `lengths` (B,) valid frames. `utterance` takes each clip's own statistics,
    `global` the given `mean` and `std` (M,), `none` leaves the values alone.
    """
    valid = torch.arange(mel.shape[1], device=mel.device) < lengths[:, None]  # (B, T)
    mel = mel.where(valid[..., None], mel.new_zeros(()))
    if kind == "utterance":
        n = lengths.clamp(min=1)[:, None, None]
        mean = mel.sum(1, keepdim=True) / n
        centred = (mel - mean).where(valid[..., None], mel.new_zeros(()))
        return centred / (centred.square().sum(1, keepdim=True) / n + 1e-2).sqrt()
    if kind == "global":
        if mean is None or std is None:
            raise ValueError("global normalisation needs the training set's mean and std")
        mel = (mel - mean.to(mel)) / std.to(mel)
        return mel.where(valid[..., None], mel.new_zeros(()))
    return mel
