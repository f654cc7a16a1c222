"""The clips that a recipe's data name: recordings, or words cut out of them, that no test holds."""

from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from melprobe.audio.load import SAMPLE_RATE, load_utterance
from melprobe.corpus.leakage import without_leaks
from melprobe.corpus.manifest import Span, Utterance, find_manifest, read_manifest
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.training.recipe import Data

_MARGIN = 0.04  # seconds left around words that are cut out: their edges are not that sharp


@dataclass(frozen=True, slots=True)
class Clip:
    """What training reads as one example: a recording, or a few words cut out of one."""

    id: str
    """Unique in the run, also when a corpus is read several times."""
    source: Utterance
    text: str
    start: float
    """Seconds into the recording."""
    duration: float

    def wave(self) -> np.ndarray:
        """Samples of the clip (N,), 16 kHz."""
        wave = load_utterance(self.source)
        start = round(self.start * SAMPLE_RATE)
        return wave[start : start + round(self.duration * SAMPLE_RATE)]

    def words(self) -> list[Span]:
        """When its words are said, in seconds of the recording; empty where that is unknown."""
        end = self.start + self.duration
        return [w for w in self.source.words if self.start <= (w.start + w.end) / 2 <= end]

    def words_are_timed(self) -> bool:
        """Whether it is known when each word of the text is said."""
        return len(self.words()) == len(plain_text(self.text).split())


def load_corpora(data: Data) -> tuple[list[Clip], dict[str, int]]:
    """Training clips, and how many utterances each corpus lost to the leak check.

    An utterance is dropped when its text is near-equal to one in any dev or test manifest.
    """
    held_out = [u for name in (*data.dev, *data.test) for u in read_manifest(find_manifest(name))]
    corpora = {c.manifest: read_manifest(find_manifest(c.manifest)) for c in data.train}
    # All corpora at once: a chain of near-equal texts may run from one through another.
    kept, _ = without_leaks([u for corpus in corpora.values() for u in corpus], held_out)
    clean = {(u.audio, u.bytes) for u in kept}
    clips: list[Clip] = []
    dropped: dict[str, int] = {}
    for number, corpus in enumerate(data.train):
        usable = [u for u in corpora[corpus.manifest] if (u.audio, u.bytes) in clean]
        dropped[corpus.manifest] = len(corpora[corpus.manifest]) - len(usable)
        usable = [u for u in usable if _lot(u) < corpus.share]
        if corpus.crop_words:  # the aligner refuses a clip in a hundred
            usable = [u for u in usable if u.words]
            if not usable:
                raise UsageError(
                    f"data.train.{number}: crop_words needs word times, and no clip of "
                    f"{corpus.manifest} has any; see `python -m melprobe.corpus align`"
                )
        for copy in range(corpus.repeat):
            for u in usable:
                clips += _clips(u, f"{number}:{copy}:{u.id}", corpus.crop_words)
    # A word or two cut out of a clean sentence may be the whole of a test's.
    pieces, _ = without_leaks([replace(c.source, id=c.id, text=c.text) for c in clips], held_out)
    clean_ids = {u.id for u in pieces}
    clips = [clip for clip in clips if clip.id in clean_ids]
    if not clips:
        raise UsageError("data.train: no utterance is left after the leak check")
    return clips, dropped


def _lot(u: Utterance) -> float:
    """A number from 0 to 1 that an utterance drew for good."""
    return crc32(str(u.id).encode()) / 2**32


def _clips(u: Utterance, name: str, crop_words: int | None) -> list[Clip]:
    """The utterance whole, or cut between words into pieces of `crop_words` words."""
    if crop_words is None:
        return [Clip(name, u, u.text, 0.0, u.duration)]
    clips = []
    for first in range(0, len(u.words), crop_words):
        piece = u.words[first : first + crop_words]
        start = max(0.0, piece[0].start - _MARGIN)
        seconds = min(u.duration, piece[-1].end + _MARGIN) - start
        if seconds <= 0:
            raise UsageError(f"{u.where}: words: {piece[0].label!r} is said after the clip's end")
        text = " ".join(word.label for word in piece)
        clips.append(Clip(f"{name}@{first}", u, text, start, seconds))
    return clips


def dev_clips(names: tuple[str, ...], per_manifest: int) -> dict[str, list[Utterance]]:
    """The same few clips of each dev manifest every time, spread evenly over it."""
    chosen = {}
    for name in names:
        utterances = read_manifest(find_manifest(name))
        places = np.linspace(0, len(utterances) - 1, min(per_manifest, len(utterances)))
        chosen[name] = [utterances[int(i)] for i in places]
    return chosen
