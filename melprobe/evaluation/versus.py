"""`--versus`: two models on the same clips, and whether they differ at all.

The difference is taken within a clip before resampling, so its interval is narrower than those of
the two rates would suggest.
"""

import json
from pathlib import Path
from typing import Any

from melprobe.analysis.statistics import Bootstrap, Interval
from melprobe.corpus.manifest import Utterance
from melprobe.errors import UsageError
from melprobe.evaluation.rows import Row, limits, read_rows, row_errors, score
from melprobe.model.checkpoint import find_checkpoint
from melprobe.model.whisper import JUDGE

FEWEST = 6
"""Clips: with five, all of them for one model, a sign test still says p = 0.06."""


def refuse_same(checkpoint: str, other: str) -> None:
    """UsageError when both names mean one model."""
    same = checkpoint == other
    if not same and JUDGE not in (checkpoint, other):
        same = find_checkpoint(checkpoint).resolve() == find_checkpoint(other).resolve()
    if same:
        raise UsageError(f"--versus {other}: this is --checkpoint itself; take another model")


def is_earlier(name: str) -> bool:
    """Whether `--versus` names the rows of an earlier run, in place of a model."""
    return (Path(name) / "rows.jsonl").is_file()


def read_earlier(folder: Path, manifest: str) -> tuple[str, list[Row]]:
    """The checkpoint and the rows of an earlier run, or UsageError if on another manifest."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        checkpoint, of = str(summary["checkpoint"]), summary["manifest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--versus {folder}: holds no summary.json of evaluate's") from None
    if of != manifest:
        raise UsageError(f"--versus {folder}: has rows of {of}, not of {manifest}")
    return checkpoint, read_rows(folder / "rows.jsonl")


def check_same_clips(folder: str, rows: list[Row], utterances: list[Utterance]) -> None:
    """UsageError unless the rows are of these utterances."""
    theirs = [(row["audio_filepath"], row["text"]) for row in rows]
    ours = [(str(u.id), u.text) for u in utterances]
    if theirs != ours:
        raise UsageError(
            f"--versus {folder}: its {len(theirs)} rows are not of these {len(ours)} clips; take "
            "the same --limit and --seed, and a manifest that has not changed since"
        )


def compare(
    names: tuple[str, str], rows: tuple[list[Row], list[Row]], speakers: list[str], seed: int
) -> dict[str, Any]:
    """The second model's scores and the difference, first minus second, with its interval."""
    first, second = ([row_errors(row) for row in each] for each in rows)
    more = [a.total - b.total for a, b in zip(first, second, strict=True)]
    words = [e.reference_words for e in first]
    bootstrap = Bootstrap(speakers, seed=seed)
    difference = bootstrap.ratio(more, words)
    return {
        "checkpoint": names[1],
        **score(rows[1], speakers, seed),
        "difference": difference.value,
        "difference_ci": limits(difference),
        "verdict": _verdict(names, difference, bootstrap),
    }


def _verdict(names: tuple[str, str], difference: Interval, bootstrap: Bootstrap) -> str:
    """A sentence; one of them is better only where the interval excludes 0."""
    points = f"{abs(100 * difference.value):.1f} points of WER"
    apart = f"{names[0]} and {names[1]} differ by {points}"
    if bootstrap.n_units < FEWEST:
        return f"not resolved: {apart}, on fewer than {FEWEST} {bootstrap.unit}s"
    ends = limits(difference)
    if ends is None:
        return f"not resolved: {apart}, without an interval"
    low, high = (100 * end for end in ends)
    if low <= 0 <= high:
        return f"not resolved: {apart} (95 % interval of the difference {low:.1f} to {high:.1f})"
    better, worse = names
    if low > 0:
        better, worse = worse, better
    else:
        low, high = -high, -low
    return f"{better} is better than {worse} by {points} (95 % interval {low:.1f} to {high:.1f})"
