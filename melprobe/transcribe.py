"""`python -m melprobe.transcribe FILES…`: what the model hears, one JSON line a file."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from melprobe.audio.load import SAMPLE_RATE, BadAudio, load_wave
from melprobe.errors import Parser, UsageError, run
from melprobe.listener import load
from melprobe.model.checkpoint import DEFAULT


def main(argv: Sequence[str] | None = None) -> None:
    """Transcribe each file as it comes, with `audio_filepath, duration, time, pred_text`."""
    p = Parser(prog="python -m melprobe.transcribe", description=__doc__)
    p.add_argument("files", nargs="+", type=Path, help="any format that libsndfile reads")
    p.add_argument("--checkpoint", default=DEFAULT, help="name under checkpoints/, or a folder")
    p.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--on-bad-audio", choices=("error", "skip"), default="error")
    options = p.parse_args(argv)
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: take 1 or more")
    listener = load(options.checkpoint, device=options.device)
    waves = []
    for path in options.files:
        try:
            wave = load_wave(path)
            needed = listener.positions(wave, options.max_new_tokens)
            if needed > listener.room:
                raise BadAudio(
                    f"{path}: {len(wave) / SAMPLE_RATE:.1f} s and {options.max_new_tokens} tokens "
                    f"take {needed} positions, and the decoder has {listener.room}: cut the clip"
                )
            waves.append((path, wave))
        except BadAudio as error:
            if options.on_bad_audio == "error":
                raise
            print(f"melprobe: left out: {error}", file=sys.stderr)
    if not waves:
        raise BadAudio(f"all {len(options.files)} recordings are unusable")
    for path, wave in waves:
        start = time.perf_counter()
        (heard,) = listener.transcribe([wave], options.max_new_tokens)
        row = {
            "audio_filepath": str(path),
            "duration": round(len(wave) / SAMPLE_RATE, 3),
            "time": round(time.perf_counter() - start, 3),
            "pred_text": heard,
        }
        print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    run(main)
