"""Captures compared by the command: planted pairs of which the answer is known, and bad input."""

import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from melprobe import capture, compare
from melprobe.analysis.raw_mel import RawMel
from melprobe.audio.load import load_utterance
from melprobe.audio.mel import log_mel
from melprobe.captured import INDEX, Capture
from melprobe.corpus.manifest import read_manifest
from melprobe.errors import UsageError
from melprobe.hooks.positions import Kind
from melprobe.report.similarity import heat_map
from melprobe.shards import CaptureWriter, Caught
from tests.tiny import N_CLIPS, N_LAYERS, WORDS

CLIPS, LAYERS, WIDTH, RATE = 24, 3, 10, 12.5
LENGTHS = [20 + 3 * (i % 7) for i in range(CLIPS)]


def smooth(n, seed):
    """(n, WIDTH): frames that resemble their neighbours, each dimension at its own scale."""
    noise = torch.randn(n + 2, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (noise[:-2] + 2 * noise[1:-1] + noise[2:]) * torch.linspace(1, 3, WIDTH)


def residuals(clip):
    """(LAYERS, n, WIDTH) of clip number `clip`; each layer adds something new."""
    parts = [smooth(LENGTHS[clip], 1000 * layer + clip) for layer in range(LAYERS)]
    return torch.stack(parts).cumsum(0)


def write(
    folder, h_of, *, rate=RATE, words=WORDS, numbers=range(LAYERS), kind=Kind.SPEECH, mb=0.02
):
    """A capture of CLIPS clips by 12 speakers; h_of: (R, n, D) of each. Returns its folder."""
    about = {"residuals": list(numbers), "blocks": LAYERS - 1, "patches_per_second": rate}
    about["kinds"] = [k.name.lower() for k in Kind]
    utterances = [
        {
            "utterance": f"{i}.flac",
            "text": words[i % 11],
            "speaker": f"s{i % 12}",
            "duration": n / RATE,
        }
        for i, n in enumerate(LENGTHS)
    ]
    with CaptureWriter(folder, {}, about, utterances, mb) as writer:
        for clip in range(CLIPS):
            h = h_of(clip)
            n = h.shape[1]
            caught = Caught(
                list(numbers),
                h,
                torch.zeros(n, dtype=torch.long),
                torch.arange(n) + 1,
                torch.full((n,), int(kind)),
                (torch.arange(n) + 0.5) / rate,
            )
            writer.add(caught, [clip])
    return folder


@pytest.fixture(scope="module")
def a(tmp_path_factory):
    return write(tmp_path_factory.mktemp("captures") / "a", residuals)


def compared(tmp_path, *words):
    compare.main([*map(str, words), "--out", str(tmp_path / "out")])
    return json.loads((tmp_path / "out" / "results.json").read_text())


def pairs(results, of="h", scaling="raw"):
    return [p for p in results["pairs"] if (p["of"], p["scaling"]) == (of, scaling)]


def test_a_clip_is_read_from_its_shard(a):
    captured = Capture.open(a)
    assert captured.index["shards"] > 3
    for clip in (0, 13, CLIPS - 1):
        assert torch.equal(captured.clip(f"{clip}.flac"), residuals(clip))


def test_a_rotated_model_is_the_same_in_every_layer_and_the_floor_is_not(a, tmp_path):
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))).Q
    b = write(tmp_path / "b", lambda clip: 5 * residuals(clip) @ turn + 3)
    found = compared(tmp_path, a, b)
    assert found["kind"] == "between" and found["unit"] == "speaker" and found["units"] == 12
    for of, layers in (("h", LAYERS), ("delta", LAYERS - 1)):
        assert len(pairs(found, of)) == layers
        for pair in pairs(found, of):
            assert pair["cka"] == pytest.approx(1, abs=1e-5) and pair["lag"] == 0
            assert pair["cka_ci"] == pytest.approx((1, 1), abs=1e-4)
            assert abs(pair["floor"]) < 0.25 and pair["above_floor_ci"][0] > 0.5
            assert pair["secondary"]["procrustes"] == pytest.approx(1, abs=1e-5)
            assert pair["secondary"]["pwcca"] == pytest.approx(1, abs=1e-4)
            assert pair["secondary_floor"]["mutual_neighbours"] < 0.3
    for pair in pairs(found, scaling="standardised"):
        assert pair["cka"] < 0.999 and "secondary" not in pair


