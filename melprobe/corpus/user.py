"""`build jsonl`: your own recordings, each opened and checked, as a corpus like the others.

Takes melprobe's manifest fields, or `audio_filepath` for `audio` as NeMo's manifests have it; a
missing `duration` is measured, one that is there is held against the audio. Any rate, channel count
and format that libsndfile reads.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import track

from melprobe.audio.load import SAMPLE_RATE, BadAudio, decode_wave, load_utterance, recording_bytes
from melprobe.corpus.clips import add_on_bad_audio, finish, name_left_out, write_clip
from melprobe.corpus.manifest import Utterance, check_name, parse_record, read_records
from melprobe.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `build jsonl`."""
    parser.add_argument("manifest", type=Path, help="JSON lines: audio, text, ...")
    parser.add_argument("--name", required=True, help="what to call the corpus")
    parser.add_argument("--split", default="test", help="default %(default)s")
    add_on_bad_audio(parser)


def build(args: argparse.Namespace, out: Path) -> None:
    """Write 16 kHz FLAC and a manifest. Raises UsageError with the line, the file, the reason.

    A split that is there already is replaced at the end, or, if the build fails, left as it was.
    """
    check_name("--split", args.split)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as draft:
        _build(args, out, Path(draft))


def _build(args: argparse.Namespace, out: Path, draft: Path) -> None:
    audio = out / "audio" / args.split
    utterances: list[Utterance] = []
    left_out: list[str] = []
    where_is: dict[str, str] = {}
    folder = args.manifest.absolute().parent
    for number, (where, record) in enumerate(track(read_records(args.manifest), "checking audio")):
        record["audio"] = record.get("audio") or record.get("audio_filepath")
        try:
            if record.get("duration") is None and record["audio"]:
                unmeasured = parse_record({**record, "duration": 1}, folder, where)
                wave = decode_wave(recording_bytes(unmeasured), unmeasured.place)
                record["duration"] = len(wave) / SAMPLE_RATE
            given = parse_record(record, folder, where)
            if (first := where_is.setdefault(given.id, where)) != where:
                raise UsageError(f"{where}: audio: {given.id} is already at {first}")
            wave = load_utterance(given)
        except BadAudio as error:
            if args.on_bad_audio == "error":
                raise
            left_out.append(str(error))
            continue
        name = f"{number:06d}.flac"
        write_clip(draft / "new" / name, wave)
        seconds = len(wave) / SAMPLE_RATE
        utterances.append(
            replace(given, audio=audio / name, bytes=None, duration=seconds, source=args.name)
        )
    name_left_out(left_out)
    if left_out and not utterances:
        raise BadAudio(f"{args.manifest}: none of its {len(left_out)} recordings is usable")
    audio.parent.mkdir(parents=True, exist_ok=True)
    if audio.exists():
        audio.rename(draft / "old")
    (draft / "new").rename(audio)
    finish(out, {args.split: utterances}, ["bad audio"] * len(left_out))
