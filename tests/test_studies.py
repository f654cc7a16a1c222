"""The paper's experiments: planned once each, resumed, scored over seeds, said in a sentence."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from transformers import WhisperForConditionalGeneration

from melprobe import study
from melprobe.analysis.seeds import difference_over_seeds, over_seeds
from melprobe.analysis.study import swap_partners
from melprobe.audio.load import load_utterance
from melprobe.errors import UsageError
from melprobe.listener import load
from melprobe.model.ancestry import read_ancestors
from melprobe.report.studies import markdown, sentence
from melprobe.studies import running
from melprobe.studies.budget import TOKENS_PER_SECOND, count
from melprobe.studies.paper import STUDIES
from melprobe.studies.running import carry_out, plan
from melprobe.studies.sizes import FOLDER, read_size, within
from melprobe.studies.table import findings
from melprobe.training.speech import SpeechTask
from tests.test_whisper_front import whisper_folder
from tests.tiny import split_clips


@pytest.fixture(scope="module")
def tiny_size(folder, tmp_path_factory):
    """A size that trains four steps on noise, as a file."""
    place = tmp_path_factory.mktemp("size")
    split_clips(folder, place)
    whisper_folder(place / "whisper")
    size = {
        "hardware": "a test",
        "tflops": 0.1,
        "memory_gb": 1,
        "n_layers": 4,
        "seeds": 2,
        "test": {"manifest": str(place / "dev.jsonl")},
        "recipe": {
            "model": {
                "base": str(folder / "base"),
                "prompt": ["", "<|answer|>"],
                "lora": {"rank": 2},
            },
            "data": {
                "train": [{"manifest": str(place / "train.jsonl")}],
                "dev": [str(place / "dev.jsonl")],
                "stages": [{"steps": 2}],
                "batch_seconds": 3,
                "workers": 0,
            },
        },
        "timed": {"data.stages": [{"steps": 2}]},
        "twin": {"model.front": "whisper", "model.encoder.name": str(place / "whisper")},
        "random_encoder": {"model.encoder.weights": "random", "model.encoder.train": True},
        "more": [{"manifest": str(place / "train.jsonl"), "repeat": 2}],
        "long": {"model.frames_per_patch": 2},
        "lengths": [[0, 0.85], [0.85, 2]],
    }
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(size))
    return path


def run(tiny_size, place, name, *words):
    out = place / f"out-{name}"
    study.main(
        [name, "--size", str(tiny_size), "--runs", str(place / "runs"), "--out", str(out), *words]
    )
    return out, json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture
def in_process(monkeypatch):
    """Runs without processes of their own, which take seconds to start."""

    def call(module, *words, log, what, jobs):
        importlib.import_module(module).main(list(words))

    monkeypatch.setattr(running, "_python", call)


def test_initialisation_trains_every_arm_and_hands_the_adapter_on(tiny_size, place, in_process):
    out, results = run(tiny_size, place, "initialisation", "--seeds", "1")
    folder_of = {arm["arm"]: Path(arm["runs"][0]) for arm in results["arms"]}
    assert list(folder_of) == [
        "pretrained-random",
        "pretrained-pretrained",
        "random-random",
        "random-pretrained",
        "none-pretrained",
        "none-random",
    ]
    assert len(set(folder_of.values())) == 6
    (ancestor,) = read_ancestors(folder_of["none-pretrained"] / "last")
    twin = folder_of["pretrained-random"] / "last"
    assert (ancestor.name, ancestor.gave) == (str(twin), "adapter")
    assert read_ancestors(folder_of["none-random"] / "last") == []
    # One seed tells nothing of the next.
    assert {pair["verdict"] for pair in results["pairs"]} == {"not resolved"}
    assert all(arm["wer_ci"] is None for arm in results["arms"])
    text = (out / "report.md").read_text()
    assert "Not resolved: no pair is told apart" in text and "7.44" in text
    # Four steps on noise: none hears, and the rows say what each clip was worth.
    assert text.count("| 0 of 1 |") == 6
    lm = load(folder_of["none-random"] / "last")
    rows = [json.loads(line) for line in (folder_of["none-random"] / "rows.jsonl").open()]
    clips = read_size(str(tiny_size)).test.drawn()
    partners = swap_partners(clips)
    for row, clip, partner in zip(rows, clips, partners, strict=True):
        own, other = (lm.score([load_utterance(u)], [clip.text]) for u in (clip, clips[partner]))
        assert row["tokens"] == own.tokens.item()
        assert row["nll"] == pytest.approx(own.nll.item(), rel=0.01)
        assert row["nll_swapped"] == pytest.approx(other.nll.item(), rel=0.01)
    (gate,) = next(arm["gates"] for arm in results["arms"] if arm["arm"] == "none-random")
    tokens = sum(row["tokens"] for row in rows)
    assert gate["nll_intact"] == pytest.approx(sum(row["nll"] for row in rows) / tokens)
    assert not gate["passed"]


def test_studies_share_runs_and_switch_a_trained_adapter_off(
    tiny_size, place, in_process, monkeypatch
):
    whole = STUDIES["freezing"](read_size(str(tiny_size)))
    arms = tuple(arm for arm in whole.arms if arm.name in {"all", "off-4", "held-4", "removed-4"})
    trimmed = whole._replace(arms=arms, order=(("all", "removed-4"),))
    monkeypatch.setitem(STUDIES, "freezing", lambda size: trimmed)
    _, freezing = run(tiny_size, place, "freezing", "--seeds", "1")
    folder_of = {arm["arm"]: Path(arm["runs"][0]) for arm in freezing["arms"]}
    _, initialisation = run(tiny_size, place, "initialisation", "--seeds", "1")
    shared = next(arm for arm in initialisation["arms"] if arm["arm"] == "none-random")["runs"][0]
    assert folder_of["all"] == folder_of["off-4"] == Path(shared)
    assert {"rows.jsonl", "rows-off-2-3.jsonl"} <= {p.name for p in Path(shared).glob("rows*")}
    kept = json.loads((folder_of["removed-4"] / "recipe.json").read_text())["model"]["lora"]
    held = json.loads((folder_of["held-4"] / "recipe.json").read_text())["model"]["lora"]
    assert kept["layers"] == [0, 1] and held["held"] == [2, 3]
    assert held["init"] == f"{shared}/last"


def test_a_teacher_is_another_arms_checkpoint(tiny_size):
    size = read_size(str(tiny_size))
    runs = {r.arm.name: r for r in plan(STUDIES["alignment"](size), size, 1, Path("runs"))}
    distil = runs["distilled"].recipe.distil
    assert distil is not None and distil.teacher == str(runs["twin"].checkpoint)
    stages = runs["front-first"].recipe.data.stages
    assert [(stage.steps, stage.train) for stage in stages] == [(1, "front"), (1, "all")]


def test_clips_of_some_lengths_are_scored_apart(tiny_size, place, in_process):
    _, masking = run(tiny_size, place, "masking", "--seeds", "1")
    assert [(arm["arm"], arm["seconds"]) for arm in masking["arms"]] == [
        ("causal", [0.0, 0.85]),
        ("bidirectional", [0.0, 0.85]),
        ("causal", [0.85, 2.0]),
        ("bidirectional", [0.85, 2.0]),
    ]
    assert sum(arm["clips"] for arm in masking["arms"]) == 2 * 2
    assert masking["note"].endswith("Clips here take up to 100 positions, so this can't be seen.")


def test_what_is_there_is_not_made_again(tiny_size, place, monkeypatch):
    def call(module, *words, log, what, jobs):
        raise AssertionError(f"{what}: {module}")

    monkeypatch.setattr(running, "_python", call)
    before = (place / "out-initialisation" / "results.json").read_text()
    run(tiny_size, place, "initialisation", "--seeds", "1")
    assert (place / "out-initialisation" / "results.json").read_text() == before


def test_several_at_a_time_wait_for_what_they_need(tiny_size, tmp_path, monkeypatch):
    """Two in turn of every study: each recipe once, and never before the one it starts from."""
    began, ended, most, lock = [], [], [], threading.Lock()

    def call(module, *words, log, what, jobs):
        if module == "melprobe.train":
            recipe = json.loads(Path(words[0]).read_text())
            with lock:
                assert recipe["out"] not in began and jobs == 2
                began.append(recipe["out"])
                most.append(len(began) - len(ended))
                start = recipe["model"]["lora"]["init"] or (recipe["distil"] or {}).get("teacher")
                assert start is None or start.removesuffix("/last") in ended
            time.sleep(0.02)
            (Path(recipe["out"]) / "last").mkdir()
            with lock:
                ended.append(recipe["out"])
        else:
            Path(words[words.index("--rows") + 1]).touch()

    monkeypatch.setattr(running, "_python", call)
    size = read_size(str(tiny_size))
    for name in ("initialisation", "freezing", "alignment"):
        runs = plan(STUDIES[name](size), size, 2, tmp_path)
        carry_out(runs, size, lambda run, doing: None, jobs=2)
        assert all(run.rows.exists() for run in runs)
    assert max(most) == 2


def test_one_that_fails_ends_a_study_of_several_at_a_time(tiny_size, tmp_path, monkeypatch):
    began = []

    def call(module, *words, log, what, jobs):
        began.append(what)
        raise UsageError(f"{what}: no")

    monkeypatch.setattr(running, "_python", call)
    size = read_size(str(tiny_size))
    runs = plan(STUDIES["initialisation"](size), size, 2, tmp_path)
    with pytest.raises(UsageError, match=r"(pretrained|random)-random, seed 0: no"):
        carry_out(runs, size, lambda run, doing: None, jobs=2)
    assert set(began) == {"pretrained-random, seed 0", "random-random, seed 0"}


def test_an_interrupt_ends_all_that_is_under_way(tiny_size, tmp_path):
    command = [sys.executable, "-m", "melprobe.study", "initialisation", "--jobs", "2"]
    command += ["--size", str(tiny_size), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    # A shell has what it starts in the background ignore interrupts, and that is handed down.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    study_of = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while len(children := psutil.Process(study_of.pid).children()) < 2:
            assert study_of.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        study_of.send_signal(signal.SIGINT)
        _, told = study_of.communicate(timeout=20)
        assert study_of.returncode == 130 and "the same command goes on from here" in told
        assert not any(child.is_running() for child in children)
    finally:
        for process in (study_of, *filter(psutil.Process.is_running, children)):
            process.kill()


def test_an_interrupt_ends_what_is_just_being_started(tiny_size, tmp_path, monkeypatch):
    """A process that is there, while whoever starts it has not been told so yet."""
    start = subprocess.Popen

    def slow(*words, **how):
        process = start(*words, **how)
        time.sleep(1)
        return process

    monkeypatch.setattr(running, "_command", lambda *words: ["sleep", "20"])
    monkeypatch.setattr(running.subprocess, "Popen", slow)
    size = read_size(str(tiny_size))
    runs = plan(STUDIES["pair"](size), size, 1, tmp_path)
    began = time.monotonic()
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            carry_out(runs, size, lambda run, doing: None, jobs=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 10


def test_a_run_that_fails_is_one_line(tiny_size, tmp_path):
    size = yaml.safe_load(tiny_size.read_text())
    size["recipe"]["data"]["train"][0]["manifest"] = "nowhere.jsonl"
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(size))
    with pytest.raises(
        UsageError, match=r"pretrained-random, seed 0: .*nowhere\.jsonl.*train\.log"
    ):
        study.main(["initialisation", "--size", str(path), "--runs", str(tmp_path), "--out", "x"])


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("size", sorted(file.stem for file in FOLDER.glob("*.yaml")))
def test_every_study_is_planned_at_every_size(name, size):
    found = read_size(size)
    arms = STUDIES[name](found)
    runs = plan(arms, found, 2, Path("runs"))
    assert {(run.arm.name, run.seed) for run in runs} == {
        (arm.name, seed) for arm in arms.arms for seed in (0, 1)
    }
    names = {arm.name for arm in arms.arms}
    assert all({a, b} <= names for a, b in arms.order)


def test_a_budget_counts_what_learns_and_what_it_takes(tiny_size, capsys):
    size = read_size(str(tiny_size))
    study_of = STUDIES["initialisation"](size)
    runs = {run.arm.name: run for run in plan(study_of, size, 1, Path("runs"))}
    bare, twin = (count(runs[arm].recipe, 1) for arm in ("none-random", "pretrained-random"))
    task = SpeechTask(runs["none-random"].recipe)
    assert bare.parameters == sum(p.numel() for p in task.model.parameters())
    learning = [p.numel() for p in task.model.parameters() if p.requires_grad]
    assert bare.learning == sum(learning)
    assert bare.positions == 2 * 3 * (12.5 + TOKENS_PER_SECOND)
    seconds, patches, answers = 2 * 3, 2 * 3 * 12.5, 2 * 3 * TOKENS_PER_SECOND
    lora, front, blocks = (
        sum(p.numel() for name, p in task.model.named_parameters() if part in name and p.dim() > 1)
        for part in ("lora_", "audio_front", ".layers.")
    )
    output = task.model.get_output_embeddings().weight.numel()
    assert bare.flop == (
        (4 * blocks + 2 * lora) * bare.positions + 6 * front * patches + 4 * output * answers
    )
    heard = read_size(str(tiny_size)).twin["model.encoder.name"]
    encoder = WhisperForConditionalGeneration.from_pretrained(heard).get_encoder()
    encoder.embed_positions = None
    weights = sum(p.numel() for p in encoder.parameters() if p.dim() > 1)
    twins = SpeechTask(runs["pretrained-random"].recipe).model.audio_front
    its_front = sum(p.numel() for p in twins.parameters() if p.requires_grad and p.dim() > 1)
    # What stays as it was is run up alone, four times as often as the decoder.
    more = 2 * weights * seconds * 50 + 6 * (its_front - front) * patches
    assert twin.flop - bare.flop == pytest.approx(more)
    study.main(["initialisation", "--size", str(tiny_size), "--seeds", "3", "--dry-run"])
    assert "18 training runs" in capsys.readouterr().out


def test_the_papers_own_size_is_the_papers(capsys):
    """Its LoRA has 460 M parameters and its decoder 3.8 G, by the report on Phi-4-multimodal."""
    size = read_size("full")
    runs = plan(STUDIES["initialisation"](size), size, 1, Path("runs"))
    found = {run.arm.name: count(run.recipe, size.devices) for run in runs}
    bare, twin = found["none-random"], found["random-random"]
    assert 450e6 < bare.learning < 500e6 and 4.2e9 < bare.parameters < 4.3e9
    assert 420e6 < twin.learning - bare.learning < 440e6  # the Conformer
    hours = 135_000 * 320 * 16 / 3600
    assert hours == pytest.approx(3 * 64_000, rel=0.01)
    study.main(["token-rate", "--size", "full", "--dry-run"])
    assert "more than the 80 GB of a device: 100 Hz" in capsys.readouterr().out


def test_bad_sizes_are_one_line(tiny_size, tmp_path):
    def refused(match, **changes):
        size = yaml.safe_load(tiny_size.read_text()) | changes
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(size))
        with pytest.raises(UsageError, match=match):
            study.main(["token-rate", "--size", str(path), "--dry-run"])

    refused("tflops: Input should be greater than 0", tflops=-1)
    refused("color: .*", color="red")
    refused("data: Field required", recipe={})
    with pytest.raises(UsageError, match="--size huge: there are full, mini, smol"):
        study.main(["token-rate", "--size", "huge"])
    with pytest.raises(UsageError, match="--seeds 0"):
        study.main(["token-rate", "--size", str(tiny_size), "--seeds", "0"])
    with pytest.raises(UsageError, match="--jobs 0"):
        study.main(["token-rate", "--size", str(tiny_size), "--jobs", "0"])
    with pytest.raises(UsageError, match="invalid choice"):
        study.main(["nothing", "--size", "mini"])


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("train", None, "data.train"),
        ("train", ["x"], "data.train.0"),
        ("stages", [], "data.stages"),
        ("stages", ["x"], "data.stages.0"),
        ("stages", [{}], "data.stages.0.steps: Field required"),
    ],
)
def test_a_recipe_that_is_none_is_one_line_in_every_study(
    tiny_size, tmp_path, name, part, value, said
):
    size = yaml.safe_load(tiny_size.read_text())
    size["recipe"]["data"][part] = value
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(size))
    with pytest.raises(UsageError, match=rf"bad.yaml: recipe: .*{said}"):
        study.main([name, "--size", str(path), "--dry-run"])


def test_numbers_in_quotes_are_numbers_in_every_study(tiny_size, capsys, tmp_path):
    size = yaml.safe_load(tiny_size.read_text())
    size["recipe"]["data"]["stages"] = [{"steps": "2"}]
    size["recipe"]["data"]["train"][0]["share"] = "0.5"
    path = tmp_path / "quoted.yaml"
    path.write_text(yaml.safe_dump(size))
    for name in ("data-scale", "alignment"):
        study.main([name, "--size", str(path), "--dry-run"])


@pytest.mark.parametrize("lengths", [[2, 1], [-1, 0], [0, float("inf")], [0, float("nan")]])
def test_lengths_are_rising_seconds(tiny_size, tmp_path, lengths):
    size = yaml.safe_load(tiny_size.read_text()) | {"lengths": [lengths]}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(size))
    with pytest.raises(UsageError, match=r"lengths\.0: name the shorter one first"):
        read_size(str(path))


@pytest.mark.parametrize("n_layers", [3, 99])
def test_blocks_are_as_many_as_the_bases(tiny_size, tmp_path, n_layers):
    size = yaml.safe_load(tiny_size.read_text()) | {"n_layers": n_layers}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(size))
    with pytest.raises(UsageError, match=rf"n_layers: {n_layers}, but .*base has 4 blocks"):
        study.main(["freezing", "--size", str(path), "--dry-run"])


def test_clips_that_cannot_be_tested_are_refused_before_training(tiny_size, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_python", None)  # nothing is trained
    size = yaml.safe_load(tiny_size.read_text())
    path = tmp_path / "bad.yaml"

    def refused(match, **changes):
        path.write_text(yaml.safe_dump(size | changes))
        words = ["--size", str(path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
        with pytest.raises(UsageError, match=match):
            study.main(["masking", *words])

    refused("swapping needs two clips", test=size["test"] | {"clips": 1})
    refused("lengths: no clip of .* is so long", lengths=[[60, 70]])


def test_a_size_beside_one_is_a_path(tiny_size, monkeypatch):
    monkeypatch.chdir(tiny_size.parent)
    assert read_size("tiny.yaml") == read_size(str(tiny_size))


def test_rows_that_are_broken_or_of_other_clips_are_made_again(tiny_size, tmp_path, monkeypatch):
    size = read_size(str(tiny_size))
    (run, *_) = plan(STUDIES["pair"](size), size, 1, tmp_path)
    run.folder.mkdir()
    made = []

    def call(module, *words, log, what, jobs):
        made.append(module)

    monkeypatch.setattr(running, "_python", call)
    whole = [
        {"audio_filepath": u.id, "text": u.text, "speaker": u.speaker} for u in size.test.drawn()
    ]
    lines = [json.dumps(row) + "\n" for row in whole]
    for text in ("", lines[0], "".join(lines)[:-9], "".join(lines[::-1]), "[]\n" * 2):
        run.rows.write_text(text)
        running.test(run, size)
        assert made == ["melprobe.studies.testing"]
        made.clear()
    run.rows.write_text("".join(lines))
    running.test(run, size)
    assert not made
    running.test(run, size.model_copy(update={"test": size.test.model_copy(update={"clips": 1})}))
    assert made


def test_runs_may_be_moved(tiny_size, tmp_path):
    """Those that start from another too: where it lies is not in their names."""
    size = read_size(str(tiny_size))
    for name in STUDIES:
        here, there = (
            [run.folder.name for run in plan(STUDIES[name](size), size, 2, place)]
            for place in (tmp_path / "here", tmp_path / "there")
        )
        assert here == there


def test_a_run_whose_log_is_damaged_is_one_line(tiny_size, tmp_path):
    size = read_size(str(tiny_size))
    (run, *_) = plan(STUDIES["pair"](size), size, 1, tmp_path)
    run.checkpoint.mkdir(parents=True)
    for text in ("", "{", "[]\n", '{"step": 1}\n'):
        (run.checkpoint / "log.jsonl").write_text(text)
        with pytest.raises(UsageError, match=r"log\.jsonl: missing or damaged; delete .*-seed0, "):
            running.seconds_of(run)
    (run.checkpoint / "log.jsonl").write_text('{"seconds": 1}\n{"seconds": 2.5}\n')
    assert running.seconds_of(run) == 2.5


def test_every_clip_up_to_the_longest_is_of_one_length():
    lengths = [(0.0, 1.5), (1.5, 3.0)]
    for seconds, number in ((0.1, 0), (1.5, 0), (1.51, 1), (3.0, 1)):
        assert [within(seconds, length) for length in lengths] == [number == 0, number == 1]


def test_a_killed_run_says_so_and_not_what_an_earlier_one_said(tiny_size, tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("an earlier complaint\n")
    for script, said in (("kill -9 $$", "ended from outside, Killed"), ("exit 3", "exit code 3")):
        program = tmp_path / "program"
        program.write_text(script)
        monkeypatch.setattr(running, "_command", lambda *w, program=program: ["sh", str(program)])
        with pytest.raises(UsageError, match=f"it: {said} "):
            running._python("module", log=log, what="it", jobs=1)


def test_a_report_says_what_is_so(tiny_size, place, in_process):
    """One speaker, two runs, lengths apart; and one run, which has no intervals."""
    out, _ = run(tiny_size, place, "masking", "--seeds", "2")
    text = (out / "report.md").read_text()
    assert "over runs and utterances; and how many runs hear, on clips of all lengths" in text
    assert "that of each run" not in text
    out, _ = run(tiny_size, place, "pair", "--seeds", "2")
    text = (out / "report.md").read_text()
    assert "over runs and utterances; that of each run; and how many" in text
    assert "hold together at 95 %" in text
    out, results = run(tiny_size, place, "initialisation", "--seeds", "1")
    text = (out / "report.md").read_text()
    assert "hold together" not in text and "which has no interval; that of each run; and" in text
    assert "All had as many steps, besides those of an adapter that was taken over." in text
    results["arms"][0]["steps"] = 1000
    assert "They had 2 to 1,000 steps, besides" in markdown(results)


def simulated(rng, mean, between_runs, speakers, clips, runs, of_speakers):
    """Errors [runs, N] of ten-word clips whose rate varies with the run and with the speaker."""
    rate = mean + between_runs * rng.standard_normal((runs, 1)) + of_speakers
    return rng.binomial(10, np.clip(rate, 0, 1), (runs, speakers * clips))


@pytest.mark.parametrize("hears", [True, False])
def test_of_two_deaf_arms_no_order_is_said(tiny_size, tmp_path, hears):
    """Twenty clips, three runs: one arm has every word wrong, the other none."""
    study_of = STUDIES["pair"](read_size(str(tiny_size)))
    runs = plan(study_of, read_size(str(tiny_size)), 3, tmp_path)
    for run in runs:
        good = run.arm.name == "encoder"
        row = {"text": "one two", "duration": 1.0, "speaker": "", "tokens": 3, "nll": 1.0}
        row |= {"pred_text": "one two" if good else "three four", "pred_text_swapped": "five six"}
        row["nll_swapped"] = 9.0 if good and hears else 1.2
        run.rows.parent.mkdir()
        run.rows.write_text((json.dumps(row) + "\n") * 20)
        run.checkpoint.mkdir()
        (run.checkpoint / "log.jsonl").write_text(json.dumps({"seconds": 60}))
    results = findings(study_of, runs)
    (pair,) = results["pairs"]
    assert (pair["difference"], pair["difference_ci"]) == (-1.0, (-1.0, -1.0))
    assert pair["verdict"] == ("agrees" if hears else "not resolved")
    assert [gate["passed"] for gate in results["arms"][0]["gates"]] == [hears] * 3


def test_intervals_over_seeds_hold_the_truth():
    """Of 1,000 simulated studies, three runs each: the rate and the difference of two recipes."""
    rng = np.random.default_rng(0)
    speakers, clips = 20, 5
    names = [str(i // clips) for i in range(speakers * clips)]
    words = np.full(speakers * clips, 10)
    held = np.zeros(2)
    for _ in range(1000):
        of_speakers = np.repeat(0.05 * rng.standard_normal(speakers), clips)
        a, b = (
            simulated(rng, mean, 0.03, speakers, clips, 3, of_speakers) for mean in (0.30, 0.25)
        )
        one, two = over_seeds(a, words, names), difference_over_seeds(a, b, words, names)
        held += [one.low <= 0.30 <= one.high, two.low <= 0.05 <= two.high]
    assert all(0.92 <= share <= 0.99 for share in held / 1000)


def test_one_run_has_no_interval_and_equal_runs_no_width():
    one = over_seeds([[1, 2, 3]], [10, 10, 10], ["", "", ""])
    assert (one.value, one.low, one.high) == (0.2, -np.inf, np.inf)
    same = difference_over_seeds([[1, 2]] * 3, [[1, 2]] * 3, [10, 10], ["", ""])
    assert (same.value, same.low, same.high) == (0, 0, 0)


def found(*verdicts):
    arms = [
        {"arm": name, "label": name.upper(), "seconds": None}
        for name in "abcd"[: len(verdicts) + 1]
    ]
    pairs = [
        {"lower": a["arm"], "higher": b["arm"], "seconds": None, "verdict": verdict}
        for (a, b), verdict in zip(pairwise(arms), verdicts, strict=True)
    ]
    return {"whose": "the paper's order", "arms": arms, "pairs": pairs}


def test_the_sentence_says_only_what_intervals_separate():
    assert sentence(found("agrees", "agrees")) == "Agrees with the paper's order, in all 2 pairs."
    assert sentence(found("agrees", "disagrees")).startswith(
        "Disagrees with the paper's order: “B” below “C” is the other way round"
    )
    assert sentence(found("not resolved")).startswith("Not resolved: no pair is")
    assert "1 of 2 pairs agree with the paper's order (“A” below “B”)" in sentence(
        found("agrees", "not resolved")
    )