def test_the_grid_within_a_model_is_symmetric_and_1_on_its_diagonal(a, tmp_path, capsys):
    found = compared(tmp_path, a)
    assert found["kind"] == "within" and found["b"] is None and found["lags"] == [0]
    assert [(g["of"], g["scaling"]) for g in found["grids"]] == [
        ("h", "raw"),
        ("h", "standardised"),
        ("delta", "raw"),
        ("delta", "standardised"),
    ]
    for grid in found["grids"]:
        cka = np.array(grid["cka"])
        assert cka == pytest.approx(cka.T) and np.diag(cka) == pytest.approx(1)
    assert [(p["layer_a"], p["layer_b"]) for p in pairs(found)] == [(0, 1), (1, 2)]
    for pair in pairs(found):
        cka = found["grids"][0]["cka"][pair["layer_a"]][pair["layer_b"]]
        assert pair["cka"] == pytest.approx(cka, abs=1e-5)
        assert pair["cka_ci"][0] < cka < pair["cka_ci"][1]
    printed = capsys.readouterr().out
    assert "debiased linear CKA, raw" in printed and f"{pairs(found)[0]['cka']:.2f}" in printed


def test_what_blocks_add_independently_is_not_similar(a, tmp_path):
    for pair in pairs(compared(tmp_path, a), "delta"):
        assert pair["cka_ci"][0] < 0 < pair["cka_ci"][1] or abs(pair["cka"]) < 0.03


def test_a_late_model_is_found_at_its_lag(a, tmp_path):
    b = write(tmp_path / "b", lambda clip: residuals(clip).roll(1, dims=1))
    found = compared(tmp_path, a, b)
    for pair in pairs(found):
        assert pair["lag"] == 1 and pair["cka"] == pytest.approx(1, abs=1e-5)
    assert max(np.diag(found["grids"][0]["cka"])) < 0.9  # at lag 0
    for pair in pairs(compared(tmp_path / "0", a, b, "--lags", "0")):
        assert pair["lag"] == 0 and pair["cka"] < 0.9


def test_a_model_at_twice_the_rate_is_matched_in_time(a, tmp_path):
    b = write(tmp_path / "b", lambda clip: residuals(clip).repeat_interleave(2, 1), rate=2 * RATE)
    for first, second in ((a, b), (b, a)):
        found = compared(tmp_path / first.name, first, second)
        for pair in pairs(found):
            assert pair["cka"] == pytest.approx(1, abs=1e-5)


def test_scores_follow_from_the_rows(a, tmp_path):
    found = compared(tmp_path, a)
    rows = pd.read_parquet(tmp_path / "out" / "rows.parquet")
    assert set(rows.pairing) == {"real", "re-paired"} and rows.utterance.nunique() == CLIPS
    for pair in found["pairs"]:
        keys = ["of", "scaling", "layer_a", "layer_b"]
        real = rows[rows.pairing == "real"]
        part = real[(real[keys] == [pair[k] for k in keys]).all(axis=1)]
        sums = part[["hsic_ab", "hsic_aa", "hsic_bb"]].sum()
        cka = sums.hsic_ab / np.sqrt(sums.hsic_aa * sums.hsic_bb)
        assert pair["cka"] == pytest.approx(cka)
        assert part.frames.sum() == found["counts"]["real"]["frames"] == sum(LENGTHS)


def test_small_windows_and_minibatches_change_little(a, tmp_path, monkeypatch):
    whole = pairs(compared(tmp_path / "whole", a))
    monkeypatch.setattr("melprobe.analysis.comparison.WINDOW", 120)
    monkeypatch.setattr("melprobe.analysis.comparison.BATCH", 16)
    for pair, other in zip(whole, pairs(compared(tmp_path / "small", a)), strict=True):
        assert pair["cka"] == pytest.approx(other["cka"], abs=0.03)


def test_the_same_command_writes_the_same_bytes(a, tmp_path):
    for _ in range(2):
        compared(tmp_path, a)
        files = [(tmp_path / "out" / n).read_bytes() for n in ("results.json", "similarity.svg")]
    compared(tmp_path, a)
    assert files == [
        (tmp_path / "out" / n).read_bytes() for n in ("results.json", "similarity.svg")
    ]


