"""What a run starts from and imitates: weights of another checkpoint, blocks held, a teacher."""

import shutil

import pytest
import torch

from melprobe.errors import UsageError
from melprobe.model import checkpoint
from melprobe.model.adapter import adapter_state, read_adapter
from melprobe.model.ancestry import ANCESTORS, Ancestor, read_ancestors
from melprobe.training.loop import fit
from melprobe.training.recipe import SpeechRecipe
from melprobe.training.speech import SpeechTask
from melprobe.wheels import file_sha256
from tests.test_whisper_front import whisper_folder
from tests.tiny import split_clips


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """Manifests to train on and to watch, and a Whisper for the twin."""
    place = tmp_path_factory.mktemp("starts")
    split_clips(folder, place)
    whisper_folder(place / "whisper")
    return place


def recipe(folder, place, name, *, steps=6, stages=None, model=None, lora=None, **fields):
    made = {
        "out": str(place / name),
        "model": {
            "base": str(folder / "base"),
            "prompt": ["", "<|answer|>"],
            "lora": {"rank": 2, **(lora or {})},
            **(model or {}),
        },
        "data": {
            "train": [{"manifest": str(place / "train.jsonl")}],
            "dev": [str(place / "dev.jsonl")],
            "stages": stages or [{"steps": steps}],
            "batch_seconds": 3,
            "workers": 0,
        },
        "optim": {"lr": 1e-2, "warmup": 1, "muon": True},
        "precision": "float32",
        **fields,
    }
    return SpeechRecipe.model_validate(made)


def trained(made):
    """(what the run began with, what it left)"""
    task = SpeechTask(made)
    before = {name: t.clone() for name, t in adapter_state(task.model).items()}
    fit(task, made, torch.device("cpu"))
    return before, {name: t.detach() for name, t in adapter_state(task.model).items()}


def parts_that_moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_an_adapter_is_taken_over_without_its_front(folder, place):
    start = {"init": str(folder / "model")}
    task = SpeechTask(recipe(folder, place, "a", lora=start))
    saved, begun = read_adapter(folder / "model"), adapter_state(task.model)
    alike = {name for name in saved if torch.equal(saved[name].float(), begun[name])}
    assert alike - {"audio_front.projection.bias"} == {n for n in saved if "lora_" in n}


def test_held_blocks_keep_the_adapter_they_start_with(folder, place):
    start = {"init": str(folder / "model"), "held": [2, 3]}
    before, after = trained(recipe(folder, place, "b", lora=start))
    moved = parts_that_moved(before, after)
    assert {name for name in moved if ".layers.2." in name or ".layers.3." in name} == set()
    assert all(f".layers.{block}." in " ".join(moved) for block in (0, 1))
    found = read_adapter(place / "b" / "last")
    held = [name for name in found if ".layers.3." in name]
    assert held and all(torch.equal(found[n].float(), before[n].bfloat16().float()) for n in held)


def test_a_stage_may_train_the_front_alone(folder, place):
    alone = recipe(folder, place, "c", stages=[{"steps": 3, "train": "front"}])
    moved = parts_that_moved(*trained(alone))
    assert moved == {"audio_front.projection.weight", "audio_front.projection.bias"}
    stages = [{"steps": 2, "train": "front"}, {"steps": 2}]
    before, after = trained(recipe(folder, place, "d", stages=stages))
    assert len(parts_that_moved(before, after)) == len(before)


def test_a_student_comes_to_hold_what_its_teacher_does(folder, place):
    twin = {"front": "whisper", "encoder": {"name": str(place / "whisper")}}
    taught = recipe(folder, place, "teacher", model=twin, steps=2)
    trained(taught)
    distil = {"teacher": str(place / "teacher" / "last"), "layer": 1, "weight": 5.0, "steps": 30}
    student = recipe(folder, place, "student", steps=40, distil=distil, log_every=1)
    log = fit(SpeechTask(student), student, torch.device("cpu"))
    losses = [line["distil"] for line in log if "distil" in line]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    (ancestor,) = read_ancestors(place / "student" / "best")
    sha256 = file_sha256(place / "teacher" / "last" / "adapter.safetensors")
    assert ancestor == Ancestor(distil["teacher"], sha256, "targets")


