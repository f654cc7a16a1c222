"""Which clips train a probe, choose its penalty and test it, so that neither words nor voices leak.

Synthesis repeats sentences across voices, and a corpus its speakers across sentences: a test clip
whose sentence or voice was trained on can be answered from memory. So each voice has one split and
each normalised sentence too, and a clip whose two differ is dropped.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError

NAMES = ("train", "dev", "test")
SHARES = (0.5, 0.2, 0.3)
LARGE = 0.1
"""Share of all clips above which a voice is placed before the others."""
DROPPED = -1


class Split(NamedTuple):
    """The split of each of U utterances."""

    of: NDArray[np.int64]
    """(U,) number among `NAMES`, or `DROPPED`"""
    speakers_apart: bool
    dropped: int
    """clips whose sentence belongs to one split and whose voice to another"""

    def rows(self, utterance: NDArray[np.int64], name: str) -> NDArray[np.bool_]:
        """Which rows, whose utterances' numbers are (N,), belong to a split; (N,)."""
        return (self.of == NAMES.index(name))[utterance]


def split_clips(
    texts: Sequence[str],
    voices: Sequence[str],
    sexes: Sequence[str],
    *,
    speakers_apart: bool,
    seed: int,
) -> Split:
    """Split U clips by what they say and, unless told not to, by who speaks.

    Voices that are not known ("") stand each for themselves. Each voice goes where most clips are
    lacking, in chance's order and each sex by itself, so that all splits hear both; each sentence
    where most of its clips are. UsageError where a split stays empty: with fewer than three voices,
    or sentences.
    """
    owners = [
        voice or f"clip {i}" if speakers_apart else plain_text(text)
        for i, (voice, text) in enumerate(zip(voices, texts, strict=True))
    ]
    owner_split = _shared_out(owners, sexes, seed)
    of_owner = [owner_split[owner] for owner in owners]
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for text, place in zip(texts, of_owner, strict=True):
        votes[plain_text(text)][place] += 1
    at = {text: min(c, key=lambda place: (-c[place], place)) for text, c in votes.items()}
    pairs = zip(texts, of_owner, strict=True)
    found = [place if at[plain_text(text)] == place else DROPPED for text, place in pairs]
    if empty := [name for i, name in enumerate(NAMES) if i not in found]:
        what = "voices" if speakers_apart else "sentences"
        raise UsageError(
            f"{len(set(owners))} {what} in {len(texts)} clips leave {' and '.join(empty)} without "
            "any: capture more clips (--limit 0 takes all of a manifest)"
        )
    return Split(np.array(found), speakers_apart, found.count(DROPPED))


def _shared_out(owners: Sequence[str], kinds: Sequence[str], seed: int) -> dict[str, int]:
    """A split for each distinct owner of clips, so that those of each kind come near `SHARES`."""
    sizes, kind_of, totals = Counter(owners), dict(zip(owners, kinds, strict=True)), Counter(kinds)
    order = sorted(sizes)
    random.Random(f"splits {seed}").shuffle(order)
    # Those that would overfill a split come first; the sort is stable, so chance decides the rest,
    # and test voices are as many as their share of clips lets one hope.
    busy = LARGE * len(owners)
    order.sort(key=lambda owner: -sizes[owner] if sizes[owner] > busy else 0)
    filled = {kind: [0] * len(NAMES) for kind in totals}
    found = {}
    for owner in order:
        kind = kind_of[owner]
        have = zip(SHARES, filled[kind], strict=True)
        lacking = [share * totals[kind] - clips for share, clips in have]
        found[owner] = place = lacking.index(max(lacking))
        filled[kind][place] += sizes[owner]
    return found