def test_the_heat_map_is_one_svg_that_says_what_it_shows(a, tmp_path):
    text = heat_map(compared(tmp_path, a))
    assert text == (tmp_path / "out" / "similarity.svg").read_text(encoding="utf-8")
    assert text.startswith("<svg ") and 'aria-label="Debiased linear CKA within one model' in text
    assert "residuals h, raw" in text and "what blocks add, Δ, standardised" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_the_heat_map_needs_no_torch():
    code = "import sys, melprobe.report.similarity; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_real_capture_is_compared(folder, tmp_path):
    words = ["--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    capture.main([*words, "--device", "cpu", "--positions", "all", "--out", str(tmp_path / "a")])
    found = compared(tmp_path, tmp_path / "a", tmp_path / "a")
    assert found["unit"] == "utterance" and found["units"] == N_CLIPS
    assert len(pairs(found)) == N_LAYERS + 1 and len(pairs(found, "delta")) == N_LAYERS
    for pair in found["pairs"]:
        assert pair["cka"] == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def heard(folder):
    words = ["--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    capture.main([*words, "--device", "cpu", "--out", str(folder / "heard")])
    return folder / "heard"


def test_raw_mel_takes_the_place_of_a_second_model(folder, heard, tmp_path):
    found = compared(tmp_path, heard, "mel", "--lags", "0")
    assert found["kind"] == "mel" and found["b"] is None
    assert [(p["layer_a"], p["layer_b"]) for p in pairs(found)] == [(n, 0) for n in range(5)]
    assert np.array(found["grids"][0]["cka"]).shape == (N_LAYERS + 1, 1)
    captured = Capture.open(heard)
    mel = RawMel(captured)
    for utterance in read_manifest(folder / "data.jsonl"):
        patches = mel.h(utterance.id)[0]
        frames = log_mel(torch.from_numpy(load_utterance(utterance))[None])[0]
        r = round(100 / captured.index["patches_per_second"])
        for number in range(len(frames) // r):
            assert torch.equal(patches[number], frames[number * r : (number + 1) * r].flatten())
        seconds = captured.rows[captured.rows.utterance == utterance.id].seconds.to_numpy()
        assert mel.clips[utterance.id].seconds == pytest.approx(seconds[: len(patches)])


def test_raw_mel_of_a_manifest_that_has_changed_is_refused(folder, heard, tmp_path):
    index = Capture.open(heard).index
    index["settings"]["data"] = "0" * 64
    with pytest.raises(UsageError, match=r"data\.jsonl: is not as it was when .*heard was made"):
        RawMel(Capture(heard, index))


def test_layers_that_are_not_neighbours_have_no_delta(tmp_path):
    b = write(tmp_path / "b", lambda clip: residuals(clip)[[0, 2]], numbers=[0, 2])
    found = compared(tmp_path, b)
    assert [(p["of"], p["layer_a"], p["layer_b"]) for p in found["pairs"]] == [("h", 0, 2)] * 2
    assert [g["of"] for g in found["grids"]] == ["h", "h"]


def test_clips_without_partners_have_no_floor(tmp_path, capsys):
    b = write(tmp_path / "b", residuals, words=["hold"] * 11)
    for pair in compared(tmp_path, b)["pairs"]:
        assert pair["cka"] and pair["floor"] is pair["above_floor"] is pair["floor_lag"] is None
    assert "none" in capsys.readouterr().out


def refused(tmp_path, *words):
    with pytest.raises(UsageError) as error:
        compared(tmp_path, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_captures_of_other_clips_or_words_are_refused(a, tmp_path):
    b = write(tmp_path / "b", residuals, words=[*WORDS[1:], WORDS[0]])
    message = refused(tmp_path, a, b)
    assert message.endswith(
        f"0.flac has other words than in {a}; capture both with the same --data"
    )
    index = json.loads((b / INDEX).read_text())
    for record in index["utterances"][:3]:
        record["utterance"] = "x" + record["utterance"]
    (b / INDEX).write_text(json.dumps(index))
    assert f"24 utterances, of which 21 are among the 24 of {a}; capture both" in refused(
        tmp_path, a, b
    )


def test_a_capture_without_speech_or_without_a_common_layer_is_refused(a, tmp_path):
    b = write(tmp_path / "b", residuals, kind=Kind.ANSWER)
    assert refused(tmp_path, a, b) == f"{b}: holds no speech; capture with --positions speech"
    c = write(tmp_path / "c", residuals, numbers=range(7, 10))
    assert refused(tmp_path, a, c) == (
        f"{c}: has no residual that {a} has; capture the same --layers"
    )
    d = write(tmp_path / "d", lambda clip: residuals(clip)[:1], numbers=[4])
    assert refused(tmp_path, d) == (
        f"{d}: one residual alone has no next one; capture more --layers"
    )


def test_too_few_frames_are_refused(tmp_path):
    b = write(tmp_path / "b", lambda clip: residuals(clip)[:, : 1 if clip < 3 else 0])
    assert "fewer than four clips with frames of speech at the same times; capture more" in refused(
        tmp_path, b
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lags", "-1"], "--lags -1: take 0 to 25"),
        (["--lags", "99"], "--lags 99: take 0 to 25"),
    ],
)
def test_options_that_mean_nothing_are_refused(a, tmp_path, words, message):
    assert refused(tmp_path, a, *words) == message


def test_a_folder_that_holds_no_capture_is_named(a, tmp_path):
    assert refused(tmp_path, a, tmp_path / "none").startswith(f"{tmp_path / 'none'}: there is no")
    assert refused(tmp_path, tmp_path).startswith(f"{tmp_path}: there is no capture")
