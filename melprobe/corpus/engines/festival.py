"""festival, one process for many clips because its start is slow: three voices, ARPAbet phones.

Voices: kal and ked (diphones) and slt-hts (a statistical model). flite's kal16 and slt are the same
people as kal and slt-hts, so only ked is a speaker that flite does not know.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import soundfile

from melprobe.corpus.engines import Clip, Segment, Spoken
from melprobe.errors import UsageError

_SCHEME_NAME = {"kal": "kal_diphone", "ked": "ked_diphone", "slt-hts": "cmu_us_slt_arctic_hts"}
_PACKAGES = {"kal": "kallpc16k", "ked": "kdlpc16k", "slt-hts": "us-slt-hts"}
VOICES = tuple(_SCHEME_NAME)

# Each phone's name, end and token; a phone that festival adds between words has token 0.
_PROGRAM = """
(set! token "R:SylStructure.parent.parent.R:Token.parent.id")
(define (say text stretch base)
  (Parameter.set 'Duration_Stretch stretch)
  (let ((utt (utt.synth (eval (list 'Utterance 'Text text))))
        (out (fopen (string-append base ".segments") "w")))
    (mapcar
      (lambda (s) (format out "%s %f %s\\n" (item.name s) (item.feat s 'end) (item.feat s token)))
      (utt.relation.items utt 'Segment))
    (fclose out)
    (utt.save.wave utt (string-append base ".wav") 'riff)))
"""


def check() -> None:
    """Raises UsageError if festival or one of the voices is not installed."""
    if shutil.which("festival") is None:
        raise UsageError("festival is not installed: run `apt install festival`")
    there = _festival("(print (voice.list))")
    for voice, name in _SCHEME_NAME.items():
        if name not in there:
            package = f"festvox-{_PACKAGES[voice]}"
            raise UsageError(f"festival's {voice} is not installed: run `apt install {package}`")


def speak(clips: Sequence[Clip]) -> Iterator[Spoken]:
    """One result for each clip, in order."""
    with tempfile.TemporaryDirectory() as folder:
        bases = [Path(folder, str(index)) for index in range(len(clips))]
        _festival(
            _PROGRAM + "\n".join(_say(clip, base) for clip, base in zip(clips, bases, strict=True))
        )
        for base in bases:
            samples, rate = soundfile.read(base.with_suffix(".wav"), dtype="int16")
            lines = base.with_suffix(".segments").read_text()
            yield Spoken(samples, rate, segments(lines, len(samples) / rate))


def segments(lines: str, duration: float) -> list[Segment]:
    """Parse `NAME END TOKEN` lines; no end lies beyond the duration in seconds."""
    found: list[Segment] = []
    start = 0.0
    for line in lines.splitlines():
        name, end_text, token = line.split()
        end = min(float(end_text), duration)
        found.append(
            Segment("" if name == "pau" else name, start, end, None if token == "0" else token)
        )
        start = end
    return found


def _say(clip: Clip, base: Path) -> str:
    rate = f'(set! hts_engine_params (cons (list "-r" {clip.speed:.3f}) hts_engine_params))'
    return (
        f"(voice_{_SCHEME_NAME[clip.voice]})\n"
        + (rate if clip.voice == "slt-hts" else "")
        + f"(say {json.dumps(clip.text)} {1 / clip.speed:.3f} {json.dumps(str(base))})"
    )


def _festival(program: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".scm") as script:
        script.write(program)
        script.flush()
        done = subprocess.run(
            ["festival", "-b", script.name], capture_output=True, text=True, check=False
        )
    if done.returncode != 0 or "ERROR" in done.stderr:
        raise UsageError(f"festival failed: {done.stderr.strip()[:300]}")
    return done.stdout
