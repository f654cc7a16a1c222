"""Where word and phone times come from: a probe of automatic edges can be no better than these."""

from collections import Counter
from collections.abc import Sequence

from melprobe.corpus.manifest import ALIGNED, TEXTGRID, Utterance

UNSAID = "of unsaid origin"
"""In manifests that were aligned, or written, without saying so."""
AUTOMATIC = (ALIGNED, TEXTGRID)
"""TextGrids too, unless somebody knows that a person set their edges."""


def origins(utterances: Sequence[Utterance], *, words: bool) -> dict[str, int]:
    """How many clips have times of their words, or else of their phones, from where."""
    timed = [u for u in utterances if (u.words if words else u.phones)]
    return dict(Counter(u.times or UNSAID for u in timed).most_common())


def untimed(utterances: Sequence[Utterance]) -> dict[str, int]:
    """How many clips have no times at all, by what the aligner said of them."""
    without = [u for u in utterances if not u.words and not u.phones]
    return dict(Counter(u.no_times or "never aligned" for u in without).most_common())
