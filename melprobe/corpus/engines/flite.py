"""flite, called in this process through its C library: four voices, ARPAbet phones.

The library knows which word each phone belongs to, which the command's `-psdur` does not print.
Times agree with the energy of the sound within about 20 ms.
"""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from melprobe.corpus.engines import Clip, Segment, Spoken
from melprobe.errors import UsageError

VOICES = ("awb", "rms", "slt", "kal16")
_PAUSES = {"pau", "ssil"}


class _Wave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class _Voice(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


def check() -> None:
    """Raises UsageError if flite is not installed."""
    _library()


def speak(clips: Sequence[Clip]) -> Iterator[Spoken]:
    """One result for each clip, in order."""
    flite = _library()
    for clip in clips:
        voice = _voice(clip.voice)
        flite.feat_set_float(voice.contents.features, b"duration_stretch", 1 / clip.speed)
        utterance = flite.flite_synth_text(clip.text.encode("ascii"), voice)
        wave = flite.utt_wave(utterance).contents
        samples = np.ctypeslib.as_array(wave.samples, (wave.count,)).copy()
        segments = list(_segments(flite, utterance, wave.count / wave.rate))
        spoken = Spoken(samples, wave.rate, segments)
        flite.delete_utterance(utterance)  # and with it the wave
        yield spoken


def _segments(flite: Any, utterance: int, duration: float) -> Iterator[Segment]:
    item = flite.relation_head(flite.utt_relation(utterance, b"Segment"))
    start = 0.0
    while item:
        name = flite.ffeature_string(item, b"name").decode()
        # kal16's last pause is cut in the sound but not in the times.
        end = min(flite.item_feat_float(item, b"end"), duration)
        token = flite.flite_path_to_item(item, b"R:SylStructure.parent.parent.R:Token.parent")
        yield Segment("" if name in _PAUSES else name, start, end, token)
        start = end
        item = flite.item_next(item)


@cache
def _library() -> Any:
    pointer, text, real = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
    flite = _load("libflite.so.1")
    for name, result, arguments in (
        ("flite_synth_text", pointer, [text, ctypes.POINTER(_Voice)]),
        ("utt_wave", ctypes.POINTER(_Wave), [pointer]),
        ("utt_relation", pointer, [pointer, text]),
        ("relation_head", pointer, [pointer]),
        ("item_next", pointer, [pointer]),
        ("item_feat_float", real, [pointer, text]),
        ("ffeature_string", text, [pointer, text]),
        ("flite_path_to_item", pointer, [pointer, text]),
        ("feat_set_float", None, [pointer, text, real]),
        ("delete_utterance", None, [pointer]),
    ):
        function = getattr(flite, name)
        function.restype, function.argtypes = result, arguments
    flite.flite_init()
    return flite


@cache
def _voice(name: str) -> Any:
    register = getattr(_load(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
    register.restype, register.argtypes = ctypes.POINTER(_Voice), [ctypes.c_void_p]
    return register(None)


def _load(name: str) -> ctypes.CDLL:
    try:
        # Global, because the voices use symbols of the main library.
        return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        raise UsageError(f"flite's {name} is not installed: run `apt install flite`") from None
