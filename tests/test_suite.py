"""`evaluate --suite open-asr` as a user runs it, on a small data set that `datasets` reads."""

import json
import re
import sys

import jiwer
import numpy as np
import pytest
import soundfile

from melprobe import evaluate
from melprobe.analysis import wer
from melprobe.audio.load import BadAudio, load_wave
from melprobe.errors import UsageError
from melprobe.evaluation import hearing, suite
from melprobe.evaluation.open_asr import GENERATIONS, SetName, counts, normalise, rows_name
from melprobe.listener import load
from tests.tiny import waves

IGNORED = "ignore_time_segment_in_scoring"
TEXTS = {
    "ami test": ["Please hold...", "", "The new number, three!", IGNORED, "one"],
    "librispeech test.clean": ["CALL THE PRESS", "your other message"],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two sets that can be read and two that can't, in place of the leaderboard's; two of ours."""
    datasets = pytest.importorskip("datasets")
    place = tmp_path / "hub"
    place.mkdir()
    configs = []
    for label, texts in TEXTS.items():
        config, split = label.split()
        write_set(datasets, place / f"{config}.parquet", texts)
        files = f"\n  data_files:\n  - split: {split}\n    path: {config}.parquet"
        configs.append(f"- config_name: {config}{files}")
    (place / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    sets = [SetName(str(place), *label.split()) for label in TEXTS]
    sets += [SetName(str(place), "tedlium", "test"), SetName(str(tmp_path / "no"), "gone", "test")]
    monkeypatch.setitem(GENERATIONS, "2026", tuple(sets))
    ours = [SetName("melprobe", name, "test") for name in ("builtin", "queen")]
    monkeypatch.setattr(suite, "LOCAL", tuple(ours))
    monkeypatch.setenv("MELPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return place


def write_set(datasets, path, texts, broken=()):
    sounds = waves(*np.linspace(0.4, 0.9, len(texts)))
    audio = []
    for i, wave in enumerate(sounds):
        clip = path.with_suffix(f".{i}.wav")
        soundfile.write(clip, wave, 16_000)
        data = b"not audio" if i in broken else clip.read_bytes()
        audio.append({"bytes": data, "path": clip.name})
    rows = {"audio": audio, "text": texts, "id": list(map(str, range(len(texts))))}
    datasets.Dataset.from_dict(rows).to_parquet(path)


def run(folder, out, *words):
    model = ("--checkpoint", str(folder / "model"), "--device", "cpu")
    evaluate.main(["--suite", "open-asr", *model, "--out", str(out), "--limit", "3", *words])
    return json.loads((out / "summary.json").read_text())


def their_scores(folder):
    """What the leaderboard's scorer does with a folder of rows, in our words, unrounded.

    Every *.jsonl below the folder is a set; model and set come from its name; text and transcript
    are compared as they were written; the mean over sets is plain (`score_results` in
    normalizer/eval_utils.py as it was in May 2026).
    """
    scores = {}
    for path in sorted(folder.glob("**/*.jsonl")):
        model, of = re.fullmatch(r"MODEL_(.*?)_?DATASET_(.*)\.jsonl", path.name).groups()
        author, _, name = model.partition("-")
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        rate = jiwer.wer([row["text"] for row in rows], [row["pred_text"] for row in rows])
        audio, spent = (sum(row[field] for row in rows) for field in ("duration", "time"))
        scores[f"{author}/{name} | {of}"] = (rate, audio / spent)
    return scores, np.mean([rate for rate, _ in scores.values()])


def test_the_leaderboards_scorer_finds_the_same_in_our_rows(folder, hub, tmp_path, capsys):
    summary = run(folder, tmp_path / "out")
    scores, mean = their_scores(tmp_path / "out" / "open-asr")
    assert len(scores) == 2 and all(key.startswith("melprobe/") for key in scores)
    for label, (rate, rtfx) in zip(TEXTS, scores.values(), strict=True):
        ours = summary["sets"][label]
        assert ours["wer"] == pytest.approx(rate, abs=1e-9)
        assert ours["rtfx"] == pytest.approx(rtfx, rel=1e-9)
        assert ours["wer_ci"][0] <= rate <= ours["wer_ci"][1]
    assert summary["mean"]["wer"] == pytest.approx(mean, abs=1e-9)
    assert (summary["mean"]["sets"], summary["mean"]["of"]) == (2, 4)
    assert list(summary["local"]) == ["builtin test"]
    assert set(summary["unreached"]) == {"tedlium test", "gone test", "queen test"}
    assert "corpus build queen" in summary["unreached"]["queen test"]
    printed = capsys.readouterr().out
    assert "mean of 2 of 4 sets" in printed and "not the leaderboard's figure" in printed
    assert printed.count("not scored: ") == 3


def test_rows_are_the_models_transcripts_of_what_counts(folder, hub, tmp_path):
    summary = run(folder, tmp_path / "out")
    path = tmp_path / "out" / summary["sets"]["ami test"]["rows"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["audio_filepath"] for row in rows] == ["sample_0", "sample_1", "sample_2"]
    # Without a reference that is empty or to be ignored; "..." leaves a "." on the leaderboard too.
    assert [row["text"] for row in rows] == ["please hold .", "the new number 3", "one"]
    sounds = [load_wave(hub / f"ami.{i}.wav") for i in (0, 2, 4)]
    heard = load(str(folder / "model"), device="cpu").transcribe(sounds, hearing.answer_tokens(0.9))
    assert [row["pred_text"] for row in rows] == [normalise(text) for text in heard]
    assert [row["duration"] for row in rows] == [len(wave) / 16_000 for wave in sounds]


def test_our_sets_are_scored_as_their_manifests_are(folder, hub, tmp_path, capsys):
    summary = run(folder, tmp_path / "suite")
    model = ("--checkpoint", str(folder / "model"), "--device", "cpu")
    evaluate.main(["builtin/test", "--limit", "3", "--out", str(tmp_path / "alone"), *model])
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())
    ours = summary["local"]["builtin test"]
    assert ours["reference_words"] == alone["reference_words"]
    rows = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "suite" / ours["rows"], tmp_path / "alone" / "rows.jsonl")
    ]
    assert [row["audio_filepath"] for row in rows[0]] == [row["audio_filepath"] for row in rows[1]]
    assert [row["text"] for row in rows[0]] == [wer.normalise(row["text"]) for row in rows[1]]


def test_complete_sets_are_not_transcribed_again(folder, hub, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(self, test_set, progress, go_on=suite.SuiteRun._transcribe):
        if test_set.config == "librispeech":
            raise Stopped
        go_on(self, test_set, progress)

    with monkeypatch.context() as patch:
        patch.setattr(suite.SuiteRun, "_transcribe", stop)
        with pytest.raises(Stopped):
            run(folder, tmp_path)
    (first,) = (tmp_path / "open-asr").glob("*")
    before = first.read_bytes()
    whole = run(folder, tmp_path)
    assert list(whole["sets"]) == list(TEXTS) and first.read_bytes() == before  # times included
    # Now nothing is missing, so no model is loaded.
    monkeypatch.setattr(hearing, "open_listener", None)
    assert run(folder, tmp_path) == whole


def test_a_folder_holds_one_choice_of_clips(folder, hub, tmp_path):
    run(folder, tmp_path)
    with pytest.raises(UsageError, match="holds results with limit 3, not 2; take another --out"):
        run(folder, tmp_path, "--limit", "2")
    with pytest.raises(UsageError, match="holds results with generation 2026, not 2025"):
        run(folder, tmp_path, "--generation", "2025")
    with pytest.raises(UsageError, match=r"holds the results of .* on --suite open-asr"):
        evaluate.main(["builtin/test", "--out", str(tmp_path), "--limit", "1"])
    (tmp_path / "summary.json").write_text('{"manifest": "builtin/test"}')
    with pytest.raises(UsageError, match="not a summary of --suite"):
        run(folder, tmp_path)


def test_without_datasets_a_line_says_so(folder, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    summary = run(folder, tmp_path)
    assert summary["sets"] == {} and summary["mean"] is None and summary["local"]
    printed = capsys.readouterr().out
    assert printed.count("pip install 'melprobe[corpora]'") == 1
    assert "none was reached" in printed


def test_bad_audio_ends_the_run_or_is_listed(folder, hub, tmp_path, capsys):
    import datasets

    write_set(datasets, hub / "ami.parquet", ["one", "two", "three"], broken={1})
    with pytest.raises(BadAudio, match="ami test, sample 1: not audio"):
        run(folder, tmp_path)
    summary = run(folder, tmp_path, "--on-bad-audio", "skip")
    assert summary["sets"]["ami test"]["utterances"] == 2
    (reason,) = summary["notes"]["ami test"]["left_out"]
    assert "sample 1" in reason
    assert "left out 1 clips, the first: " in capsys.readouterr().out


def test_a_clip_that_is_too_long_is_cut_and_counted(folder, hub, tmp_path, monkeypatch):
    heard = []

    def transcribe(self, waves, max_new_tokens):
        assert all(self.positions(wave, max_new_tokens) <= self.room for wave in waves)
        heard.extend(waves)
        return [""] * len(waves)

    monkeypatch.setattr("melprobe.listener.Listener.transcribe", transcribe)
    monkeypatch.setattr(suite, "decode", lambda audio, name: waves(100.0)[0])
    summary = run(folder, tmp_path)
    assert summary["notes"]["ami test"]["cut"] == 3
    assert all(16_000 * 10 < len(wave) < 16_000 * 100 for wave in heard[:3])
    row = json.loads(next((tmp_path / "open-asr").glob("*ami*")).read_text().splitlines()[0])
    assert row["duration"] == 100.0


def test_whisper_hears_thirty_seconds(monkeypatch):
    monkeypatch.setattr(
        hearing, "whisper", lambda device: lambda waves: [str(len(w)) for w in waves]
    )
    model = hearing.Model("whisper-base", "cpu")
    assert model([np.zeros(16_000 * 31), np.zeros(16_000)]) == [str(16_000 * 30), "16000"]


def test_sets_are_read_in_chunks(monkeypatch):
    monkeypatch.setattr(suite, "CHUNK_SECONDS", 2.0)
    clips = [suite.Clip(str(i), "", np.zeros(16_000)) for i in range(5)]
    assert [len(chunk) for chunk in suite._chunks(iter(clips))] == [2, 2, 1]
    assert list(suite._chunks(iter([]))) == []


def test_both_generations_are_the_leaderboards():
    old, new = GENERATIONS["2025"], GENERATIONS["2026"]
    assert {s.dataset for s in old} == {"hf-audio/esb-datasets-test-only-sorted"}
    assert {s.dataset for s in new} == {"hf-audio/open-asr-leaderboard"}
    assert {s[1:] for s in old} - {s[1:] for s in new} == {("tedlium", "test")}
    assert (len(old), len(new)) == (8, 7)
    assert rows_name("mel-smol", new[3]) == (
        "MODEL_melprobe-mel-smol_DATASET_hf-audio-open-asr-leaderboard_librispeech_test.clean.jsonl"
    )
    assert rows_name("runs/a b/best", old[0]).startswith("MODEL_melprobe-runs-a-b-best_DATASET_")


def test_what_counts_is_what_is_left_of_a_reference():
    assert not counts(normalise(IGNORED)) and not counts(normalise("[noise] uh")) and counts("a")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "name a manifest, such as builtin/test, or give --suite open-asr"),
        (["builtin/test", "--suite", "open-asr"], "--suite has sets of its own; leave builtin/te"),
        (["--suite", "open-asr", "--versus", "whisper-base"], "--versus compares on a manifest"),
        (["builtin/test", "--generation", "2025"], "--generation is of a suite"),
        (["--suite", "open-asr", "--generation", "1984"], "invalid choice: '1984'"),
        (["--suite", "open-asr", "--limit", "-1"], "--limit -1: take a number"),
        (["--suite", "open-asr", "--checkpoint", "mel-maxi"], "no checkpoint 'mel-maxi'"),
        (["--suite", "open-asr", "--device", "abacus"], "device 'abacus'"),
    ],
)
def test_what_makes_no_sense_is_refused(words, complaint):
    with pytest.raises(UsageError, match=re.escape(complaint)):
        evaluate.main(words)
