"""The benchmarks as a user runs them: what they print, and that all contestants agree."""

import json

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from melprobe.bench import __main__ as bench
from melprobe.errors import UsageError
from melprobe.training.flop import training_flop
from tests.tiny import N_CLIPS as N
from tests.tiny import N_LAYERS, TEXTS


def test_the_mel_bench_prints_what_it_promises(capsys):
    bench.main(["mel", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["max_error"] < 1e-3
    assert figures["ratio_transformers"] > 2  # 5 to 7 on an idle machine


def test_the_sweep_bench_finds_all_contestants_agreed(folder, capsys):
    pytest.importorskip("nnsight")
    pytest.importorskip("transformer_lens")
    words = ["--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    bench.main(["sweep", "--json", *words, "--dtype", "float32", "--device", "cpu"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["identical"] and figures["rows"] == N * N_LAYERS
    assert figures["max_nll_error"] < 1e-3
    assert min(figures[f"ratio_{name}"] for name in ("hf", "nnsight", "transformerlens")) > 0


def test_the_sweep_bench_can_do_without_transcripts_and_rivals(folder, capsys):
    words = ["--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    bench.main(["sweep", "--json", *words, "--nll-only", "--rivals", "hf", "--layers", "1-2"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["rows"] == 2 * N and "ratio_nnsight" not in figures
    assert figures["identical"] is None


def test_a_rival_that_is_not_installed_is_named(folder, monkeypatch):
    monkeypatch.setattr("melprobe.bench.sweep.find_spec", lambda name: None)
    words = ["--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    with pytest.raises(UsageError, match="--rivals nnsight: `pip install nnsight`"):
        bench.main(["sweep", *words])


def test_the_capture_bench_prints_what_it_promises(folder, capsys, monkeypatch):
    monkeypatch.setattr("melprobe.bench.capture.ROUNDS", 2)
    words = ["--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    bench.main(["capture", "--json", *words, "--device", "cpu", "--memory", "2", "8"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["utterances"] == N and figures["rows"] > N and figures["shards"] == 1
    assert figures["ratio"] > 0 and figures["seconds"] > figures["seconds_after"] > 0
    assert set(figures["peak_mb"]) == {"2", "8"} and min(figures["peak_mb"].values()) > 100


def test_the_capture_bench_names_what_it_cannot_do(folder):
    with pytest.raises(UsageError, match="--memory 0: take a number"):
        bench.main(["capture", "--memory", "0"])


def test_the_training_bench_trains_both_on_the_same_clips(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("melprobe.bench.train.WARMUP", 1)
    monkeypatch.setattr("melprobe.bench.train._CLIPS", 40)
    monkeypatch.setattr("melprobe.bench.train.RIVALS", {"plain": False})
    recipe = {
        "out": str(tmp_path / "run"),
        "model": {"base": str(folder / "base"), "lora": {"rank": 2}},
        "data": {
            "train": [{"manifest": "not read"}],
            "dev": ["not read"],
            "stages": [{"steps": 1}],
            "batch_seconds": 4,
            "workers": 0,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--recipe", str(tmp_path / "recipe.yaml"), "--data", str(folder / "data.jsonl")]
    bench.main(["train", "--json", *words, "--steps", "3", "--device", "cpu"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens_per_s"] > 0 and figures["ratio_trainer"] > 0
    assert figures["ratio_trainer_cpu"] > 0
    assert 0 < figures["mfu"] < 1
    assert figures["trainer"] == "plain" and "ratio_without_compile" not in figures
    assert 4 <= figures["clips_per_step"] <= 8  # 0.4 to 0.9 s each
    assert 0.5 < figures["filled_trainer"] <= 1
    assert not (tmp_path / "run").exists()


def test_training_flop_is_what_torch_counts(lm, clips):
    """Forward, and as much backward where nothing learns; attention scores left out."""
    batch = lm.processor(clips, TEXTS)
    with FlopCounterMode(display=False) as counter:
        lm.model.requires_grad_(False)(**batch)
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    speech = batch["input_ids"] == lm.processor.audio_token_id
    counts = {
        "positions": batch["input_ids"].numel(),  # torch counts padding too
        "patches": len(clips) * int(speech.sum(1).max()),
        "answers": int((batch["labels"] != -100).sum()),
        "frames": 0,
    }
    assert training_flop(lm.model, counts) == 2 * products


def test_the_compare_bench_finds_the_same_as_ckatorch(capsys):
    pytest.importorskip("ckatorch")
    bench.main(["compare", "--json", "--layers", "4", "--frames", "2048", "--width", "32"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["max_difference"] < 1e-5 and figures["frames"] == 2048
    assert figures["ratio_ckatorch"] > 1.5 and figures["peak_mb"] > 100
    assert 0 < figures["of_peak"] < 1


def test_the_compare_bench_names_what_it_cannot_do(monkeypatch):
    with pytest.raises(UsageError, match="--frames 5: take at least 1024"):
        bench.main(["compare", "--frames", "5"])
    monkeypatch.setattr("melprobe.bench.compare.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="with ckatorch: `pip install ckatorch`"):
        bench.main(["compare"])


def test_the_training_bench_names_what_it_cannot_do():
    with pytest.raises(UsageError, match="--steps 0: take at least one"):
        bench.main(["train", "--steps", "0"])
    with pytest.raises(UsageError, match=r"mini-base\.yaml: trains on text alone"):
        bench.main(["train", "--recipe", "recipes/mini-base.yaml"])


def test_the_probe_bench_finds_both_agreed(capsys):
    words = ["--layers", "2", "--timed", "1", "--rows", "4000", "--width", "48"]
    bench.main(["probe", "--json", *words, "--device", "cpu"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["max_accuracy_gap"] < 0.005 and figures["max_r2_gap"] < 1e-3
    assert figures["ratio_sklearn"] > 0 and figures["peak_mb"] >= figures["start_mb"] > 100
    assert figures["labels"] == 9 and figures["covariances"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "10"], "--rows 10: take at least 2000"),
        (["--layers", "0"], "--layers 0: take at least 1"),
        (["--layers", "2", "--timed", "3"], "--timed 3: there are 2 layers"),
    ],
)
def test_the_probe_bench_names_what_it_cannot_do(words, message):
    with pytest.raises(UsageError, match=message):
        bench.main(["probe", *words])
