"""Scores of a suite's sets from their rows, and the tables that show them."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from melprobe.analysis.statistics import Bootstrap, mean_of_rates
from melprobe.analysis.wer import count_errors_as_is
from melprobe.evaluation.rows import limits, read_rows, rtfx, score_errors

RESAMPLES = 1000
"""A set may have 40,000 clips: with 5,000 resamples it would take 3 GB."""


def score_sets(
    files: dict[str, Path], speakers: dict[str, dict[str, str]], public: set[str], seed: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Scores of each set by its label, and the plain mean of the public ones, if there are any.

    `speakers` names who speaks each clip of a set, where that is known.
    """
    scores: dict[str, Any] = {}
    rates, audio, spent = [], 0.0, 0.0
    for place, (label, path) in enumerate(files.items()):
        rows = read_rows(path)
        errors = [count_errors_as_is(row["text"], row["pred_text"]) for row in rows]
        voices = speakers.get(label, {})
        names = [voices.get(row["audio_filepath"], "") for row in rows]
        bootstrap = Bootstrap(names, resamples=RESAMPLES, seed=(seed, place))
        scores[label] = {
            **score_errors(errors, bootstrap),
            "rtfx": rtfx(rows),
            "rows": f"{path.parent.name}/{path.name}",
        }
        if label in public:
            words = [e.reference_words for e in errors]
            rates.append((bootstrap, [e.total for e in errors], words))
            audio += sum(row["duration"] for row in rows)
            spent += sum(row["time"] for row in rows)
    if not rates:
        return scores, None
    mean = mean_of_rates(rates)
    found = {"wer": mean.value, "wer_ci": limits(mean), "rtfx": audio / spent, "sets": len(rates)}
    return scores, found


def print_tables(summary: dict[str, Any]) -> None:
    """The leaderboard's sets with their mean, ours, and what was not reached."""
    console = Console(highlight=False)
    name = f"{summary['checkpoint']}, Open ASR Leaderboard, sets of {summary['generation']}"
    limit, mean = summary["limit"], summary["mean"]
    if summary["sets"]:
        table = _table(name, summary["sets"])
        table.add_section()
        of = f"mean of {mean['sets']} of {mean['of']} sets"
        table.add_row(of, "", "", *_rates(mean))
        console.print(table)
        if mean["sets"] < mean["of"] or limit:
            console.print("not the leaderboard's figure:", _missing(mean, limit))
    else:
        console.print(f"{name}: none was reached", soft_wrap=True)
    if summary["local"]:
        console.print(_table("sets of this package, in no mean", summary["local"]))
    for label, note in summary["notes"].items():
        if note["cut"]:
            console.print(f"{label}: {note['cut']} clips were cut to what the model has room for")
        if note["left_out"]:
            left_out = note["left_out"]
            line = f"{label}: left out {len(left_out)} clips, the first: {left_out[0]}"
            console.print(line, soft_wrap=True, markup=False)
    of_reason: dict[str, list[str]] = {}
    for label, reason in summary["unreached"].items():
        of_reason.setdefault(reason, []).append(label)
    for reason, labels in of_reason.items():
        console.print(f"not scored: {', '.join(labels)}: {reason}", soft_wrap=True, markup=False)


def _missing(mean: dict[str, Any], limit: int) -> str:
    clips = [f"{limit} clips a set at most"] if limit else []
    sets = [f"{mean['of'] - mean['sets']} sets missing"] if mean["sets"] < mean["of"] else []
    return ", ".join(clips + sets)


def _table(title: str, sets: dict[str, Any]) -> Table:
    table = Table("set", title=title)
    for column in ("clips", "words", "WER %", "95 % interval", "RTFx"):
        table.add_column(column, justify="right")
    for label, found in sets.items():
        counts = (str(found["utterances"]), str(found["reference_words"]))
        table.add_row(label, *counts, *_rates(found))
    return table


def _rates(found: dict[str, Any]) -> tuple[str, str, str]:
    ends = found["wer_ci"]
    interval = "none"
    if ends and ends[0] < ends[1]:  # where all clips are alike, resampling knows no spread
        interval = f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
    return f"{100 * found['wer']:.2f}", interval, f"{found['rtfx']:.1f}"
