"""`python -m melprobe.probe` as a user runs it."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
import soundfile
from rich.console import Console

from melprobe import capture, probe
from melprobe.corpus.manifest import Span, Utterance, write_manifest
from melprobe.errors import UsageError
from melprobe.probing.labels import LABELS
from melprobe.report.profile import profile
from tests.tiny import N_LAYERS, WORDS

VOICES, CLIPS = 12, 48


def hisses(i):
    """One or two phones, so that the rate is not the same all over."""
    return [Span("s", 0.4, 0.6), Span("s", 0.6, 0.8)] if i % 4 else [Span("s", 0.4, 0.8)]


def make_manifest(place):
    """Clips of two words, the first a high tone and the second noise, by twelve voices."""
    rng = np.random.default_rng(0)
    utterances = []
    for i in range(CLIPS):
        first, second = WORDS[i % 3], WORDS[3 + i // 3 % 3]
        t = np.arange(6_400) / 16_000
        tone = 0.3 * np.sign(np.sin(2 * np.pi * (100 + 20 * (i % VOICES)) * t))
        wave = np.concatenate([tone, 0.1 * rng.standard_normal(6_400), np.full(3_200, 1e-4)])
        soundfile.write(place / f"{i}.flac", wave, 16_000)
        utterances.append(
            Utterance(
                f"{i}.flac",
                place / f"{i}.flac",
                f"{first} {second} {i}",
                1.0,
                f"voice {i % VOICES}",
                phones=(Span("aa", 0, 0.4), *hisses(i)),
                words=(Span(first, 0, 0.4), Span(second, 0.4, 0.8)),
                source=("queen:jungle", "queen:pub", "asterisk")[i % VOICES % 3],
                sex=("female", "male")[i % VOICES % 2],
                times="exact" if i % 2 else "forced alignment",
            )
        )
    write_manifest(place / "clips.jsonl", utterances)


def captured(folder, place, name, *words):
    known = ["--checkpoint", str(folder / "model"), "--data", str(place / "clips.jsonl")]
    known += ["--device", "cpu", "--model-dtype", "float32", "--limit", "0", *words]
    capture.main([*known, "--out", str(place / name)])
    return str(place / name)


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("probe")
    make_manifest(made)
    captured(folder, made, "capture", "--shard-mb", "0.05")
    captured(folder, made, "floor", "--layers", "0,4", "--dtype", "bfloat16")
    return made


@pytest.fixture(scope="module")
def study(place):
    words = [str(place / "capture"), "--floor", f"again={place / 'floor'}", "--device", "cpu"]
    probe.main([*words, "--logistic", "phone", "--out", str(place / "out")])
    return place / "out"


def test_what_is_written_is_whole(study, place):
    results = json.loads((study / "results.json").read_text())
    layers = [*(f"h_{i}" for i in range(N_LAYERS + 1)), "norm"]
    assert list(results["labels"]) == list(LABELS) and not results["unable"]
    for label, found in results["labels"].items():
        by_name = {(s["series"], s["probe"]): s for s in found["series"]}
        probes = {"ridge", "logistic"} if label == "phone" else {"ridge"}
        assert set(by_name) == {(s, p) for s in ("model", "again", "mel") for p in probes}
        assert by_name["model", "ridge"]["layers"] == layers
        assert by_name["again", "ridge"]["layers"] == ["h_0", "h_4", "norm"]
        assert by_name["mel", "ridge"]["layers"] == ["mel"]
        assert ("selectivity" in by_name["model", "ridge"]) == (label in ("phone", "class"))
        assert found["resampled"] == "utterance"  # four voices to test
    assert results["labels"]["phone"]["series"][0]["score"][0] > 0.9
    assert results["splits"]["phone"]["voices_apart"]
    assert not results["splits"]["speaker"]["voices_apart"]
    assert results["splits"]["corpus"]["classes"] == 2  # of queen one, whatever the scene
    assert results["versions"]["torch"] and "--floor again=" in results["command"]
    assert results["capture"]["settings"]["dtype"] == "float32"


def test_where_times_come_from_goes_with_the_scores(study, place, tmp_path, capsys):
    results = json.loads((study / "results.json").read_text())
    timed = {name for name, label in results["labels"].items() if "times" in label}
    assert timed == {"phone", "class", "word", "rate"} and not results["untimed"]
    assert results["labels"]["word"]["times"] == {"forced alignment": 24, "exact": 24}
    assert "phone, accuracy, times: forced alignment" in (study / "profile.svg").read_text()
    lines = [json.loads(line) for line in (place / "clips.jsonl").read_text().splitlines()]
    for line in lines[:3]:
        del line["words"], line["phones"], line["times"]
        line["no_times"] = "not alignable"
    for line in lines[3:]:
        line["times"] = "exact"
    del lines[2]["no_times"], lines[3]["times"], lines[4]["phones"]
    (place / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [str(place / "capture"), "--labels", "phone,word,time", "--device", "cpu"]
    probe.main([*words, "--data", str(place / "other.jsonl"), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out.splitlines()
    assert "phone: times: exact (43 clips), of unsaid origin (1 clips)" in told
    assert "word: times: exact (44 clips), of unsaid origin (1 clips)" in told
    assert "clips without times: 3 (2 not alignable, 1 never aligned)" in told
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["untimed"] == {"not alignable": 2, "never aligned": 1}
    probe.main([*words[:2], "time", *words[3:], "--out", str(tmp_path / "time")])
    assert "times:" not in capsys.readouterr().out


def test_automatic_edges_are_said_in_words(study, capsys):
    results = json.loads((study / "results.json").read_text())
    probe.show(results, Console(width=200))
    told = capsys.readouterr().out
    times = "times: forced alignment (24 clips), exact (24 clips); their edges are automatic"
    assert f"phone, class, word, rate: {times}\n" in told


def test_the_rows_carry_the_scores(study):
    rows = pd.read_parquet(study / "rows.parquet")
    results = json.loads((study / "results.json").read_text())
    mine = rows.query("label == 'phone' and series == 'model' and probe == 'ridge'")
    scores = mine.groupby("layer", sort=False)[["right", "n"]].sum()
    series = results["labels"]["phone"]["series"][0]
    assert (scores.right / scores.n).tolist() == pytest.approx(series["score"])
    control = rows.query("label == 'control:phone' and series == 'model' and probe == 'ridge'")
    sums = control.groupby("layer", sort=False)[["right", "n"]].sum()
    assert sums.n.tolist() == scores.n.tolist()
    assert series["selectivity"]["score"] == pytest.approx(
        ((scores.right - sums.right) / scores.n).tolist()
    )
    tested = set(mine.voice)
    assert len(tested) == results["splits"]["phone"]["clips"]["test"] / (CLIPS / VOICES)


def test_the_online_code_is_measured_where_logistic_regression_is(study):
    results = json.loads((study / "results.json").read_text())
    assert not results["labels"]["class"]["codes"]
    codes = {code["series"]: code for code in results["labels"]["phone"]["codes"]}
    assert set(codes) == {"model", "again", "mel"}
    model = codes["model"]
    assert model["layers"] == [*(f"h_{i}" for i in range(N_LAYERS + 1)), "norm"]
    assert 0 < min(model["bits_per_row"]) < np.log2(3)  # silence and two phones
    rows = pd.read_parquet(study / "rows.parquet").query("probe == 'mdl' and series == 'model'")
    train = results["splits"]["phone"]
    assert rows.utterance.nunique() == train["clips"]["train"]
    assert rows.groupby("layer").n.sum().eq(train["rows"]["train"]).all()
    sums = rows.groupby("layer", sort=False)[["bits", "n"]].sum()
    assert (sums.bits / sums.n).tolist() == pytest.approx(model["bits_per_row"])


def test_the_mel_of_a_patch_can_be_read_from_it(study):
    results = json.loads((study / "results.json").read_text())
    (mel,) = [s for s in results["labels"]["mel"]["series"] if s["series"] == "mel"]
    assert mel["score"][0] > 0.99


def test_the_figure_is_drawn_from_the_results_alone(study):
    results = json.loads((study / "results.json").read_text())
    assert profile(results) == (study / "profile.svg").read_text()
    ET.fromstring((study / "profile.svg").read_text())
    code = (
        "import sys; import melprobe.report.profile; "
        "print([m for m in ('torch', 'transformers', 'melprobe.model') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_probing_imports_no_model():
    code = (
        "import sys; import melprobe.probe; "
        "print([m for m in sys.modules if m.startswith(('melprobe.model', 'melprobe.training'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_same_command_finds_the_same(study, place, tmp_path, capsys):
    words = [str(place / "capture"), "--labels", "phone,time", "--device", "cpu"]
    for name in ("one", "two"):
        probe.main([*words, "--out", str(tmp_path / name)])
    assert "phone" in capsys.readouterr().out
    one, two = (pd.read_parquet(tmp_path / name / "rows.parquet") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two)
    assert set(one.label) == {"phone", "control:phone", "time"}
    assert (tmp_path / "one" / "profile.svg").read_bytes() == (
        tmp_path / "two" / "profile.svg"
    ).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "phones"], "--labels 'phones': there are phone, class, word, .*, or all"),
        (
            ["--logistic", "f0"],
            "--logistic 'f0': there are phone, class, word, speaker, sex, corpus, or",
        ),
        (["--floor", "random"], "--floor random: write NAME=CAPTURE"),
        (["--floor", "mel=x"], "--floor mel=x: the name is taken"),
        (["--floor", "a=x", "--floor", "a=y"], "--floor a=y: a is given twice"),
        (["--floor", "a=nowhere"], "nowhere: there is no capture"),
        (["--device", "tpu"], "--device tpu: not there; take cpu"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such manifest"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(place, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        probe.main([str(place / "capture"), *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_floor_of_other_clips_is_refused(folder, place, tmp_path):
    other = captured(folder, place, "fewer", "--limit", "40")
    with pytest.raises(UsageError, match=r"has other clips or patches than .* the same --data"):
        probe.main([str(place / "capture"), "--floor", f"a={other}", "--out", str(tmp_path)])


def test_too_few_clips_are_refused(folder, place, tmp_path):
    few = captured(folder, place, "few", "--limit", "2")
    with pytest.raises(UsageError, match="2 sentences in 2 clips leave dev and test without any"):
        probe.main([few, "--out", str(tmp_path)])


def test_labels_that_are_not_known_are_said(folder, tmp_path, capsys):
    """The built-in tiny manifest has neither times nor more than one voice."""
    words = ["--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    capture.main([*words, "--device", "cpu", "--out", str(tmp_path / "capture")])
    probe.main([str(tmp_path / "capture"), "--device", "cpu", "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "phone: not probed, not known of any clip" in told
    assert "voices are in all splits (there are fewer than three)" in told
    assert "speaker: not probed, no two of its classes" in told
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"energy", "mel", "time"} <= set(results["labels"])
    with pytest.raises(UsageError, match=r"none of the labels can be probed \(word: not known"):
        probe.main([str(tmp_path / "capture"), "--labels", "word", "--out", str(tmp_path / "b")])


def test_the_command_ends_with_one_line_and_code_2(tmp_path):
    words = [str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "melprobe.probe", *words], capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"melprobe: {tmp_path}: there is no capture (no index.json)\n"
