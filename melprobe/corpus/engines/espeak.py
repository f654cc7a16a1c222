"""espeak-ng, called in this process through its C library: 8 accents x 99 variants, IPA phones.

Phone and word events carry sample positions, so times are exact. A phone's label is the IPA that
the library reports, which its event cuts at 8 bytes.
"""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from melprobe.corpus.engines import Clip, Segment, Spoken
from melprobe.errors import UsageError

# `en` is British English.
ACCENTS = (
    *("en", "en-us", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),
    *("en-gb-x-rp", "en-us-nyc"),
)
# All that Debian 12 has but `fast` (a speed test) and `Mr serious` (its name has a space).
VARIANTS = (
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "AnxiousAndy", "Demonic", "Denis", "Diogo"),
    *("Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike"),
    *("Nguyen", "RicishayMax", "RicishayMax2", "RicishayMax3", "Storm", "Tweaky", "UniRobot"),
    *("adam", "anika", "anikaRobot", "announcer", "antonio", "aunty", "belinda", "benjamin"),
    *("boris", "caleb", "croak", "david", "ed", "edward", "edward2", "f1", "f2", "f3", "f4"),
    *("f5", "grandma", "grandpa", "gustave", "iven", "iven2", "iven3", "iven4", "john"),
    *("kaukovalta", "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "klatt6", "linda", "m1"),
    *("m2", "m3", "m4", "m5", "m6", "m7", "m8", "marcelo", "max", "michel", "miguel", "norbert"),
    *("pablo", "paul", "pedro", "quincy", "rob", "robert", "robosoft", "robosoft2", "robosoft3"),
    *("robosoft4", "robosoft5", "robosoft6", "robosoft7", "robosoft8", "sandro", "shelby"),
    *("steph", "steph2", "steph3", "travis", "victor", "whisper", "whisperf", "zac"),
)
VOICES = tuple(f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS)
WORDS_PER_MINUTE = 160

_SYNCHRONOUS, _PHONEME_EVENTS, _IPA, _UTF8 = 2, 1, 2, 1
_RATE, _PITCH = 1, 3
_END, _WORD, _PHONEME = 0, 1, 7


class _Id(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("string", ctypes.c_char * 8))


class _CEvent(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


class _Voice(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
    )


class Event(NamedTuple):
    """A word begins or a phone (`label`; empty for a pause) begins."""

    is_word: bool
    sample: int
    label: str = ""


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_CEvent)
)


def check() -> None:
    """Raises UsageError if espeak-ng is not installed."""
    _synthesiser()


def speak(clips: Sequence[Clip]) -> Iterator[Spoken]:
    """One result for each clip, in order."""
    synthesiser = _synthesiser()
    for clip in clips:
        yield synthesiser.speak(clip)


def segments(events: Sequence[Event], rate: int, samples: int) -> list[Segment]:
    """Phones with the number of the word event before them; each lasts until the next one."""
    word, phones = 0, list[tuple[str, int, int]]()
    for event in events:
        if event.is_word:
            word += 1
        else:
            phones.append((event.label, event.sample, word))
    phones.append(("", samples, word))
    return [
        Segment(label, start / rate, min(end, samples) / rate, word)
        for (label, start, word), (_, end, _) in pairwise(phones)
    ]


class _Synthesiser:
    """The library, which keeps one voice and one callback for the whole process."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError:
            raise UsageError("espeak-ng is not installed: run `apt install espeak-ng`") from None
        self.rate: int = self.library.espeak_Initialize(
            _SYNCHRONOUS, 0, None, _PHONEME_EVENTS | _IPA
        )
        self.library.espeak_GetCurrentVoice.restype = ctypes.POINTER(_Voice)
        self.chunks: list[np.ndarray] = []
        self.events: list[Event] = []
        self.callback = _Callback(self._receive)  # kept, or the library calls freed memory
        self.library.espeak_SetSynthCallback(self.callback)

    def speak(self, clip: Clip) -> Spoken:
        self.chunks, self.events = [], []
        self.library.espeak_SetVoiceByName(clip.voice.encode())
        # A variant that is missing is passed over without an error.
        identifier = self.library.espeak_GetCurrentVoice().contents.identifier.decode()
        if not identifier.endswith(clip.voice.partition("+")[2]):
            raise UsageError(f"espeak-ng has {identifier} instead of {clip.voice}: mend --engines")
        self.library.espeak_SetParameter(_RATE, round(WORDS_PER_MINUTE * clip.speed), 0)
        self.library.espeak_SetParameter(_PITCH, clip.pitch, 0)
        # A zero-width space keeps espeak from joining "of the" into one word without an own time.
        text = " \u200b".join(clip.text.split()).encode()
        self.library.espeak_Synth(text, len(text) + 1, 0, 0, 0, _UTF8, None, None)
        samples = np.concatenate(self.chunks)
        return Spoken(samples, self.rate, segments(self.events, self.rate, len(samples)))

    def _receive(self, wave: Any, count: int, events: Any) -> int:
        if wave and count > 0:
            self.chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        index = 0
        while (event := events[index]).type != _END:
            if event.type == _WORD:
                self.events.append(Event(True, event.sample))
            elif event.type == _PHONEME:
                label = event.id.string.decode(errors="ignore")
                self.events.append(Event(False, event.sample, label))
            index += 1
        return 0


@cache
def _synthesiser() -> _Synthesiser:
    return _Synthesiser()