def test_the_teachers_target_is_its_residual_for_the_same_patches(folder, place):
    distil = {"teacher": str(folder / "model"), "layer": 1, "steps": 5}
    same = {"init": str(folder / "model")}
    task = SpeechTask(recipe(folder, place, "same", model=same, distil=distil))
    _, batch = next(iter(task.batches(0)))
    heard = {key: batch.pop(key) for key in list(batch) if key.startswith("teacher_")}
    with torch.no_grad():
        task.model(**batch)
        assert task.teacher.loss(batch, heard) < 1e-8  # a copy of the teacher has nothing to learn
        task.model(**{**batch, "input_features": batch["input_features"].flip(1)})
        assert task.teacher.loss(batch, heard) > 1e-3


def test_ancestors_are_handed_down(folder, place):
    for name, start in (("child", folder / "model"), ("grandchild", place / "child" / "last")):
        trained(recipe(folder, place, name, steps=2, lora={"init": str(start)}))
    found = read_ancestors(place / "grandchild" / "last")
    assert [(a.name, a.gave) for a in found] == [
        (str(place / "child" / "last"), "adapter"),
        (str(folder / "model"), "adapter"),
    ]


def test_a_start_that_does_not_fit_is_one_line(folder, place):
    def refused(match, **fields):
        with pytest.raises(UsageError, match=match):
            SpeechTask(recipe(folder, place, "e", **fields))

    refused("lora.init .*tensors missing", lora={"init": str(folder / "model"), "rank": 3})
    refused("layers 9: this model has blocks 0 to 3", lora={"held": [9]})
    unknown = place / "unknown"
    shutil.copytree(folder / "model", unknown)
    (unknown / ANCESTORS).unlink()
    refused("missing, so it is not known what", lora={"init": str(unknown)})
    (unknown / ANCESTORS).write_text("[{}]")
    refused("damaged; fetch the checkpoint again", lora={"init": str(unknown)})
    config = (unknown / "config.json").read_text()
    sha256 = checkpoint.read_config(unknown).base_sha256
    (unknown / "config.json").write_text(config.replace(sha256, "f" * 64))
    refused("base's weights hash to ffffffffffff", lora={"init": str(unknown)})
    shutil.copytree(folder / "model", place / "other")
    config = (place / "other" / "melprobe.json").read_text()
    (place / "other" / "melprobe.json").write_text(config.replace("<|answer|>", ":"))
    teacher = {"teacher": str(place / "other"), "layer": 1, "steps": 1}
    refused("after is ':' there and '<|answer|>' here", distil=teacher)
    with pytest.raises(ValueError, match="name one"):
        start = str(folder / "model")
        recipe(folder, place, "f", model={"init": start}, lora={"init": start})


def test_some_batches_copy_texts_instead_of_hearing(folder, place):
    made = recipe(folder, place, "copies", steps=12)
    data = made.data.model_copy(update={"copy_share": 0.5})
    made = made.model_copy(update={"data": data, "log_every": 1})
    log = fit(SpeechTask(made), made, torch.device("cpu"))
    kinds = ["copied" in line for line in log if "train_loss" in line]
    assert len(kinds) == 12 and 3 <= sum(kinds) <= 9
    assert "nll" in log[kinds.index(False)] and any("nll_copied" in name for name in log[-1])
    again = SpeechTask(made)
    copies = ["input_features" not in batch for _, batch in again.batches(4)]
    assert copies == kinds[4:]  # whatever step it begins at
    _, batch = next((s, b) for s, b in again.batches(0) if "input_features" not in b)
    row, mask = batch["input_ids"][0], batch["labels"][0] != -100
    text = again.processor.decode(row[mask])
    assert row[~mask & batch["attention_mask"][0].bool()].tolist() == (
        again.processor.text_prompt(text)
    )
