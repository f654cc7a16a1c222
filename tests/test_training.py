"""Training: recipes are checked, batches are reproducible, and a killed run ends the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from melprobe import train
from melprobe.analysis.findings import checkpoint_name
from melprobe.audio.mel import log_mel
from melprobe.corpus.manifest import Span, Utterance, write_manifest
from melprobe.errors import UsageError
from melprobe.folders import held
from melprobe.model import checkpoint
from melprobe.training.clips import load_corpora
from melprobe.training.data import BatchOrder
from melprobe.training.loop import learning_rate_scale
from melprobe.training.recipe import Corpus, Data, Optim, SpeechRecipe, Stage
from melprobe.training.recipe_file import read_recipe
from melprobe.training.speech import mel_statistics
from melprobe.training.state import State
from tests.tiny import WORDS, tiny_config, tiny_listener, waves

ROOT = Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder


def make_workshop(folder):
    """A tiny base, a tiny corpus of noise and a recipe, in `folder`."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config().text_config).save_pretrained(folder / "base")
    tiny_listener().processor.tokenizer.save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    clips = waves(*rng.uniform(0.4, 1.0, 24))
    for split, part in (("train", clips[:20]), ("dev", clips[20:])):
        (folder / split).mkdir()
        utterances = []
        for i, wave in enumerate(part):
            path = folder / split / f"{i}.flac"
            soundfile.write(path, wave, 16_000)
            text = " ".join(rng.choice(WORDS, 3)) if split == "train" else f"other {WORDS[i]}"
            phones = (Span("hh", 0.1, 0.2), Span("ʌ", 0.2, 0.3))
            words = [Span(w, 0.1 + 0.1 * n, 0.2 + 0.1 * n) for n, w in enumerate(text.split())]
            times = {"phones": phones, "words": tuple(words)} if i % 4 else {}
            seconds = len(wave) / 16_000
            utterances.append(Utterance(path.name, path, text, seconds, "noise", **times))
        write_manifest(folder / f"{split}.jsonl", utterances)
    recipe = {
        "out": str(folder / "run"),
        "model": {
            "base": str(folder / "base"),
            "prompt": ["", "<|answer|>"],
            "lora": {"rank": 2},
        },
        "data": {
            "train": [{"manifest": str(folder / "train.jsonl")}],
            "dev": [str(folder / "dev.jsonl")],
            "stages": [
                {"steps": 2, "max_seconds": 0.8, "learn": "phones"},
                {"steps": 2, "max_seconds": 0.8, "learn": "tokens"},
                {"steps": STEPS - 4, "lr": 2e-3},
            ],
            "batch_seconds": 3,
            "workers": 0,
        },
        "frames": {"phones_after": 0, "tokens_after": 2},
        "augment": {"speed": [0.9, 1.1], "noise_probability": 0.5, "time_masks": 1},
        "optim": {"warmup": 2, "accumulate": 2, "muon": True},
        "log_every": 1,
        "evaluate_every": STEPS,
        "keep": [4, STEPS],
        "save_minutes": 0,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def losses(out: Path) -> list[float]:
    log = json.loads((out / "state" / "state.json").read_text())["log"]
    return [line["train_loss"] for line in log if "train_loss" in line]


def saved_step(out: Path) -> int:
    """That of a run's state on disk, 0 before there is one.

    One is put in the other's place while we look, and a run may be killed between the two.
    """
    for folder in ("state", "state.old"):
        try:
            return json.loads((out / folder / "state.json").read_text())["step"]
        except FileNotFoundError:
            pass
    return 0


def wait_for_step(running: subprocess.Popen, out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while saved_step(out) < step:
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(workshop):
    train.main([str(workshop / "recipe.yaml"), "--out", str(workshop / "whole")])
    return workshop / "whole"


@pytest.fixture(scope="module")
def in_float32(workshop, uninterrupted):
    """After the run in bfloat16 and in its process, as a notebook would."""
    out = workshop / "float32"
    train.main([str(workshop / "recipe.yaml"), "--precision", "float32", "--out", str(out)])
    return out


def test_one_process_trains_in_either_precision(uninterrupted, in_float32):
    coarse, fine = losses(uninterrupted), losses(in_float32)
    assert coarse[:4] == pytest.approx(fine[:4], rel=0.02)  # before the updates drift apart
    assert coarse != fine


def test_a_runs_folder_is_one_process_own(workshop):
    """Such as one whose study was killed, and which trains on."""
    out = workshop / "held"
    code = "import sys, time; from pathlib import Path; from melprobe.folders import held\n"
    code += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="held: another process is at work there"):
            train.main([str(workshop / "recipe.yaml"), "--out", str(out)])
        other.kill()
    assert not (out / "recipe.json").exists()
    with held(out):
        pass


def test_a_killed_run_resumes_and_ends_the_same(workshop, in_float32):
    """In float32: now and then a process rounds otherwise, which bfloat16 makes much of."""
    out = workshop / "killed"
    words = [str(workshop / "recipe.yaml"), "--precision", "float32", "--out"]
    command = [
        sys.executable,
        "-m",
        "melprobe.train",
        *words,
        str(out),
    ]
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_step(running, out, 4)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert 4 <= saved_step(out) < STEPS
    train.main([*words, str(out)])
    assert losses(out) == pytest.approx(losses(in_float32), rel=1e-4)
    assert len(losses(out)) == STEPS


def test_the_checkpoint_it_leaves_can_be_used(uninterrupted):
    model, processor = checkpoint.load(uninterrupted / "best")
    batch = processor(waves(0.6), ["please hold"])
    assert model(**batch).loss.isfinite()
    data = json.loads((uninterrupted / "best" / "data.json").read_text())
    assert data["clips_per_epoch"] == 20


def test_checkpoints_are_kept_on_the_way(uninterrupted):
    way, end = (
        load_file(uninterrupted / name / "adapter.safetensors") for name in ("at-4", f"at-{STEPS}")
    )
    last = load_file(uninterrupted / "last" / "adapter.safetensors")
    assert all(torch.equal(tensor, end[name]) for name, tensor in last.items())
    assert any(not torch.equal(tensor, way[name]) for name, tensor in last.items())
    assert checkpoint_name(uninterrupted / "at-4") == "whole-at-4"


def test_global_statistics_are_those_of_the_training_clips(workshop):
    data = read_recipe(workshop / "recipe.yaml").data
    clips, _ = load_corpora(data)
    mean, std = mel_statistics(clips, 7690.0, seed=0)
    mel = [log_mel(torch.from_numpy(clip.wave())[None])[0] for clip in clips]
    together = torch.cat(mel)
    assert mean == pytest.approx(together.mean(0).tolist(), rel=1e-4)
    assert std == pytest.approx(together.std(0, correction=0).tolist(), rel=1e-3)


def test_words_are_cut_out_at_their_times(workshop, tmp_path):
    path, other = tmp_path / "a.wav", tmp_path / "b.wav"
    wave = np.repeat(np.float32([0.1, 0.5, 0.9]), 8000)  # half a second each
    for place in (path, other):
        soundfile.write(place, wave, 16_000)
    words = (Span("one", 0.1, 0.4), Span("two", 0.6, 0.9), Span("three", 1.1, 1.4))
    timed = Utterance("a.wav", path, "One, two, three.", 1.5, words=words)
    untimed = Utterance("b.wav", other, "Nobody knows when.", 1.5)  # left out
    write_manifest(tmp_path / "m.jsonl", [timed, untimed])
    data = read_recipe(workshop / "recipe.yaml").data
    corpus = Corpus(manifest=str(tmp_path / "m.jsonl"), crop_words=2)
    clips, _ = load_corpora(data.model_copy(update={"train": (corpus,)}))
    assert [clip.text for clip in clips] == ["one two", "three"]
    assert [clip.duration for clip in clips] == pytest.approx([0.88, 0.38])
    levels = [sorted({round(float(x), 1) for x in clip.wave()}) for clip in clips]
    assert levels == [[0.1, 0.5], [0.9]]
    assert len({clip.id for clip in clips}) == 2

    write_manifest(tmp_path / "n.jsonl", [untimed])
    nothing = Corpus(manifest=str(tmp_path / "n.jsonl"), crop_words=1)
    with pytest.raises(
        UsageError, match=r"data.train.0: crop_words needs word times.*corpus align"
    ):
        load_corpora(data.model_copy(update={"train": (nothing,)}))


def test_batches_from_the_middle_are_those_of_the_whole(workshop):
    data = read_recipe(workshop / "recipe.yaml").data
    utterances, _ = load_corpora(data)
    whole = list(BatchOrder(utterances, data, seed=3))
    assert list(BatchOrder(utterances, data, seed=3, start=7)) == whole[7:]
    assert [step for step, _ in whole] == list(range(STEPS))
    assert whole != list(BatchOrder(utterances, data, seed=4))
    short = {u.id for u in utterances if u.duration <= 0.8}
    assert all(set(ids) <= short for _, ids in whole[:4])


def test_a_training_text_like_a_dev_text_is_left_out(workshop, tmp_path):
    data = read_recipe(workshop / "recipe.yaml").data
    leaky = data.model_copy(update={"dev": (str(workshop / "train.jsonl"),)})
    with pytest.raises(UsageError, match="no utterance is left"):
        load_corpora(leaky)


def staged(*stages, **optim):
    data = Data(train=(Corpus(manifest="x"),), dev=("y",), stages=stages)
    return SpeechRecipe(out=Path("z"), data=data, optim=Optim(lr=1e-3, warmup=10, **optim))


def test_the_learning_rate_warms_up_and_decays():
    recipe = staged(Stage(steps=60), Stage(steps=50), schedule="linear")
    scales = [learning_rate_scale(step, recipe) for step in range(110)]
    assert scales[0] == 0.1 and scales[9] == 1.0 and scales[60] == pytest.approx(0.5)
    assert min(scales) == pytest.approx(0.01)
    assert learning_rate_scale(60, staged(Stage(steps=110))) == pytest.approx(0.5)


def test_a_stage_with_a_rate_begins_a_schedule():
    recipe = staged(Stage(steps=60), Stage(steps=50, lr=2e-3), Stage(steps=60), schedule="linear")
    scales = [learning_rate_scale(step, recipe) for step in range(170)]
    assert scales[35] == pytest.approx(0.5) and scales[59] == pytest.approx(0.02)
    assert scales[60] == pytest.approx(0.2) and scales[69] == pytest.approx(2.0)
    assert scales[120] == pytest.approx(1.0)  # half way through the last two stages


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a recipe"),
        (["nowhere.yaml"], "nowhere.yaml: there is no such recipe"),
        (["{recipe}", "--optim.lr", "-1"], "greater than 0"),
        (
            ["{recipe}", "--optim.speed", "1"],
            "optim.speed: there is no such field; did",
        ),
        (["{recipe}", "--data.train.7.repeat", "1"], "the recipe has no such field"),
        (
            ["{recipe}", "--data.stages.2.min_seconds", "9"],
            "stages.2: no training clip lasts 9",
        ),
        (["{recipe}", "--data.dev_clips", "1"], "data.dev .*, 1 of its clips"),
        (["{recipe}", "--augment.speed", "[1.2, 0.8]"], "augment.speed: 1.2 to 0.8: the lower"),
        (["{recipe}", "--ctc", "{{layer: 3, steps: 1}}"], "ctc.layer 3: take a block from 0 to 2"),
        (["{recipe}", "--seed", "-1"], "seed: Input should be greater"),
        (["{recipe}", "--seed"], "--seed: a value must follow"),
        (["{recipe}", "seed"], "overrides look like"),
        (["{recipe}", "--frames", "null"], "a stage learns phones, but the recipe has no `frames`"),
        (["{other}"], "model.colour: there is no such field"),
    ],
)
def test_bad_recipes_give_one_line(workshop, tmp_path, words, message):
    other = tmp_path / "other.yaml"
    recipe = yaml.safe_load((workshop / "recipe.yaml").read_text())
    recipe["model"]["colour"] = "red"
    other.write_text(yaml.safe_dump(recipe))
    places = {"recipe": workshop / "recipe.yaml", "other": other}
    with pytest.raises(UsageError, match=message) as error:
        train.main([word.format(**places) for word in words])
    assert "\n" not in str(error.value)


