"""How high and how loud: the fundamental frequency and the energy of a wave, every 10 ms.

F0 by autocorrelation of windowed frames over that of the window (Boersma 1993, the method of
Praat's `To Pitch (ac)`), without Praat's search for a path: each frame's best peak, then a median
over five frames, which takes out most jumps by an octave. Tested against Praat itself.

Shapes: N samples, T frames, W samples of a frame.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.ndimage import median_filter

from melprobe.audio.load import SAMPLE_RATE
from melprobe.audio.mel import HOP, WINDOW, frame_count

LOWEST, HIGHEST = 75.0, 500.0
"""Hz"""
VOICED = 0.5
"""Autocorrelation from which on a frame counts as voiced, 1 being a perfect period."""
QUIET = 0.03
"""Share of the clip's peak below which a frame is silence."""
_FRAME = 640  # three periods of the lowest
OCTAVE_COST = 0.02
"""Advantage of a candidate an octave higher: a period fits twice its length as well."""
SMOOTHED = 5
FLOOR_DB = -80.0


def pitch(wave: NDArray[np.float32]) -> NDArray[np.float64]:
    """F0 in Hz (T,) of a wave (N,) at 16 kHz, NaN where it is not voiced.

    A frame's middle is that of the mel frame of its number; there are as many.
    """
    count = frame_count(len(wave))
    if not count:
        return np.empty(0)
    margin = (_FRAME - WINDOW) // 2
    padded = np.pad(wave.astype(np.float64), (margin, margin + HOP))
    frames = sliding_window_view(padded, _FRAME)[::HOP][:count]
    frames = frames - frames.mean(1, keepdims=True)
    loud = np.abs(frames).max(1) >= QUIET * np.abs(wave).max()
    lags = np.arange(int(SAMPLE_RATE / HIGHEST), int(SAMPLE_RATE / LOWEST) + 1)
    likeness = _autocorrelation(frames)[:, lags[0] - 1 : lags[-1] + 2]
    middle = likeness[:, 1:-1]
    peak = (middle >= likeness[:, :-2]) & (middle >= likeness[:, 2:]) & (middle > 0)
    worth = np.where(peak, middle - OCTAVE_COST * np.log2(lags / lags[0]), -np.inf)
    best = worth.argmax(1)
    rows = np.arange(count)
    before, at, after = (likeness[rows, best + k] for k in range(3))
    bend = before - 2 * at + after
    shift = np.divide((before - after) / 2, bend, out=np.zeros(count), where=bend < 0)
    found = SAMPLE_RATE / (lags[best] + shift)
    found[~(loud & peak[rows, best] & (at >= VOICED))] = np.nan
    return _smoothed(found)


def energy(wave: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean power (T,) of the hops at the middle of each mel frame, in dB of full scale."""
    count = frame_count(len(wave))
    start = (WINDOW - HOP) // 2
    hops = wave[start : start + count * HOP].astype(np.float64).reshape(count, HOP)
    return 10 * np.log10(np.maximum((hops**2).mean(1), 10 ** (FLOOR_DB / 10)))


def _autocorrelation(frames: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T, W): 1 at lag 0, corrected for the window's fading out."""
    window = np.hanning(_FRAME)

    def correlate(x: NDArray[np.float64]) -> NDArray[np.float64]:
        power = np.abs(np.fft.rfft(x, 2 * _FRAME)) ** 2
        return np.fft.irfft(power)[..., :_FRAME]

    found, fade = correlate(frames * window), correlate(window)
    whole = np.maximum(found[:, :1], 1e-12)
    # Beyond half of the window its own correlation is so small that noise is blown up.
    return (found / whole) / np.maximum(fade / fade[0], 0.05)


def _smoothed(f0: NDArray[np.float64]) -> NDArray[np.float64]:
    """A median over each voiced stretch of frames."""
    voiced = np.isfinite(f0)
    edges = np.flatnonzero(np.diff(np.r_[False, voiced, False].astype(int)))
    for start, end in edges.reshape(-1, 2):
        f0[start:end] = median_filter(f0[start:end], SMOOTHED, mode="nearest")
    return f0
