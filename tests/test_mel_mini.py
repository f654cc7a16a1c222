"""The shipped mel-mini does what its card says, on voices that its training never heard."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import melprobe
from melprobe import ablate
from melprobe.analysis.study import swap_partners
from melprobe.analysis.wer import corpus_wer, count_errors
from melprobe.audio.load import load_utterance
from melprobe.corpus.manifest import read_manifest
from melprobe.hooks.layers import parse_layers

WORDS = Path(__file__).parent / "data" / "words.jsonl"
LIMIT = 40


@pytest.fixture(scope="module")
def listener():
    return melprobe.load("mel-mini", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def clips():
    utterances = read_manifest(WORDS)
    return utterances, [load_utterance(u) for u in utterances]


def wer(utterances, heard):
    pairs = zip(utterances, heard, strict=True)
    return corpus_wer([count_errors(u.text, text) for u, text in pairs])


def test_it_writes_down_words_in_random_order(listener, clips):
    utterances, waves = clips
    assert wer(utterances, listener.transcribe(waves, LIMIT)) < 0.15  # 0.09; on 700 clips 0.08


def test_it_writes_what_it_hears_not_what_was_asked(listener, clips):
    utterances, waves = clips
    swapped = [waves[i] for i in swap_partners(utterances)]
    assert wer(utterances, listener.transcribe(swapped, LIMIT)) > 0.9


def test_skipping_changes_what_a_trained_model_hears_and_leaves_no_trace(listener, clips):
    utterances, waves = clips
    intact = listener.transcribe(waves, LIMIT)
    with listener.skip({0}, positions="speech"):
        assert wer(utterances, listener.transcribe(waves, LIMIT)) > 0.5
    with listener.skip({listener.n_layers - 1}, positions="speech"):
        assert listener.transcribe(waves, LIMIT) == intact
    assert listener.transcribe(waves, LIMIT) == intact


def test_a_padded_batch_hears_what_each_clip_alone_does(listener, clips):
    _, waves = clips
    alone = [listener.transcribe([wave], LIMIT)[0] for wave in waves[:4]]
    assert listener.transcribe(waves[:4], LIMIT) == alone


def test_its_layer_study_passes_the_gate(tmp_path):
    words = ["--checkpoint", "mel-mini", "--data", str(WORDS), "--limit", "0", "--device", "cpu"]
    ablate.main(["--skip-layers", *words, "--out", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["gate"]["passed"]
    *_, last = found["layers"]
    worst = max(found["layers"], key=lambda layer: layer["damage"])
    assert worst["layer"] <= 6 and worst["delta_nll_ci"][0] > 1  # where training read words
    assert last["damage"] == 0


@pytest.mark.parametrize(("layers", "n_sets"), [("greedy", (2, 9)), ("picks:3", (1, 4))])
def test_sets_are_chosen_on_clips_that_are_not_reported(tmp_path, layers, n_sets):
    words = ["--checkpoint", "mel-mini", "--data", str(WORDS), "--limit", "0", "--device", "cpu"]
    ablate.main(["--skip-layers", layers, *words, "--out", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = pd.read_parquet(tmp_path / "run" / "rows.parquet")
    assert found["choice"]["n_utterances"] == found["n_utterances"] == 8
    assert len(set(rows.utterance)) == 8
    assert found["choice"]["not_offered"] == [9]
    sets = [parse_layers(str(layer["layer"]), 10) for layer in found["layers"]]
    assert n_sets[0] <= len(sets) <= n_sets[1]
    ways = [way for layer in found["layers"] for way in layer["picked_by"]]
    if layers == "greedy":
        assert [len(blocks) for blocks in sets] == list(range(1, len(sets) + 1))
        assert set(ways) == {"greedy"}
    else:
        assert {len(blocks) for blocks in sets} == {3}
        assert sorted(ways) == ["angular distance", "beam search", "block influence", "greedy"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "clips reported here had no part in it" in page
