"""`python -m melprobe.corpus align NAME...`: word and phone times for human recordings.

Forced alignment by pocketsphinx with its US English model: first the words, then the phones in
each. Utterances without times get `words` (as in the text, lower-case, without punctuation) and
`phones` (ARPAbet, lower-case, without stress), and `times` says that they are from here; their
manifest is written again at the end. A word that the CMU dictionary lacks is said as the same word
without its s, and an s; or else, and any numeral, as espeak-ng says it, if that is installed. A
clip with yet another word, or that can't be aligned, gets the reason as `no_times`.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from rich.progress import track

from melprobe.audio.load import SAMPLE_RATE, BadAudio, load_utterance
from melprobe.corpus.manifest import ALIGNED, Span, Utterance
from melprobe.corpus.phones import fold
from melprobe.corpus.text import plain_text
from melprobe.corpus.timing import Times, add_out, open_sheets, write_joined, write_sheet
from melprobe.errors import UsageError

NO_PATH, UNKNOWN = "not alignable", "with words not in the dictionary"
BAD = "with bad audio"
FRAME_SECONDS = 0.01
HALF_WINDOW = 0.0078
"""A frame's 25.6 ms window is this much later, in the middle, than the 10 ms that it counts for."""
LONGEST_PHONE = 1.0
"""Seconds. In 29,000 words of two corpora six phones are longer, next to pauses or other words."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `align`."""
    add = parser.add_argument
    add("manifests", nargs="+", metavar="NAME", help="such as queen/train, or a manifest file")
    add_out(parser)
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Align manifests, one after the other, and print a line about each.

    In place, or into one that holds them all.

    Raises UsageError, before any work, if pocketsphinx or a manifest is missing, or a manifest
    can't be written.
    """
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: take at least 1")
    known = load_decoder().lookup_word
    sheets = open_sheets(args.manifests, args.out)
    for sheet in sheets:
        todo = [i for i, u in enumerate(sheet.utterances) if not u.words and not u.phones]
        added = pronunciations([sheet.utterances[i] for i in todo], known)
        pool = ProcessPoolExecutor(
            args.jobs, multiprocessing.get_context("spawn"), _begin_worker, (added,)
        )
        bad_audio: list[BadAudio] = []
        with pool:
            found = pool.map(_align, [sheet.utterances[i] for i in todo], chunksize=8)
            shown = track(found, f"aligning {sheet.name}", len(todo))
            for i, times in zip(todo, shown, strict=True):
                match times:
                    case Times():
                        sheet.give(i, times, ALIGNED)
                    case BadAudio():
                        bad_audio.append(times)
                        sheet.leave(i, BAD)
                    case reason:
                        sheet.leave(i, reason)
        if args.out is None:
            write_sheet(sheet)
        for error in bad_audio:
            print(error, file=sys.stderr)
        sheet.tell("aligned")
    if args.out is not None:
        write_joined(sheets, args.out)


def load_decoder(added: dict[str, list[str]] | None = None) -> Any:
    """A pocketsphinx Decoder whose dictionary has the `added` pronunciations as well.

    Raises UsageError if pocketsphinx is not installed.
    """
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise UsageError("pocketsphinx is not installed: run `pip install pocketsphinx`") from None
    # With the best path of the word lattice, the last words of a text may be missing.
    decoder = Decoder(lm=None, bestpath=False, loglevel="FATAL")
    for word, ways in (added or {}).items():
        for number, phones in enumerate(ways, 1):
            decoder.add_word(f"{word}({number})" if number > 1 else word, phones, update=False)
    return decoder


def align(decoder: Any, text: str, wave: np.ndarray) -> Times | None:
    """Times of the words of `text`, as `plain_text` has them, in a wave [N] at 16 kHz.

    None where no path through the words survives the search's beam, which is pocketsphinx's for
    recognition (of human clips it refused 1 % with their own text, 44 % with another clip's), or
    where a phone lasts implausibly long. One wrong word among many goes unnoticed. Raises
    RuntimeError for a word that is not in the dictionary.
    """
    samples = np.round(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes()
    decoder.set_align_text(text)
    _decode(decoder, samples)
    if decoder.hyp() is None:
        return None
    decoder.set_alignment()
    try:
        _decode(decoder, samples)
    except RuntimeError:
        return None
    words, phones = list[Span](), list[Span]()
    # Entries are gone once the iteration is past them, and all of them with the alignment.
    alignment = decoder.get_alignment()
    for word in alignment:
        if not word.name.startswith(("<", "[")):  # silence and noise
            words.append(_span(re.sub(r"\(\d+\)$", "", word.name), word, len(wave)))
            phones += [_span(phone.name.lower(), phone, len(wave)) for phone in word]
    if [word.label for word in words] != text.split():
        return None
    if any(phone.end - phone.start > LONGEST_PHONE for phone in phones):
        return None
    return Times(tuple(words), tuple(phones))


def pronunciations(
    utterances: Sequence[Utterance], known: Callable[[str], str | None]
) -> dict[str, list[str]]:
    """Ways to say each word that the dictionary (`known`) lacks, where there are any."""
    words = {word for u in utterances for word in plain_text(u.text).split() if not known(word)}
    ways = {word: _with_s(word, known) or _espeak(word) for word in sorted(words)}
    return {word: found for word, found in ways.items() if found}


def _with_s(word: str, known: Callable[[str], str | None]) -> list[str]:
    """A possessive or a plural, said as the word that it is of, and an s."""
    base = re.sub("'?s$", "", word)
    phones = known(base) if base != word else None
    match phones.split()[-1] if phones else None:
        case None:
            return []
        case "S" | "Z" | "SH" | "ZH" | "CH" | "JH":
            return [f"{phones} IH Z"]
        case "P" | "T" | "K" | "F" | "TH":
            return [f"{phones} S"]
    return [f"{phones} Z"]


def _espeak(word: str) -> list[str]:
    """The way espeak-ng says a word; a numeral also digit by digit, and 1844 as 18 44."""
    espeak = shutil.which("espeak-ng")
    if espeak is None:
        return []
    texts = {word}
    if word.isdecimal():
        texts |= {" ".join(word), f"{word[:-2]} {word[-2:]}".strip()}
    ways = set()
    for text in texts:
        command = [espeak, "-q", "--ipa", "--sep=_", "-v", "en-us", "--", text]
        said = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
        labels = re.sub("[ˈˌ]", "", said).replace("_", " ").split()
        try:
            ways.add(" ".join(phone.upper() for label in labels for phone in fold(label)))
        except UsageError:  # a sound that fold() does not know
            continue
    return sorted(ways - {""})


_decoder: Any = None
"""This worker's."""


def _begin_worker(added: dict[str, list[str]]) -> None:
    global _decoder
    _decoder = load_decoder(added)


def _align(utterance: Utterance) -> Times | BadAudio | str:
    """The times of one utterance, or the reason why it has none."""
    text = plain_text(utterance.text)
    if not all(map(_decoder.lookup_word, text.split())):
        return UNKNOWN
    try:
        wave = load_utterance(utterance)
    except BadAudio as error:
        return error
    return align(_decoder, text, wave) or NO_PATH


def _decode(decoder: Any, samples: bytes) -> None:
    # Or the noise floor goes on from clip to clip, and a clip's times depend on those before it.
    decoder.reinit_feat()
    decoder.start_utt()
    decoder.process_raw(samples, full_utt=True)
    decoder.end_utt()


def _span(label: str, entry: Any, samples: int) -> Span:
    frames = (entry.start, entry.start + entry.duration)
    # The last frame is padded.
    times = [min(n * FRAME_SECONDS + HALF_WINDOW, samples / SAMPLE_RATE) for n in frames]
    return Span(label, *(round(seconds, 4) for seconds in times))
