"""STUDY.yaml: which runs are asked what, on which clips, at which margins.

Margins are written down before there are rows. What a study was asked is kept with its first row,
and rows of another question are never taken for it.
"""

import json
import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from melprobe.analysis.findings import checkpoint_name
from melprobe.corpus.manifest import find_manifest
from melprobe.errors import UsageError
from melprobe.model.ancestry import read_ancestors
from melprobe.model.checkpoint import find_checkpoint, weights_file
from melprobe.probing.labels import CLASSED
from melprobe.training.recipe_file import describe
from melprobe.wheels import file_sha256

Margin = Annotated[float, Field(gt=0)]
NEAREST = "nearest_wer"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Margins(Part):
    damage: Margin = 0.05
    """of a block that is skipped, normalised: 1 is deaf"""
    exchange: Margin = 0.1
    """of what strange blocks cost more than another run's of the same arm: D of damage"""
    similarity: Margin = 0.1
    """of D of debiased CKA"""
    probe: Margin = 0.05
    """of what probes get right, between the arms' means"""
    wer: Margin = 0.05
    """of the arms' mean word error rates, within which they count as equal"""


class StudyFile(Part):
    """What STUDY.yaml says; see docs/verdict.md."""

    arms: dict[str, tuple[str, ...]]
    """One arm or two: name, and its runs, checkpoints by name or folder."""
    nearest_wer: dict[str, tuple[str, ...]] = {}
    """The arm that hears better, by other runs: earlier in training, as good as the other arm."""
    reader: str
    """A language model that copies text, the control: the base of all runs, such as mini-base."""
    data: str
    """Manifest of the clips that are heard."""
    fit: str
    """Manifest of other clips, of which maps between runs are fitted."""
    lengths: str | None = None
    """Only clips of so many seconds, such as 0-3."""
    clips: Annotated[int, Field(ge=0)] = 0
    """Drawn from either; 0 for all."""
    fit_clips: Annotated[int, Field(ge=0)] = 100
    probe: str = "phone"
    """What linear probes have to read alike in both arms."""
    margins: Margins = Margins()
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not 1 <= len(self.arms) <= 2:
            raise ValueError(f"arms: name one or two, there are {len(self.arms)}")
        if empty := [name for name, runs in self.arms.items() if not runs]:
            raise ValueError(f"arms: {empty[0]} has no runs")
        if unknown := set(self.nearest_wer) - set(self.arms):
            raise ValueError(f"{NEAREST}: {unknown.pop()} is none of the arms")
        if len(self.nearest_wer) > 1:
            raise ValueError(f"{NEAREST}: replace one arm's runs, not both")
        if self.probe not in CLASSED:
            raise ValueError(f"probe: {self.probe} is none of {', '.join(CLASSED)}")
        return self


def read_study(path: Path) -> StudyFile:
    """UsageError for what is wrong in it."""
    try:
        return StudyFile.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; see recipes/verdicts") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not a readable study ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        known = [*StudyFile.model_fields, *Margins.model_fields]
        raise UsageError(f"{path}: {describe(error, known)}") from None


class Run:
    """A trained model of an arm."""

    def __init__(self, arm: str, given: str):
        self.arm, self.given, self.folder = arm, given, find_checkpoint(given)
        self.name = checkpoint_name(self.folder)
        self.sha256 = file_sha256(weights_file(self.folder))


class Question:
    """A study file and the runs that it names, checked."""

    def __init__(self, file: StudyFile):
        self.file = file
        self.arms = {arm: [Run(arm, g) for g in given] for arm, given in file.arms.items()}
        self.nearest = {arm: [Run(arm, g) for g in gs] for arm, gs in file.nearest_wer.items()}
        counts = Counter(run.name for run in self.runs)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise UsageError(f"{twice[0]} is named twice: a study needs runs of their own")
        counts = Counter(run.sha256 for run in self.runs)
        if twice := [run.name for run in self.runs if counts[run.sha256] > 1]:
            raise UsageError(f"{' and '.join(twice)} have the same weights: they are one run")
        if any(not re.fullmatch(r"[\w.+-]+", run.name) for run in self.runs):
            raise UsageError("names of runs name folders: use letters, digits and hyphens")
        check_unrelated(self.arms, self.nearest)

    @property
    def runs(self) -> list[Run]:
        """Of all arms, those at equal computing first."""
        return [run for arms in (self.arms, self.nearest) for runs in arms.values() for run in runs]

    def asked(self) -> dict[str, Any]:
        """All that decides what rows say: kept with them."""
        file = self.file.model_dump(mode="json")
        return {
            **{name: value for name, value in file.items() if name not in ("arms", NEAREST)},
            "arms": {arm: [run.sha256 for run in runs] for arm, runs in self.arms.items()},
            NEAREST: {arm: [run.sha256 for run in runs] for arm, runs in self.nearest.items()},
            "data_sha256": file_sha256(find_manifest(self.file.data)),
            "fit_sha256": file_sha256(find_manifest(self.file.fit)),
        }


def digest(asked: dict[str, Any]) -> str:
    """Of a question, as it is printed."""
    return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def check_unrelated(*parts: dict[str, list[Run]]) -> None:
    """UsageError where something other than the base went into runs of both arms: what it gave to

    both is alike in them however they listen.
    """
    owed: dict[str, dict[str, str]] = {}  # arm, then weights, and in words how they came in
    for arms in parts:
        for arm, runs in arms.items():
            mine = owed.setdefault(arm, {})
            for run in runs:
                mine[run.sha256] = run.name
                for a in read_ancestors(run.folder):
                    mine[a.sha256] = f"{a.name}, which gave {run.name} its {a.gave}"
    if len(owed) < 2:
        return
    (one, ours), (other, theirs) = owed.items()
    if shared := ours.keys() & theirs.keys():
        key = min(shared)
        raise UsageError(
            f"no matched pair: in {one} there is {ours[key]}, in {other} {theirs[key]}; train both "
            "arms from the base alone"
        )


def differences_in_training(arms: dict[str, list[Run]]) -> list[str]:
    """Fields in which the arms' recipes differ, beside those that make them arms; in words.

    UsageError where they differ in what is to be equal: data, steps and targets.
    """
    recipes = {arm: [_recipe(run) for run in runs] for arm, runs in arms.items()}
    known: dict[str, set[str]] = {}
    for listed in recipes.values():
        for recipe in listed:
            for name, value in _flat(recipe):
                known.setdefault(name, set()).add(json.dumps(value, sort_keys=True))
    n_runs = sum(map(len, recipes.values()))
    found = sorted(name for name, values in known.items() if len(values) > 1)
    unequal = [name for name in found if name.split(".")[0] in _EQUAL]
    if unequal and n_runs > 1:
        raise UsageError(
            f"the runs were not trained alike: {unequal[0]} is {' or '.join(known[unequal[0]])}; a "
            "pair is compared at equal data, steps and targets"
        )
    return [name for name in found if name not in ("out", "seed")]


_EQUAL = ("data", "frames", "ctc", "distil", "augment", "task")


def _recipe(run: Run) -> dict[str, Any]:
    path = run.folder / "recipe.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UsageError(
            f"{path}: missing or damaged, so it is not known what {run.name} learnt"
        ) from None


def _flat(recipe: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in recipe.items():
        if isinstance(value, dict):
            found += _flat(value, f"{above}{name}.")
        else:
            found.append((f"{above}{name}", value))
    return found
