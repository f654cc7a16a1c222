"""What corpora of recordings do: write clips as 16 kHz FLAC, and say what came of it."""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table

from melprobe.audio.load import SAMPLE_RATE
from melprobe.corpus.manifest import Utterance, write_manifest


def write_clip(path: Path, wave: np.ndarray) -> None:
    """Write float32 [N] at 16 kHz as FLAC, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    # Lossy codecs overshoot full scale, and the integer samples of a FLAC would wrap around.
    soundfile.write(draft, np.clip(wave, -1, 1), SAMPLE_RATE, "PCM_16", format="FLAC")
    draft.replace(path)


def clip_seconds(path: Path, wave: Callable[[], np.ndarray]) -> float:
    """Seconds of the FLAC at `path`; it is written, from `wave()`, only if it isn't there yet."""
    if not path.exists():
        write_clip(path, wave())
    return soundfile.info(path).duration


def add_on_bad_audio(parser: argparse.ArgumentParser) -> None:
    """The option of builders that know each recording beforehand."""
    parser.add_argument(
        "--on-bad-audio",
        choices=["error", "skip"],
        default="error",
        help="stop at a bad recording, or leave it out and say so (default %(default)s)",
    )


def name_left_out(reasons: Iterable[str]) -> None:
    """A line on stderr for each recording that was left out."""
    console = Console(stderr=True)
    for reason in reasons:
        console.print(reason, highlight=False, markup=False, soft_wrap=True)


def finish(folder: Path, splits: dict[str, list[Utterance]], left_out: Iterable[str]) -> None:
    """Write each split's manifest, and `show` them."""
    for split, utterances in splits.items():
        write_manifest(folder / f"{split}.jsonl", utterances)
    show(folder, splits, left_out)


def show(folder: Path, splits: dict[str, list[Utterance]], left_out: Iterable[str]) -> None:
    """Print clips, minutes and speakers of each split, and why clips were left out."""
    table = Table("split", "clips", "minutes", "speakers", title=str(folder))
    for split, utterances in splits.items():
        minutes = sum(u.duration for u in utterances) / 60
        speakers = len({u.speaker for u in utterances} - {""}) or "not named"
        table.add_row(split, str(len(utterances)), f"{minutes:.1f}", str(speakers))
    console = Console()
    console.print(table)
    for reason, count in Counter(left_out).most_common():
        console.print(f"left out: {count} {reason}", highlight=False)
