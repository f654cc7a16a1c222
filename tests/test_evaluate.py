"""`evaluate` and `transcribe` as a user runs them; good input and bad."""

import json
import shutil
from dataclasses import replace

import pytest

from melprobe import evaluate, transcribe
from melprobe.analysis.study import swap_partners
from melprobe.analysis.wer import corpus_wer, count_errors
from melprobe.corpus.manifest import read_manifest, write_manifest
from melprobe.errors import UsageError
from melprobe.evaluation.controls import training_texts
from melprobe.evaluation.hearing import whisper
from tests.tiny import N_CLIPS, tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `tiny_checkpoint` makes."""
    place = tmp_path_factory.mktemp("evaluate")
    tiny_checkpoint(place)
    return place


def evaluated(folder, capsys, *words, data="data.jsonl"):
    model = str(folder / "model")
    evaluate.main([str(folder / data), "--checkpoint", model, "--device", "cpu", *words])
    return json.loads(capsys.readouterr().out)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluate_writes_rows_first_and_scores_from_them(folder, capsys):
    summary = evaluated(folder, capsys, "--out", str(folder / "e"))
    rows = read_rows(folder / "e" / "rows.jsonl")
    assert [set(row) for row in rows] == [
        {"audio_filepath", "duration", "time", "text", "pred_text"}
    ] * N_CLIPS
    errors = [count_errors(row["text"], row["pred_text"]) for row in rows]
    assert summary["wer"] == pytest.approx(corpus_wer(errors))
    assert summary["wer_ci"][0] <= summary["wer"] <= summary["wer_ci"][1]
    # One training text, "the press please": every other clip shares a word or two with it.
    assert 0 < summary["wer_nearest_training_transcript"] < 1

    swapped = read_rows(folder / "e" / "rows_swapped.jsonl")
    utterances = read_manifest(folder / "data.jsonl")
    assert [row["text_of"] for row in swapped] == [u.id for u in utterances]
    assert [row["text"] for row in swapped] == [u.text for u in utterances]
    partners = [utterances[i].id for i in swap_partners(utterances)]
    assert [row["audio_filepath"] for row in swapped] == partners
    errors = [count_errors(row["text"], row["pred_text"]) for row in swapped]
    assert summary["wer_swapped"] == pytest.approx(corpus_wer(errors))


def test_each_speaker_has_a_score(folder, tmp_path, capsys):
    utterances = read_manifest(folder / "data.jsonl")
    speakers = ["Ann", "Ann", "", *["Bob"] * (len(utterances) - 3)]
    named = [replace(u, speaker=s) for u, s in zip(utterances, speakers, strict=True)]
    write_manifest(folder / "named.jsonl", named)
    evaluated(folder, capsys, "--out", str(tmp_path), data="named.jsonl")
    rows = read_rows(tmp_path / "rows.jsonl")
    errors = [count_errors(row["text"], row["pred_text"]) for row in rows]
    found = json.loads((tmp_path / "summary.json").read_text())["by_speaker"]
    assert found["Ann"] == {"wer": corpus_wer(errors[:2]), "words": 6}
    assert set(found) == {"Ann", "Bob"} and found["Bob"]["wer"] == corpus_wer(errors[3:])
    assert [voice["wer"] for voice in found.values()] == sorted(
        (voice["wer"] for voice in found.values()), reverse=True
    )


def test_a_single_clip_is_scored_without_the_swapped_control(folder, capsys):
    write_manifest(folder / "one.jsonl", read_manifest(folder / "data.jsonl")[:1])
    summary = evaluated(folder, capsys, "--out", str(folder / "one"), data="one.jsonl")
    assert summary["wer_swapped"] is None and summary["utterances"] == 1
    assert summary["wer_ci"] is None
    assert (folder / "one" / "rows_swapped.jsonl").read_text() == ""


def test_the_nearest_transcript_is_one_that_training_read(folder, capsys, tmp_path):
    # The other one of train.jsonl is in dev.jsonl too: training left it out.
    assert training_texts(folder / "model") == ["the press please"]
    shutil.copytree(folder / "model", tmp_path / "model")
    recipe = (tmp_path / "model" / "recipe.json").read_text()
    for text in (recipe.replace("train.jsonl", "gone.jsonl"), recipe.replace("seed", "seeds")):
        (tmp_path / "model" / "recipe.json").write_text(text)
        assert training_texts(tmp_path / "model") == []
        error = capsys.readouterr().err
        assert error.startswith("melprobe: no nearest-transcript control, which needs")
        assert error.count("\n") == 1


def test_without_the_corpora_the_nearest_transcript_is_null(folder, capsys, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model" / "recipe.json").unlink()
    assert evaluated(tmp_path / "copy", capsys)["wer_nearest_training_transcript"] is None


def test_whisper_too_runs_where_it_is_told_to(folder):
    with pytest.raises(UsageError, match="device 'abacus': take cpu, cuda"):
        whisper("abacus")


def test_results_do_not_go_into_a_file(folder, capsys):
    (folder / "results").write_text("mine")
    with pytest.raises(UsageError, match=r"--out .*results: this is a file; name a folder"):
        evaluated(folder, capsys, "--out", str(folder / "results"))


@pytest.mark.parametrize("seconds", ["nan", "0", "-5", "inf"])
def test_a_batch_has_a_length(folder, capsys, seconds):
    with pytest.raises(UsageError, match=r"--batch-seconds .*: take a number above 0"):
        evaluated(folder, capsys, f"--batch-seconds={seconds}")


def test_results_of_another_checkpoint_or_manifest_are_not_replaced(folder, capsys, tmp_path):
    (tmp_path / "summary.json").write_text('{"checkpoint": "mel-maxi", "manifest": "queen/test"}')
    with pytest.raises(UsageError, match="holds the results of mel-maxi on queen/test"):
        evaluated(folder, capsys, "--out", str(tmp_path))
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(UsageError, match="not a summary of evaluate's"):
        evaluated(folder, capsys, "--out", str(tmp_path))
    (tmp_path / "summary.json").unlink()
    for _ in range(2):
        evaluated(folder, capsys, "--limit", "1", "--out", str(tmp_path))


def test_references_without_words_are_refused(folder, capsys):
    said = [replace(u, text="...") for u in read_manifest(folder / "data.jsonl")]
    write_manifest(folder / "silent.jsonl", said)
    with pytest.raises(UsageError, match="the references hold no words"):
        evaluated(folder, capsys, data="silent.jsonl")


def test_transcribe_prints_one_line_a_file(folder, capsys):
    files = [str(folder / name) for name in ("0.flac", "1.flac", "0.flac")]
    transcribe.main([*files, "--checkpoint", str(folder / "model"), "--max-new-tokens", "4"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["audio_filepath"] for row in rows] == files
    assert [row["duration"] for row in rows] == [0.4, 0.5, 0.4]


def test_transcribe_names_a_missing_file(folder):
    with pytest.raises(UsageError, match=r"nothing.wav"):
        transcribe.main(["nothing.wav", "--checkpoint", str(folder / "model")])
    with pytest.raises(UsageError, match=r"all 1 recordings are unusable"):
        transcribe.main(["nothing.wav", "--on-bad-audio", "skip"])


@pytest.mark.parametrize("tokens", ["0", "-3"])
def test_transcribe_writes_at_least_one_token(folder, tokens):
    with pytest.raises(UsageError, match=f"--max-new-tokens {tokens}: take 1 or more"):
        transcribe.main([str(folder / "0.flac"), "--max-new-tokens", tokens])