def test_a_recipe_that_cannot_begin_leaves_no_folder(workshop):
    out = workshop / "unborn"
    command = [str(workshop / "recipe.yaml"), "--out", str(out), "--model.base", "nothing"]
    with pytest.raises(UsageError, match="no base model 'nothing'"):
        train.main(command)
    assert not out.exists()


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(workshop):
    out = workshop / "diverged"
    rates = ["--optim.lr", "1e9", "--optim.warmup", "0", "--optim.clip", "1e9"]
    with pytest.raises(UsageError, match=r"take a lower .* and another --out"):
        train.main([str(workshop / "recipe.yaml"), "--out", str(out), *rates])
    for path in out.glob("state/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_a_damaged_state_is_one_line(workshop, uninterrupted):
    out = workshop / "damaged-state"
    shutil.copytree(uninterrupted, out)
    (weights,) = (out / "state").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"state: damaged .*; delete it to begin again"):
        train.main([str(workshop / "recipe.yaml"), "--out", str(out)])


def test_a_state_in_one_plain_file_is_read(tmp_path):
    """As runs of one process left it before there were parts."""
    layer = torch.nn.Linear(3, 2)
    saved = {"weight": torch.ones(2, 3), "bias": torch.zeros(2), "weight@step": torch.tensor(5.0)}
    saved["weight@exp_avg"] = torch.full((2, 3), 0.5)
    (tmp_path / "state").mkdir()
    save_file(saved, tmp_path / "state" / "state.safetensors")
    fields = {"step": 5, "seconds": 1.0, "best": 2.0, "running": [], "log": []}
    (tmp_path / "state" / "state.json").write_text(json.dumps(fields))
    optimizer = torch.optim.AdamW(layer.parameters())
    state = State(tmp_path / "state", dict(layer.named_parameters()), [optimizer])
    assert state.step == 5
    assert torch.equal(layer.weight, saved["weight"])
    assert torch.equal(optimizer.state[layer.weight]["step"], saved["weight@step"])
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], saved["weight@exp_avg"])
    assert layer.bias not in optimizer.state


