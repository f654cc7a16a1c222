"""`build jsonl`: your own recordings, each opened and checked, as a corpus like the others.

Takes melprobe's manifest fields, or `audio_filepath` for `audio` as NeMo's manifests have it; a
missing `duration` is measured, one that is there is held against the audio. Any rate, channel count
and format that libsndfile reads.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from melprobe.audio.load import SAMPLE_RATE, BadAudio, load_utterance, load_wave
from melprobe.corpus.clips import finish, write_clip
from melprobe.corpus.manifest import Utterance, parse_record, read_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `build jsonl`."""
    parser.add_argument("manifest", type=Path, help="JSON lines: audio, text, ...")
    parser.add_argument("--name", required=True, help="what to call the corpus")
    parser.add_argument("--split", default="test", help="default %(default)s")
    parser.add_argument(
        "--on-bad-audio",
        choices=["error", "skip"],
        default="error",
        help="stop at a bad recording, or leave it out and say so (default %(default)s)",
    )


def build(args: argparse.Namespace, out: Path) -> None:
    """Write 16 kHz FLAC and a manifest. Raises UsageError with the line, the file, the reason."""
    utterances: list[Utterance] = []
    left_out: list[str] = []
    folder = args.manifest.absolute().parent
    for number, (where, record) in enumerate(track(read_records(args.manifest), "checking audio")):
        record = {"audio": record.get("audio_filepath"), **record}
        try:
            if "duration" not in record and record["audio"]:
                wave = load_wave(folder / str(record["audio"]), where=where)
                record["duration"] = len(wave) / SAMPLE_RATE
            given = parse_record(record, folder, where)
            path = out / "audio" / args.split / f"{number:06d}.flac"
            wave = load_utterance(given)
        except BadAudio as error:
            if args.on_bad_audio == "error":
                raise
            left_out.append(str(error))
            continue
        write_clip(path, wave)
        seconds = len(wave) / SAMPLE_RATE
        utterances.append(replace(given, audio=path, duration=seconds, source=args.name))
    console = Console(stderr=True)
    for reason in left_out:
        console.print(reason, highlight=False, markup=False, soft_wrap=True)
    if left_out and not utterances:
        raise BadAudio(f"{args.manifest}: none of its {len(left_out)} recordings is usable")
    finish(out, {args.split: utterances}, ["bad audio"] * len(left_out))
