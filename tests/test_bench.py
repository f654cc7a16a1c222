"""The benchmarks as a user runs them: what they print, and that all contestants agree."""

import json

import pytest

from melprobe.bench import __main__ as bench
from melprobe.errors import UsageError
from tests.tiny import N_CLIPS as N
from tests.tiny import N_LAYERS


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
