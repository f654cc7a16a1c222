"""`python -m melprobe.evaluate MANIFEST`: word error rate with its interval, and two controls.

Rows first (JSON lines, the fields of the Open ASR Leaderboard), scores from the rows. Beside the
WER stand the WER when each clip's audio is swapped for another's (a model that hears should fail
there) and the WER of answering with the nearest training transcript (what memory alone could do,
choosing with the reference in hand).
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import extractOne
from rich.console import Console
from rich.progress import Progress

from melprobe.analysis.protocol import answer_limit, choose, leave_out_too_long
from melprobe.analysis.statistics import Bootstrap
from melprobe.analysis.study import swap_partners
from melprobe.analysis.wer import WordErrors, corpus_wer, count_errors, normalise
from melprobe.audio.load import SAMPLE_RATE, load_usable
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.listener import Listener, load, pick_device
from melprobe.model.checkpoint import DEFAULT, find_checkpoint
from melprobe.model.inference import batches_by_length
from melprobe.model.whisper import JUDGE, load_whisper, transcribe
from melprobe.training.data import load_corpora
from melprobe.training.recipe import SpeechRecipe

Transcriber = Callable[[list[np.ndarray]], list[str]]


def main(argv: Sequence[str] | None = None) -> None:
    """Transcribe a manifest, write its rows, print its scores."""
    p = Parser(prog="python -m melprobe.evaluate", description=__doc__)
    p.add_argument("manifest", help="path, or name like builtin/test")
    p.add_argument(
        "--checkpoint", default=DEFAULT, help=f"name or folder, or {JUDGE} as the ceiling"
    )
    p.add_argument("--limit", type=int, default=0, help="number of utterances (0: all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    p.add_argument("--batch-seconds", type=float, default=80.0, help="padded audio in a batch")
    p.add_argument("--on-bad-audio", choices=("error", "skip"), default="error")
    p.add_argument("--out", type=Path, help="folder for rows*.jsonl and summary.json")
    options = p.parse_args(argv)
    if not 0 < options.batch_seconds < math.inf:
        raise UsageError(f"--batch-seconds {options.batch_seconds}: take a number above 0")
    if options.out:
        check_writable(options.out, f"--out {options.out}")
        _refuse_other_results(options.out, options.manifest, options.checkpoint)
    chosen = choose(read_manifest(find_manifest(options.manifest)), options.limit, options.seed)
    usable, waves, left_out = load_usable(chosen, options.on_bad_audio)
    listener = None
    if options.checkpoint != JUDGE:
        listener = load(options.checkpoint, device=options.device)
        left_out += leave_out_too_long(listener, usable, waves, options.on_bad_audio)
    if not any(normalise(u.text) for u in usable):
        raise UsageError("the references hold no words, so there is no word error rate")
    transcriber = whisper(options.device) if listener is None else own(listener, usable)
    # Nobody doubts that the ceiling hears, and it is slow.
    partners = partners_or_none(usable) if listener else None
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("listening", total=len(usable) * (2 if partners else 1))
        batched = Batched(transcriber, options.batch_seconds, lambda n: progress.advance(bar, n))
        rows = make_rows(usable, waves, *batched(waves))
        swapped = swapped_rows(usable, waves, partners, batched) if partners else None
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_rows(options.out / "rows.jsonl", rows)
        write_rows(options.out / "rows_swapped.jsonl", swapped or [])
    summary = {
        "manifest": options.manifest,
        "checkpoint": options.checkpoint,
        **score(rows, [u.speaker for u in usable], options.seed),
        "wer_swapped": swapped and corpus_wer(map(row_errors, swapped)),
        "left_out": left_out,
    }
    if options.checkpoint != JUDGE:
        texts = training_texts(find_checkpoint(options.checkpoint))
        nearest = nearest_wer(usable, texts) if texts else None
        summary["wer_nearest_training_transcript"] = nearest
    if options.out:
        voices = by_speaker([row_errors(row) for row in rows], [u.speaker for u in usable])
        filed = json.dumps(summary | {"by_speaker": voices}, indent=2)
        (options.out / "summary.json").write_text(filed + "\n")
    print(json.dumps(summary, indent=2))


def _refuse_other_results(out: Path, manifest: str, checkpoint: str) -> None:
    """A folder belongs to one checkpoint and one manifest."""
    path = out / "summary.json"
    if not path.exists():
        return
    try:
        old = json.loads(path.read_bytes())
        there = (old["checkpoint"], old["manifest"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: not a summary of evaluate's; take another --out") from None
    if there != (checkpoint, manifest):
        has = f"{there[0]} on {there[1]}"
        raise UsageError(f"--out {out}: holds the results of {has}; take another --out")


class Batched:
    """Transcribes waves in batches of like length; returns (transcripts, seconds per clip)."""

    def __init__(
        self, transcriber: Transcriber, batch_seconds: float, advance: Callable[[int], None]
    ):
        self.transcriber = transcriber
        self.most = int(batch_seconds * SAMPLE_RATE)
        self.advance = advance

    def __call__(self, waves: Sequence[np.ndarray]) -> tuple[list[str], list[float]]:
        heard, seconds = [""] * len(waves), [0.0] * len(waves)
        for batch in batches_by_length([len(wave) for wave in waves], self.most):
            start = time.perf_counter()
            transcripts = self.transcriber([waves[i] for i in batch])
            share = (time.perf_counter() - start) / len(batch)
            for i, transcript in zip(batch, transcripts, strict=True):
                heard[i], seconds[i] = transcript, share
            self.advance(len(batch))
        return heard, seconds


def own(listener: Listener, usable: list[Utterance]) -> Transcriber:
    """A Mel-LLM as a function of a batch of waves."""
    limit = answer_limit(listener, usable)
    return lambda waves: listener.transcribe(waves, limit)


def whisper(device: str | None) -> Transcriber:
    """Whisper base from the packages as a function of a batch of waves."""
    place = pick_device(device)
    model, processor = load_whisper(JUDGE)
    model.to(place)
    return lambda waves: transcribe(waves, model, processor)


def make_rows(
    utterances: list[Utterance], waves: list[np.ndarray], heard: list[str], seconds: list[float]
) -> list[dict[str, Any]]:
    """One row an utterance, in the Open ASR Leaderboard's fields."""
    return [
        {
            "audio_filepath": str(u.id),
            "duration": len(wave) / SAMPLE_RATE,
            "time": spent,
            "text": u.text,
            "pred_text": hypothesis,
        }
        for u, wave, hypothesis, spent in zip(utterances, waves, heard, seconds, strict=True)
    ]


