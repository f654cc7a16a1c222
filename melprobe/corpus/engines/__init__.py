"""Speech synthesisers from Debian packages that say when each phone and word sounds.

An engine is a module with `VOICES`, `check()` (is it installed?) and
`speak(clips)`. Phone labels are the engine's own: ARPAbet for flite and festival, IPA for espeak.
Pauses carry no label: what lies between two phones that do not touch is silence.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from melprobe.corpus.manifest import Span


@dataclass(frozen=True, slots=True)
class Clip:
    """One thing to say and how."""

    text: str
    """Words of ASCII letters and apostrophes, with light punctuation."""
    engine: str
    voice: str
    speed: float = 1.0
    """Relative to the engine's own rate; above 1 is faster."""
    pitch: int = 50
    """0 to 100, 50 is the voice's own; only espeak heeds it."""
    lead: float = 0.0
    """Seconds of silence put before it, and `tail` after it."""
    tail: float = 0.0


class Segment(NamedTuple):
    """A phone as an engine reports it."""

    label: str
    """Empty for a pause."""
    start: float
    end: float
    token: Hashable
    """Tells the words of the text apart; None where the engine added a sound between words."""


class Spoken(NamedTuple):
    """What an engine made of a clip."""

    samples: np.ndarray
    """int16 [N], mono."""
    rate: int
    segments: list[Segment]


class Engine(Protocol):
    """What each engine module offers."""

    VOICES: tuple[str, ...]

    def check(self) -> None:
        """Raises UsageError that names the Debian package if the engine is not installed."""

    def speak(self, clips: Sequence[Clip]) -> Iterator[Spoken]:
        """One result for each clip, in order."""


def word_labels(text: str) -> list[str]:
    """The words of a text as the manifest labels them: lower case, without punctuation."""
    return [word.strip(".,;:!?'").lower() for word in text.split()]


def spans(text: str, segments: Iterable[Segment]) -> tuple[list[Span], list[Span]] | None:
    """Phones and words of a clip, in seconds; None if the engine spoke other words than the text.

    A sound that belongs to no word (festival's linking r) goes to the word before it. Phones that
    the engine gives no time of their own (espeak's l after some vowels) are left out.
    """
    phones: list[Span] = []
    words: list[tuple[Hashable, float, float]] = []
    for segment in segments:
        if not segment.label:
            continue
        if words and segment.token in (None, words[-1][0]):
            token, start, _ = words.pop()
        else:
            token, start = segment.token, segment.start
        words.append((token, start, segment.end))
        if segment.end > segment.start:
            phones.append(Span(segment.label, round(segment.start, 4), round(segment.end, 4)))
    labels = word_labels(text)
    if len(words) != len(labels):
        return None
    return phones, [
        Span(label, round(start, 4), round(end, 4))
        for label, (_, start, end) in zip(labels, words, strict=True)
    ]
