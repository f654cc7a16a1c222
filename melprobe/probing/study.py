"""A probing study: every layer of every series, every label, their rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from melprobe.corpus.voices import sex_of
from melprobe.errors import UsageError
from melprobe.probing.fit import read_layer
from melprobe.probing.labels import LABELS, Labelled
from melprobe.probing.logistic import read_layers
from melprobe.probing.mdl import BLOCKS, block_of_clips, online_code
from melprobe.probing.ridge import Pieces, Target
from melprobe.probing.rows import COLUMNS, Clips, code_rows, majority_rows, reading_rows
from melprobe.probing.sources import Series
from melprobe.probing.splits import NAMES, Split, split_clips
from melprobe.probing.tasks import Task, heard, make_tasks
from melprobe.probing.tracks import Track, control, control_name, is_control

CONTROLLED = ("phone", "class")
RIDGE, LOGISTIC = "ridge", "logistic"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be read from every layer."""

    tasks: list[Task]
    clips: Clips
    logistic: Sequence[str]
    """labels that logistic regression reads as well, and the online code measures"""
    seed: int
    unable: dict[str, str]
    """labels that were asked for and can't be probed, with the reason"""


def parse_labels(option: str, text: str, known: Sequence[str] = LABELS) -> list[str]:
    """Names out of `known` from `phone,word` or `all`; UsageError that lists them for any other."""
    names = [name.strip() for name in text.split(",")] if text != "all" else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{option} {unknown[0]!r}: there are {', '.join(known)}, or all")
    return list(dict.fromkeys(names))


def make_plan(
    labelled: Labelled, names: Sequence[str], seed: int, logistic: Sequence[str] = ()
) -> Plan:
    """Splits and tasks of the labels `names`, with control tasks for `CONTROLLED`.

    logistic: those of them that logistic regression is to read as well, and their control tasks.

    With fewer than three voices the splits keep sentences apart alone. UsageError where there are
    too few clips for three splits, or none of the labels can be probed.
    """
    apart = len(set(labelled.voices)) >= len(NAMES) or "" in labelled.voices
    splits = {choice: _split(labelled, choice and apart, seed) for choice in (True, False)}
    wanted = [labelled.tracks[name] for name in names]
    tracks, unable = heard(wanted, labelled.utterance, splits)
    with_control = [
        made
        for track in tracks
        for made in (
            [track, control(track, labelled.words, seed)]
            if track.name in CONTROLLED and _words_known(labelled, track.known)
            else [track]
        )
    ]
    if not tracks:
        why = "; ".join(f"{name}: {reason}" for name, reason in unable.items())
        raise UsageError(f"none of the labels can be probed ({why})")
    tasks = make_tasks(with_control, labelled.utterance, splits)
    ids = [u.id for u in labelled.utterances]
    both = [*logistic, *(control_name(name) for name in logistic)]
    return Plan(tasks, Clips(ids, labelled.voices, labelled.utterance), both, seed, unable)


def _split(labelled: Labelled, apart: bool, seed: int) -> Split:
    sexes = [u.sex or sex_of(u.speaker) for u in labelled.utterances]
    texts = [u.text for u in labelled.utterances]
    return split_clips(texts, labelled.voices, sexes, speakers_apart=apart, seed=seed)


def _words_known(labelled: Labelled, rows: np.ndarray) -> bool:
    """The control task needs the word wherever the label is known."""
    return all(labelled.words[i] is not None for i in np.flatnonzero(rows))


def run_plan(
    plan: Plan, series: Sequence[Series], device: torch.device, advance: Callable[[], None]
) -> pd.DataFrame:
    """The rows of all series' layers; advance is called after each layer."""
    found = [
        majority_rows(plan.clips, task, track, target)
        for task in plan.tasks
        for track, target in zip(task.tracks, task.targets, strict=True)
        if target.n_classes
    ]
    for each in series:
        layers = {layer: _moved(pieces, device) for layer, pieces in each.layers.items()}
        for layer, pieces in layers.items():
            readings = read_layer(pieces, plan.tasks)
            where = {"series": each.name, "layer": layer, "probe": RIDGE}
            for task, of_task in zip(plan.tasks, readings, strict=True):
                for parts in zip(task.tracks, task.targets, of_task, strict=True):
                    found.append(reading_rows(plan.clips, task, *parts, where))
            advance()
        found += _logistic_rows(plan, each.name, layers)
    # A study of nothing but numbers, or of none, has the columns of the others too.
    return pd.concat(found, ignore_index=True).reindex(columns=list(COLUMNS))


def _logistic_rows(plan: Plan, series: str, layers: Mapping[str, Pieces]) -> list[pd.DataFrame]:
    found = []
    for task in plan.tasks:
        for track, target in zip(task.tracks, task.targets, strict=True):
            if track.name not in plan.logistic:
                continue
            rows = (task.train, task.dev, task.test)
            readings = read_layers(list(layers.values()), target, *rows)
            for layer, reading in zip(layers, readings, strict=True):
                where = {"series": series, "layer": layer, "probe": LOGISTIC}
                found.append(reading_rows(plan.clips, task, track, target, reading, where))
            if not is_control(track.name):
                penalties = [reading.penalty for reading in readings]
                found += _code_rows(plan, task, track, target, layers, penalties, series)
    return found


def _code_rows(
    plan: Plan,
    task: Task,
    track: Track,
    target: Target,
    layers: Mapping[str, Pieces],
    penalties: Sequence[float],
    series: str,
) -> list[pd.DataFrame]:
    """The online code of the training rows, where they are enough clips for it."""
    if len(np.unique(plan.clips.of[task.train.numpy()])) < BLOCKS:
        return []
    block = block_of_clips(plan.clips.of, task.train, plan.seed)
    bits = online_code(list(layers.values()), target, block, torch.tensor(penalties))
    return [
        code_rows(plan.clips, task, track, cost, penalty, {"series": series, "layer": layer})
        for layer, cost, penalty in zip(layers, bits, penalties, strict=True)
    ]


def _moved(pieces: Pieces, device: torch.device) -> Pieces:
    return lambda: (piece.to(device) for piece in pieces())


def describe(plan: Plan) -> Mapping[str, dict[str, object]]:
    """How each label was split: clips, rows, classes, and what was dropped."""
    found = {}
    for task in plan.tasks:
        split = task.split
        for track in task.tracks:
            found[track.name] = {
                "classes": len(track.classes),
                "voices_apart": split.speakers_apart,
                "dropped_clips": split.dropped,
                "clips": {name: int((split.of == i).sum()) for i, name in enumerate(NAMES)},
                "rows": {name: int(getattr(task, name).sum()) for name in NAMES},
            }
    return found