def partners_or_none(usable: list[Utterance]) -> list[int] | None:
    """Whose audio stands in for whose; None where no clip says anything else."""
    try:
        return swap_partners(usable)
    except UsageError as error:
        print(f"melprobe: no swapped control: {error}", file=sys.stderr)
        return None


def swapped_rows(
    usable: list[Utterance], waves: list[np.ndarray], partners: list[int], batched: "Batched"
) -> list[dict[str, Any]]:
    """One row an utterance, `text_of`, with the partner whose audio was heard in its place."""
    heard = [waves[i] for i in partners]
    rows = make_rows([usable[i] for i in partners], heard, *batched(heard))
    return [
        {**row, "text": u.text, "text_of": str(u.id)} for row, u in zip(rows, usable, strict=True)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def row_errors(row: dict[str, Any]) -> WordErrors:
    return count_errors(row["text"], row["pred_text"])


def score(rows: list[dict[str, Any]], speakers: list[str], seed: int) -> dict[str, Any]:
    """WER with a 95 % bootstrap interval, errors by kind, and RTFx, from rows alone."""
    errors = [row_errors(row) for row in rows]
    bootstrap = Bootstrap(speakers, seed=seed)
    wer = bootstrap.rate([e.total for e in errors], [e.reference_words for e in errors])
    return {
        "wer": wer.value,
        "wer_ci": [wer.low, wer.high] if math.isfinite(wer.high) else None,
        "resampled": bootstrap.unit,
        "utterances": len(rows),
        "speakers": len(set(speakers) - {""}),
        **{kind: sum(getattr(e, kind) for e in errors) for kind in WordErrors.__slots__},
        "rtfx": sum(row["duration"] for row in rows) / sum(row["time"] for row in rows),
    }


def by_speaker(errors: list[WordErrors], speakers: list[str]) -> dict[str, dict[str, float]]:
    """WER of each speaker that is named, the worst first, and on how many reference words."""
    of: dict[str, list[WordErrors]] = {}
    for speaker, found in zip(speakers, errors, strict=True):
        if speaker:
            of.setdefault(speaker, []).append(found)
    scores = {
        speaker: {"wer": corpus_wer(found), "words": sum(e.reference_words for e in found)}
        for speaker, found in of.items()
        if sum(e.reference_words for e in found)
    }
    return dict(sorted(scores.items(), key=lambda item: -item[1]["wer"]))


def training_texts(checkpoint: Path) -> list[str]:
    """Distinct transcripts the checkpoint was trained on; none where a corpus is not built here.

    Those of the clips that training really read: without leaks, cut into words where it did.
    """
    try:
        recipe = SpeechRecipe.model_validate_json((checkpoint / "recipe.json").read_bytes())
        clips, _ = load_corpora(recipe.data)
    except (OSError, ValidationError, UsageError) as error:
        reason = str(error).splitlines()[0]
        print(
            f"melprobe: no nearest-transcript control, which needs the corpora of the training: "
            f"{reason}",
            file=sys.stderr,
        )
        return []
    return sorted({normalise(clip.text) for clip in clips})


def nearest_wer(utterances: list[Utterance], texts: list[str]) -> float:
    """WER of answering each utterance with the training transcript nearest to its reference."""
    pool = [text.split() for text in texts]
    answers = []
    for u in utterances:
        words = normalise(u.text).split()
        found = extractOne(words, pool, scorer=Levenshtein.distance, processor=None)
        answers.append(" ".join(found[0]))
    return corpus_wer(map(count_errors, (u.text for u in utterances), answers))


if __name__ == "__main__":
    run(main)