def test_clips_without_times_are_left_out_of_the_stages_that_need_them(workshop):
    data = read_recipe(workshop / "recipe.yaml").data
    clips, _ = load_corpora(data)
    timed = {clip.id for clip in clips if clip.source.phones}
    drawn = [set(ids) for _, ids in BatchOrder(clips, data, seed=0)]
    assert set().union(*drawn[:4]) <= timed < set().union(*drawn[4:])
    mistold = [replace(c, text=c.text + " more") for c in clips]
    with pytest.raises(UsageError, match="none of them has times for tokens"):
        BatchOrder(mistold, data, seed=0)


def test_a_damaged_recipe_in_the_folder_is_one_line(workshop, tmp_path):
    (tmp_path / "recipe.json").write_text('{"out": ')
    with pytest.raises(UsageError, match=r"recipe\.json is damaged; take another --out"):
        train.main([str(workshop / "recipe.yaml"), "--out", str(tmp_path)])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_repository_are_valid(path):
    assert read_recipe(path).out == Path("runs") / path.stem


def test_a_folder_belongs_to_one_recipe(workshop, uninterrupted):
    with pytest.raises(UsageError, match=r"another recipe \(optim differ\)"):
        train.main(
            [str(workshop / "recipe.yaml"), "--out", str(uninterrupted), "--optim.lr", "0.5"]
        )
