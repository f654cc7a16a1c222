"""What every measurement of a model has in common: which clips, answers how long."""

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np

from melprobe.audio.augment import add_noise, check_snr
from melprobe.audio.load import SAMPLE_RATE, BadAudio
from melprobe.corpus.manifest import Utterance
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.listener import Listener
from melprobe.model.prompts import Given

AnyGiven = TypeVar("AnyGiven", bound=Given)


def choose(utterances: list[Utterance], limit: int, seed: int) -> list[Utterance]:
    """`limit` utterances drawn without replacement, in the manifest's order."""
    if limit < 0:
        raise UsageError(f"--limit {limit}: take a number of utterances, or 0 for all")
    if seed < 0:
        raise UsageError(f"--seed {seed}: take 0 or a positive number")
    if not limit or limit >= len(utterances):
        return utterances
    places = np.random.default_rng(seed).choice(len(utterances), limit, replace=False)
    return [utterances[i] for i in sorted(places)]


def of_length(utterances: list[Utterance], lengths: str | None) -> list[Utterance]:
    """Those that last from A to B seconds; `lengths` is `A-B`, or None for all."""
    if lengths is None:
        return utterances
    try:
        shortest, longest = map(float, lengths.split("-"))
    except ValueError:
        shortest = longest = math.nan
    if not 0 <= shortest < longest:
        raise UsageError(f"--lengths {lengths}: give seconds from and to, such as 1-2.5")
    if found := [u for u in utterances if shortest <= u.duration <= longest]:
        return found
    durations = [u.duration for u in utterances]
    raise UsageError(
        f"--lengths {lengths}: no clip lasts so long; they last {min(durations):.2f} to "
        f"{max(durations):.2f} s"
    )


def worded(utterances: list[Utterance]) -> tuple[list[Utterance], list[str], list[str]]:
    """Utterances whose words can be read in the place of their audio: those that have any, and

    each text once. Beside them their texts, in plain form, and a line for each that was left out.
    """
    first: dict[str, Utterance] = {}
    left_out = []
    for u in utterances:
        text = plain_text(u.text)
        if not text:
            left_out.append(f"{u.id}: no words to copy")
        elif text in first:
            left_out.append(f"{u.id}: says what {first[text].id} says")
        else:
            first[text] = u
    if not first:
        raise UsageError(f"--copy-text: {left_out[0]}, nor in any of {len(left_out)} clips")
    return list(first.values()), list(first), left_out


def noisy(waves: list[np.ndarray], snr_db: float, seed: int) -> list[np.ndarray]:
    """The waves with noise `snr_db` below each, of a random colour; the same for the same seed."""
    check_snr(snr_db, f"--noise {snr_db:g}")
    rng = np.random.default_rng([seed, 1])
    return [add_noise(wave, snr_db, rng) for wave in waves]


def answer_limit(listener: Listener, utterances: list[Utterance]) -> int:
    """Tokens after which every transcript is cut, under all conditions: half again the longest."""
    return max(_answer_length(listener, u) for u in utterances) * 3 // 2


def leave_out_too_long(
    listener: Listener,
    utterances: list[Utterance],
    given: list[AnyGiven],
    on_bad: Literal["error", "skip"],
) -> list[str]:
    """Take out of both lists, in place, what the decoder has no room for; a line of reason each.

    Room for a clip, its prompt, and an answer of `answer_limit`. Raises as `leave_out` does.
    """
    room = listener.room
    answers = [_answer_length(listener, u) * 3 // 2 for u in utterances]
    fitting = [
        n for n, one in zip(answers, given, strict=True) if listener.positions(one, n) <= room
    ]

    def reason(place: int) -> str | None:
        one, answer = given[place], max(answers[place], *fitting, 0)
        needed = listener.positions(one, answer)
        if needed <= room:
            return None
        what = "a text" if isinstance(one, str) else f"{len(one) / SAMPLE_RATE:.1f} s of audio"
        return (
            f"{what} and an answer of up to {answer} tokens take {needed} positions, and the "
            f"decoder has {room}: cut it"
        )

    return leave_out(utterances, given, reason, on_bad)


def leave_out(
    utterances: list[Utterance],
    given: list[AnyGiven],
    reason: Callable[[int], str | None],
    on_bad: Literal["error", "skip"],
) -> list[str]:
    """Take out of both lists, in place, those for whose place there is a reason; a line for each.

    With `on_bad="error"` the last raises BadAudio; with "skip", having none left does.
    """
    left_out: list[str] = []
    for place in reversed(range(len(utterances))):
        why, u = reason(place), utterances[place]
        if why is None:
            continue
        line = f"{u.place}: {why}"
        if on_bad == "error":
            raise BadAudio(line)
        left_out.insert(0, line)
        del utterances[place], given[place]
    if left_out and not utterances:
        raise BadAudio(f"all {len(left_out)} are too long; the first: {left_out[0]}")
    return left_out


def _answer_length(listener: Listener, utterance: Utterance) -> int:
    return len(listener.processor.answer_ids(plain_text(utterance.text)))
