"""`build hub`: a data set of the Hugging Face hub by its id, streamed, as a corpus like the others.

Audio is decoded by libsndfile from the data set's bytes, not by `datasets`, whose decoder needs
libraries that are often missing. A folder of parquet files can be named in place of an id.
"""

import argparse
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from melprobe.audio.load import BadAudio, decode_wave
from melprobe.corpus.clips import clip_seconds, finish
from melprobe.corpus.manifest import Utterance
from melprobe.errors import UsageError


class NotReadable(UsageError):
    """A configuration, split or column that isn't there, or rows that aren't data."""


class NotReached(NotReadable):
    """No network, no such data set, no access to it, or no `datasets` to read it with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `build hub`."""
    add = parser.add_argument
    add("dataset", help="id, such as openslr/librispeech_asr")
    add("--name", required=True, help="what to call the corpus")
    add("--config", help="the data set's configuration, where it has several")
    add("--split", default="test", help="default %(default)s")
    add("--audio-column", default="audio", help="default %(default)s")
    add("--text-column", default="text", help="default %(default)s")
    add("--speaker-column", help="default: no speakers")
    add("--limit", type=int, help="take only so many rows; default: all")


def build(args: argparse.Namespace, out: Path) -> None:
    """Write 16 kHz FLAC and a manifest of the rows with audio and text.

    Raises UsageError: no network or no such data set, missing columns, `datasets` not installed.
    """
    utterances: list[Utterance] = []
    left_out: list[str] = []
    # Named by what they are rows of: a rebuild takes existing files for the same rows.
    source = [args.dataset, args.config or "", args.split, args.audio_column]
    folder = re.sub(r"\W+", "-", " ".join(source)).strip("-")
    wanted = [c for c in (args.audio_column, args.text_column, args.speaker_column) if c]
    found = stream(args.dataset, args.config, args.split, wanted, args.audio_column)
    rows = track(islice(found, args.limit), f"streaming {args.dataset}", total=args.limit)
    for number, row in enumerate(rows):
        text = str(row[args.text_column] or "").strip()
        if not text:
            left_out.append("without text")
            continue
        path = out / "audio" / folder / f"{number:06d}.flac"
        name = f"{args.dataset} {args.split} row {number}"
        try:
            seconds = clip_seconds(path, partial(decode, row[args.audio_column], name))
        except BadAudio as error:
            left_out.append(f"bad audio, such as {error}")
            continue
        speaker = str(row[args.speaker_column]) if args.speaker_column else ""
        utterances.append(
            Utterance(path.name, path, text, seconds, speaker, source=f"hub:{args.dataset}")
        )
    if not utterances:
        raise UsageError(f"{args.dataset}: no usable row in split {args.split}")
    finish(out, {args.split: utterances}, left_out)


def stream(
    dataset: str, config: str | None, split: str, columns: list[str], audio_column: str
) -> Iterator[dict[str, Any]]:
    """Rows with these columns and undecoded audio, after the first was checked for them.

    Raises NotReadable, or NotReached where no other configuration can be read either.
    """
    try:
        from datasets import Audio, load_dataset
    except ImportError:
        raise NotReached(
            "the hub is read by `datasets`: install it with `pip install 'melprobe[corpora]'`"
        ) from None
    try:
        data = load_dataset(dataset, config, split=split, streaming=True)
        there = list(data.features or next(iter(data.take(1)), {}))
        if missing := [column for column in columns if column not in there]:
            raise NotReadable(
                f"{dataset}: no column {', '.join(missing)}; there are {', '.join(there)}:"
                " name them with --audio-column, --text-column, --speaker-column"
            )
        yield from data.select_columns(columns).cast_column(audio_column, Audio(decode=False))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, OSError):
            asks = "is the id right, and the network up?"
            raise NotReached(f"{dataset}: not readable ({reason}); {asks}") from None
        raise NotReadable(f"{dataset}, split {split}: not readable ({reason})") from None


def decode(audio: dict[str, Any], name: str) -> np.ndarray:
    """`decode_wave` of an undecoded row's audio."""
    data = audio["bytes"] if audio["bytes"] is not None else Path(audio["path"]).read_bytes()
    return decode_wave(data, name)
