"""The shape of `results.json`, and its loader.

Rates (WER) are fractions, not percent; nll, gaps and kl are nat per answer token; `*_ci` and
`*_gap_ci` are [low, high]. `None` stands where a score has no meaning for that row, or where so few
clips set an interval no limits.
"""

from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from melprobe.errors import UsageError

SCHEMA = 5
Interval = tuple[FiniteFloat, FiniteFloat]
CutName = Literal[
    "skip",
    "knock-out",
    "bypass",
    "no-attention",
    "no-mlp",
    "no-head",
    "patch",
    "without-lora",
]
By = Literal["", "zero", "mean", "resample", "noise"]


class Question(TypedDict):
    cut: CutName
    positions: str
    """speech, text, prompt, answer, bos, all, or times of speech such as speech:0.5-1.2"""
    readers: str
    """positions that a knock-out hides them from; "" for all others"""
    beyond: float
    """seconds of speech that a knock-out of speech from speech leaves to be read; 0 for none"""
    by: By
    """what stands in the place of a part that is taken out, or of a residual that is patched"""
    source_noise_db: float
    """of a patch by noise: how far below the clip that is"""
    copy_text: bool
    """whether the words of the clips were given as text, to be copied, and no audio was heard;
    "swapped" is then another clip's text"""
    layers: str
    """"each block in turn", "windows:4", "prefixes", "suffixes", "greedy", "picks:4", or a set such
    as "3,5-8" """


class Checkpoint(TypedDict):
    name: str
    sha256: str
    base: str
    front: str
    token_rate_hz: float | None
    """speech positions a second; None of a model that hears nothing"""
    n_layers: int
    trained_on: list[str]
    targets_after: list[int]
    """blocks after which training read phones or words off the speech positions"""
    dtype: str


class Data(TypedDict):
    name: str
    n_utterances: int
    n_speakers: int
    """0 where they are unknown, or text was read"""
    seconds: float | None
    """of audio; None where text was read"""
    sha256: str
    note: str
    """one line: what this data set can and can't show"""
    left_out: list[str]
    """one line for each recording or text that could not be used"""


class Choice(TypedDict):
    """Of sets that were chosen by measuring."""

    n_utterances: int
    """that were spent on the choice; the others are reported"""
    sets_tried: int
    not_offered: list[int]
    """blocks that cost nothing by construction"""


class Baseline(TypedDict):
    wer: float
    wer_ci: Interval | None
    nll: float
    substitutions: int
    deletions: int
    insertions: int
    reference_words: int
    rtfx: float | None
    """seconds of audio transcribed a second; None where text was read"""


class Gate(TypedDict):
    nll_intact: float
    nll_swapped: float
    nll_gap_ci: Interval | None
    wer_swapped: float
    passed: bool
    reason: str


class Layer(TypedDict):
    layer: int | str
    """a block counted from 0, a set such as "3,5-8", or "14.2" for head 2 of block 14"""
    positions: str
    wer: float
    delta_wer: float
    delta_wer_ci: Interval | None
    delta_nll: float
    delta_nll_ci: Interval | None
    damage: float | None
    damage_ci: Interval | None
    kl: float
    block_influence: float | None
    angular_distance: float | None
    attribution: float | None
    """what attribution patching says of delta_nll; of single patched blocks"""
    substitutions: int
    deletions: int
    insertions: int
    zero_by_construction: bool
    picked_by: list[str]
    """of a set that was chosen by measuring: the ways of choosing that came upon it"""


class Healing(TypedDict):
    """Of a set of blocks: a training with them skipped, and what is then lost."""

    steps: int
    seconds: float
    learning_rate: float
    audio_seconds: float
    trained_on: list[str]
    layer: Layer


class Margin(TypedDict):
    damage: float


class Results(TypedDict):
    schema: int
    run: str
    question: Question
    checkpoint: Checkpoint
    data: Data
    choice: Choice | None
    healing: Healing | None
    n_utterances: int
    seed: int
    baseline: Baseline
    gate: Gate
    layers: list[Layer]
    intervals: str
    """one sentence on how the intervals were made"""
    margin: Margin
    versions: dict[str, str]
    hardware: dict[str, str | int | float]
    command: str
    warnings: list[str]


def load(run_dir: Path) -> tuple[Results, pd.DataFrame]:
    """`results.json` and `rows.parquet` of a run folder; `UsageError` says what is wrong there."""
    for name in ("results.json", "rows.parquet"):
        if not (run_dir / name).is_file():
            raise UsageError(
                f"{run_dir}: no {name} there; make it with "
                "`python -m melprobe.ablate --skip-layers --out RUN`"
            )
    try:
        results = TypeAdapter(Results).validate_json((run_dir / "results.json").read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(
            f"{run_dir / 'results.json'}: {field}: {first['msg']}; run the study again"
        ) from None
    if results["schema"] != SCHEMA:
        raise UsageError(
            f"{run_dir / 'results.json'}: schema {results['schema']}, but this melprobe reads "
            f"{SCHEMA}; run the study again"
        )
    try:
        return results, pd.read_parquet(run_dir / "rows.parquet")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{run_dir / 'rows.parquet'}: damaged ({reason}); run the study again"
        ) from None
