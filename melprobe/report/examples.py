"""Example utterances for the report: which ones, and how their transcripts differ word by word.

The choice follows a rule and not an eye: utterances evenly spaced from the one that the intact
model finds easiest to the one it finds hardest. Words are compared without case and punctuation,
which is simpler than the scoring's normaliser; the error counts come from the rows.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import jiwer
import pandas as pd

from melprobe.report import reading, terms
from melprobe.report.notation import label_text
from melprobe.report.schema import Results

MOST_EXAMPLES = 6
MOST_AUDIO_BYTES = 4_500_000
"""of FLAC over all players: base64 adds a third, and the page stays under 8 MB"""
MOST_WORDS = 40
"""shown of one transcript; a loop can run to hundreds"""


class Run(NamedTuple):
    """Neighbouring words of one kind; `missing` ones were said but not heard."""

    kind: Literal["same", "wrong", "missing", "added"]
    text: str
    instead_of: str = ""


@dataclass(frozen=True)
class Transcript:
    """What the model wrote under one condition."""

    label: str
    runs: list[Run]
    hidden_words: int
    errors: int
    nll_per_token: float


@dataclass(frozen=True)
class Example:
    """One utterance: its clip, what was said, and what was written under each condition."""

    utterance: str
    reference: str
    audio: str | None
    """base64 FLAC; None when none was kept or the page would grow too large"""
    transcripts: list[Transcript]


def chosen_utterances(rows: pd.DataFrame) -> list[str]:
    """At most six utterances, evenly spaced by the intact model's NLL per token."""
    intact = rows[rows.condition == "intact"]
    per_token = (intact.nll / intact.answer_tokens).to_numpy()
    ranked = intact.assign(per_token=per_token).sort_values(["per_token", "utterance"]).utterance
    n = min(MOST_EXAMPLES, len(ranked))
    return [ranked.iloc[round(i * (len(ranked) - 1) / max(1, n - 1))] for i in range(n)]


def clip_path(run_dir: Path, utterance: str) -> Path:
    """Where a run keeps the clip of an utterance: audio/ and the id with "__" for "/" as FLAC."""
    name = PurePosixPath(utterance).with_suffix(".flac").as_posix().replace("/", "__")
    return run_dir / "audio" / name


def examples(run_dir: Path, results: Results, rows: pd.DataFrame) -> list[Example]:
    """The chosen utterances: intact, swapped, the three worst cuts and the mildest that counts."""
    conditions = [("intact", ""), ("swapped", "")]
    if results["gate"]["passed"]:
        ordered = reading.by_damage([x for x in results["layers"] if not x["zero_by_construction"]])
        shown = ordered[:3] + ordered[3:][-1:]
        conditions += [(results["question"]["cut"], str(layer["layer"])) for layer in shown]
    table = rows.set_index(["utterance", "condition", "layer"]).sort_index()
    found, room = [], MOST_AUDIO_BYTES
    for utterance in chosen_utterances(rows):
        clip = clip_path(run_dir, utterance)
        flac = clip.read_bytes() if clip.is_file() else b""
        audio = base64.b64encode(flac).decode() if flac and len(flac) <= room else None
        room -= len(flac) if audio else 0
        transcripts = [
            _transcript(table.loc[(utterance, *condition)], _label(results, *condition))
            for condition in conditions
            if (utterance, *condition) in table.index
        ]
        reference = table.loc[(utterance, "intact", "")].reference
        found.append(Example(utterance, reference, audio, transcripts))
    return found


def _label(results: Results, condition: str, layer: str) -> str:
    if not layer:
        return f"other {terms.medium(results).one}" if condition == "swapped" else condition
    return f"{terms.cut(results).verb} {label_text(layer)}"


def _transcript(row: pd.Series, label: str) -> Transcript:
    shown, room = [], MOST_WORDS
    # Of "..." or "[cough]" the scoring leaves no words: all that was heard counts as added.
    reference = row.reference if row.reference_words else ""
    for run in difference(reference, row.hypothesis):
        words = run.text.split()
        if room > 0:
            shown.append(run._replace(text=" ".join(words[:room])))
        room -= len(words)
    return Transcript(
        label=label,
        runs=shown,
        hidden_words=max(0, -room),
        errors=int(row.substitutions + row.deletions + row.insertions),
        nll_per_token=row.nll / row.answer_tokens,
    )


def difference(reference: str, hypothesis: str) -> list[Run]:
    """The hypothesis against the reference, by the least number of word edits."""
    said, heard = reference.split(), hypothesis.split()
    if not said or not heard:
        sides: tuple[Run, ...] = (Run("missing", " ".join(said)), Run("added", " ".join(heard)))
        return [run for run in sides if run.text]
    runs = []
    for chunk in jiwer.process_words(_keys(said), _keys(heard)).alignments[0]:
        old = " ".join(said[chunk.ref_start_idx : chunk.ref_end_idx])
        new = " ".join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx])
        match chunk.type:
            case "equal":
                runs.append(Run("same", new))
            case "substitute":
                runs.append(Run("wrong", new, old))
            case "delete":
                runs.append(Run("missing", old))
            case "insert":
                runs.append(Run("added", new))
    return runs


def _keys(words: Sequence[str]) -> str:
    return " ".join(re.sub(r"[^\w']", "", word).casefold() or word for word in words)
