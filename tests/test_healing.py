"""Healing: what is left learns with blocks skipped, and is measured under the same skip."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import melprobe
from melprobe import ablate
from melprobe.analysis.healing import describe_healing, healing_recipe
from melprobe.audio.load import load_utterance
from melprobe.corpus.manifest import read_manifest, write_manifest
from melprobe.errors import UsageError
from melprobe.subject import find_subject
from melprobe.training.recipe import SpeechRecipe
from melprobe.training.recipe_file import write_recipe


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The tiny checkpoint with the recipe it could have come from."""
    place = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(folder / "model", place)
    clips = read_manifest(folder / "data.jsonl")
    write_manifest(folder / "two.jsonl", [clips[3], clips[5]])
    recipe = {
        "out": "runs/x",
        "model": {
            "base": str(folder / "base"),
            "prompt": ["", "<|answer|>"],
            "lora": {"rank": 2},
        },
        "data": {
            "train": [{"manifest": str(folder / "data.jsonl")}],
            "dev": [str(folder / "two.jsonl")],
            "stages": [{"steps": 5, "learn": "phones", "lr": 1.0}, {"steps": 7, "lr": 2e-2}],
            "batch_seconds": 3,
            "workers": 0,
        },
        "frames": {"phones_after": 0, "tokens_after": 2},
        "optim": {"lr": 1e-2, "front_lr": 4e-2, "accumulate": 2, "muon": True},
    }
    (place / "recipe.json").write_text(SpeechRecipe.model_validate(recipe).model_dump_json())
    return place


def arguments(folder: Path, checkpoint: Path, *words: str) -> list[str]:
    data = ["--data", str(folder / "data.jsonl"), "--dtype", "float32", "--device", "cpu"]
    return ["--skip-layers", *words, "--checkpoint", str(checkpoint), *data]


def test_a_healed_model_is_measured_under_the_same_skip(folder, trained, tmp_path):
    run = tmp_path / "run"
    ablate.main(arguments(folder, trained, "1-2", "--heal", "20", "--out", str(run)))
    results = json.loads((run / "results.json").read_text())
    healing, (before,) = results["healing"], results["layers"]
    assert healing["steps"] == 20 and healing["learning_rate"] == pytest.approx(5e-3)
    assert healing["trained_on"] == [str(folder / "data.jsonl")]
    # It learns texts that are among those it is measured on.
    assert healing["layer"]["delta_nll"] < before["delta_nll"] - 0.1

    rows = pd.read_parquet(run / "rows.parquet").set_index(["condition", "utterance"])
    utterances = read_manifest(folder / "data.jsonl")
    clips, texts = [load_utterance(u) for u in utterances], [u.text for u in utterances]
    healed = melprobe.load(run / "healing" / "last", device="cpu", dtype=torch.float32)
    with healed.skip({1, 2}):
        nll, said = healed.score(clips, texts).nll, healed.transcribe(clips, 30)
    measured = rows.loc[[("healed", u.id) for u in utterances]]
    assert measured.nll.tolist() == pytest.approx(nll.tolist(), abs=1e-3)
    limit = json.loads((run / "results.json").read_text())["n_utterances"]
    assert len(measured) == limit == len(utterances)
    for text, whole in zip(measured.hypothesis, said, strict=True):
        assert whole.startswith(text)
    assert (measured.kl > 0).all()
    recipe = SpeechRecipe.model_validate_json((run / "healing" / "recipe.json").read_bytes())
    assert recipe.frames is None and recipe.steps == 40 and recipe.optim.front_lr == 0.02

    page = (run / "report.html").read_text()
    assert "went on learning" in page
    # The same command again trains and measures nothing anew.
    before = (run / "healing" / "last" / "adapter.safetensors").stat().st_mtime_ns
    ablate.main(arguments(folder, trained, "1-2", "--heal", "20", "--out", str(run)))
    assert (run / "healing" / "last" / "adapter.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="heal = 20 there, 30 now"):
        ablate.main(arguments(folder, trained, "1-2", "--heal", "30", "--out", str(run)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heal", "20"], "--heal goes with --skip-layers and one set of blocks"),
        (["1-2", "--heal", "0"], "--heal 0: give a number of training steps"),
    ],
)
def test_bad_input_is_one_line(folder, trained, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        ablate.main(arguments(folder, trained, *words, "--out", str(tmp_path / "bad")))
    assert not (tmp_path / "bad").exists()


def copied_with(trained, place, **data):
    """The trained checkpoint with other `data` in its recipe."""
    shutil.copytree(trained, place)
    recipe = json.loads((place / "recipe.json").read_text())
    recipe["data"] |= data
    (place / "recipe.json").write_text(json.dumps(recipe))
    return place


def test_it_goes_on_at_the_rate_of_the_schedule_that_the_last_stage_belongs_to(
    folder, trained, tmp_path
):
    stages = [{"steps": 5, "lr": 2e-2}, {"steps": 7, "batch_seconds": 2}]
    place = copied_with(trained, tmp_path / "model", stages=stages)
    subject = find_subject(ablate.parser().parse_args(arguments(folder, place, "1-2")))
    recipe = healing_recipe(subject, 20, tmp_path / "healing")
    assert (recipe.optim.lr, recipe.optim.front_lr) == pytest.approx((5e-3, 2e-2))
    assert recipe.optim.warmup == 4  # a tenth of 40 batches
    write_recipe(recipe)
    (tmp_path / "healing" / "last").mkdir()
    (tmp_path / "healing" / "last" / "log.jsonl").write_text('{"seconds": 1}\n')
    assert describe_healing(tmp_path / "healing")["audio_seconds"] == 80


def test_missing_training_data_is_said_before_the_study(folder, trained, tmp_path):
    place = copied_with(trained, tmp_path / "model", train=[{"manifest": "nowhere/train"}])
    with pytest.raises(UsageError, match="nowhere/train: neither a manifest file nor a corpus"):
        ablate.main(arguments(folder, place, "1", "--heal", "5", "--out", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_its_recipe_cannot_heal(folder, trained, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(trained, bare)
    (bare / "recipe.json").unlink()
    with pytest.raises(UsageError, match=r"bare holds no adapter with its recipe.json"):
        ablate.main(arguments(folder, bare, "1-2", "--heal", "5", "--out", str(tmp_path / "bad")))
