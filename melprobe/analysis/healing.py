"""Healing: a short training of what is left after blocks are skipped.

What a cut costs at once, other blocks may make up for when they are trained with it (Gromov et al.
2024, 2403.17887, do so after pruning). LoRA and audio front go on learning, on the checkpoint's own
training data, by the last stage of its own recipe, while the blocks are skipped.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from melprobe.analysis.study import LayerStudy
from melprobe.analysis.sweep import StudyBatch, make_rows
from melprobe.corpus.manifest import find_manifest
from melprobe.errors import UsageError
from melprobe.hooks.cuts import skip
from melprobe.listener import Listener
from melprobe.model.adapter import ADAPTER
from melprobe.model.inference import kl_per_clip
from melprobe.store import Key, RowStore
from melprobe.subject import Subject
from melprobe.training.loop import fit
from melprobe.training.recipe import SpeechRecipe
from melprobe.training.recipe_file import write_recipe
from melprobe.training.speech import SpeechTask

HEALED = "healed"
"""condition of its rows"""
RATE = 0.25
"""of the recipe's learning rate: it goes on from where that had run out"""


def healing_recipe(subject: Subject, steps: int, out: Path) -> SpeechRecipe:
    """The last stage of a checkpoint's recipe, for `steps` updates, from the checkpoint on.

    Without targets on speech positions: they would tell it again which blocks are to hear. Raises
    UsageError for a checkpoint that can't go on.
    """
    folder = subject.folder
    path = folder / "recipe.json" if folder else Path()
    if folder is None or not (folder / ADAPTER).is_file() or not path.is_file():
        raise UsageError(
            f"--heal: {subject.name} holds no adapter with its recipe.json; take a checkpoint that "
            "melprobe.train left"
        )
    if steps < 1:
        raise UsageError(f"--heal {steps}: give a number of training steps")
    try:
        recipe = SpeechRecipe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(f"{path}: {error.errors()[0]['msg']}") from None
    optim = recipe.optim
    batches = steps * optim.accumulate
    stage = recipe.data.stages[-1].model_copy(update={"steps": batches, "lr": None})
    if stage.learn != "text":
        raise UsageError(f"--heal: the last stage of {path} learns {stage.learn}, not text")
    data = recipe.data
    for name in (*(corpus.manifest for corpus in data.train), *data.dev, *data.test):
        find_manifest(name)  # missing, it would be noticed only when the study is done
    rate = RATE * recipe.schedule_at(recipe.steps - 1).height
    changes = {
        "lr": rate * optim.lr,
        "front_lr": rate * (optim.front_lr or optim.lr),
        "warmup": max(1, batches // 10),
    }
    return recipe.model_copy(
        update={
            "out": out,
            "compile": False,  # a minute, of which a short run would not get back half
            "model": recipe.model.model_copy(update={"init": str(folder)}),
            "data": recipe.data.model_copy(update={"stages": (stage,)}),
            "optim": optim.model_copy(update=changes),
            "frames": None,
            "ctc": None,
            "evaluate_every": stage.steps,
        }
    )


def heal(subject: Subject, study: LayerStudy, steps: int, out: Path, device: torch.device) -> Path:
    """Train on `device` with the study's blocks skipped; the healed checkpoint, in `out`.

    Stopped and started again, it goes on where it was.
    """
    done = out / "last"
    if not done.exists():
        recipe = healing_recipe(subject, steps, out)
        task = SpeechTask(recipe)
        write_recipe(recipe)
        with skip(task.model, study.targets[0].layers, study.question.positions):
            fit(task, recipe, device)
    return done


def describe_healing(out: Path) -> dict[str, Any]:
    """What a healing run did, for results.json."""
    recipe = SpeechRecipe.model_validate_json((out / "recipe.json").read_bytes())
    (stage,) = recipe.data.stages
    log = [json.loads(line) for line in (out / "last" / "log.jsonl").read_text().splitlines()]
    return {
        "steps": recipe.steps // recipe.optim.accumulate,
        "seconds": log[-1]["seconds"],
        "learning_rate": recipe.optim.lr,
        "audio_seconds": (stage.batch_seconds or recipe.data.batch_seconds) * recipe.steps,
        "trained_on": list(dict.fromkeys(corpus.manifest for corpus in recipe.data.train)),
    }


def add_healed_rows(intact: Listener, healed: Listener, study: LayerStudy, store: RowStore) -> None:
    """Rows of the healed model with its blocks skipped, KL measured from the intact one."""
    (target,) = study.targets
    done = store.done()
    for places in study.batches(intact):
        batch = StudyBatch(healed, study, places)
        keys = [Key(study.run, HEALED, target.label, u.id) for u in batch.utterances]
        if done.issuperset(keys):
            continue
        given = [study.given[i] for i in places]
        with batch.variant(target).cut():
            heard = batch.replay.intact
            scores = healed.score(given, batch.texts)
        kl = kl_per_clip(intact.score(given, batch.texts), scores)
        store.add(make_rows(batch, HEALED, target.label, replace(heard, kl=kl), {}))
