"""What training does to clips so that voices and rooms it never heard still sound familiar.

Every function draws from the generator it is given, so a step's batch can be made again.
"""

from collections.abc import Sequence

import numpy as np
import soxr
import torch
from scipy.fft import irfft, next_fast_len, rfft
from torch import Tensor
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from melprobe.audio.load import SAMPLE_RATE
from melprobe.errors import UsageError


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play `wave` (N,) `factor` times as fast: tempo, pitch and formants move together."""
    if abs(factor - 1) < 0.005:
        return wave
    return soxr.resample(wave, SAMPLE_RATE * factor, SAMPLE_RATE, quality="QQ").astype(np.float32)


def check_snr(snr_db: float, named: str) -> None:
    """UsageError for decibels beyond 100: there float32 holds the clip or the noise, not both."""
    if not abs(snr_db) <= 100:
        raise UsageError(f"{named}: give decibels from -100 to 100, such as 10")


def add_noise(wave: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add noise of a random colour, from white to brown, at `snr_db` below the clip's power."""
    size = next_fast_len(len(wave), real=True)  # a prime length takes ten times as long
    spectrum = rfft(rng.standard_normal(size, dtype=np.float32))
    spectrum[1:] /= np.arange(1, len(spectrum), dtype=np.float32) ** rng.uniform(0.0, 1.0)
    noise = irfft(spectrum, size)[: len(wave)]
    power = float(np.mean(wave**2)) / max(float(np.mean(noise**2)), 1e-12)
    return wave + noise * np.sqrt(power / 10 ** (snr_db / 10)).astype(np.float32)


def warp_frequency(
    mel: Tensor, factors: np.ndarray, f_max: float, mel_scale: str = "kaldi"
) -> Tensor:
    """Move what stands at f Hz in `mel` (B, T, M) to f times the row's `factors` (B,).

    A longer or shorter vocal tract at the same tempo (Jaitly and Hinton 2013, VTLP). The bank's
    upper edge is `f_max`; beyond what it has, the last bin is repeated.
    """
    bins = mel.shape[2]
    step = hertz_to_mel(f_max, mel_scale="kaldi") / (bins + 1)  # filter m is centred at m + 1
    centres = mel_to_hertz(step * np.arange(1, bins + 1), mel_scale)
    places = hertz_to_mel(centres / factors[:, None], mel_scale) / step - 1  # (B, M)
    places = torch.tensor(places.clip(0, bins - 1), dtype=mel.dtype)
    low = places.long().clamp(max=bins - 2)
    part = (places - low)[:, None]  # (B, 1, M)
    index = low[:, None].expand_as(mel)
    return mel.gather(2, index) * (1 - part) + mel.gather(2, index + 1) * part


def spec_augment(
    mel: Tensor,
    lengths: Tensor,
    rngs: Sequence[np.random.Generator],
    *,
    time_masks: int,
    time_mask_frames: int,
    frequency_masks: int,
    frequency_mask_bins: int,
) -> Tensor:
    """Blank stripes of normalised `mel` (B, T, M) in time and frequency (Park et al. 2019).

    rngs: one for each row, of which padding draws nothing.
    A time mask never covers more than a fifth of a clip: a short word must survive.
    """
    mel = mel.clone()
    for row, (length, rng) in enumerate(zip(lengths.tolist(), rngs, strict=True)):
        for _ in range(time_masks):
            width = int(rng.integers(0, max(1, min(time_mask_frames, length // 5)) + 1))
            start = int(rng.integers(0, max(1, length - width)))
            mel[row, start : start + width] = 0.0
        for _ in range(frequency_masks):
            width = int(rng.integers(0, frequency_mask_bins + 1))
            start = int(rng.integers(0, mel.shape[2] - width))
            mel[row, :, start : start + width] = 0.0
    return mel
