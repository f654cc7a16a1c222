"""`evaluate MANIFEST --versus OTHER`: two models on the same clips."""

import json
import shutil

import pytest

from melprobe import evaluate
from melprobe.analysis.statistics import Bootstrap
from melprobe.audio.load import BadAudio
from melprobe.corpus.manifest import read_manifest
from melprobe.errors import UsageError
from melprobe.evaluation import hearing, versus
from tests.tiny import N_CLIPS, waves


def run(folder, capsys, *words, checkpoint="model"):
    argv = [str(folder / "data.jsonl"), "--checkpoint", str(folder / checkpoint)]
    evaluate.main([*argv, "--device", "cpu", *map(str, words)])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def perfect(folder):
    """An earlier run's folder, of a model that made no error."""
    place = folder / "perfect"
    place.mkdir()
    summary = {"checkpoint": "whisper-base", "manifest": str(folder / "data.jsonl")}
    (place / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"audio_filepath": u.id, "duration": 1.0, "time": 0.5, "text": u.text, "pred_text": u.text}
        for u in read_manifest(folder / "data.jsonl")
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_a_copy_of_a_model_is_no_better(folder, capsys, tmp_path):
    if not (folder / "twin").exists():
        shutil.copytree(folder / "model", folder / "twin")
    summary = run(folder, capsys, "--versus", folder / "twin", "--out", tmp_path)
    other = summary["versus"]
    assert (other["difference"], other["difference_ci"]) == (0, [0, 0])
    assert other["verdict"].startswith("not resolved: ") and other["wer"] == summary["wer"]
    mine, theirs = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("rows.jsonl", "rows_versus.jsonl")
    )
    assert len(mine) == len(theirs) == N_CLIPS
    assert [row["pred_text"] for row in mine] == [row["pred_text"] for row in theirs]
    # The rows of an earlier comparison don't stay behind.
    assert "versus" not in run(folder, capsys, "--out", tmp_path)
    assert not (tmp_path / "rows_versus.jsonl").exists()


def test_rows_of_an_earlier_run_are_the_other_model(folder, perfect, capsys):
    summary = run(folder, capsys, "--versus", perfect)
    other = summary["versus"]
    assert (other["checkpoint"], other["wer"], other["rtfx"]) == ("whisper-base", 0, 2)
    assert other["difference"] == pytest.approx(summary["wer"])
    low, high = other["difference_ci"]
    assert 0 < low < summary["wer"] < high
    points = f"{100 * summary['wer']:.1f} points"
    better = f"whisper-base is better than {folder / 'model'} by {points}"
    assert other["verdict"].startswith(better)


def test_whisper_is_a_model_like_others(folder, capsys, monkeypatch):
    monkeypatch.setattr(hearing, "whisper", lambda device: lambda waves: [""] * len(waves))
    other = run(folder, capsys, "--versus", "whisper-base")["versus"]
    assert (other["checkpoint"], other["deletions"]) == ("whisper-base", other["reference_words"])


def test_the_difference_is_paired_and_by_speaker(folder):
    def rows(wrong):
        return [
            {"text": "hold on", "pred_text": "hold" if w else "hold on", "duration": 1.0, "time": 1}
            for w in wrong
        ]

    first, second = [True] * 20 + [False] * 10, [True] * 19 + [False] * 11
    speakers = [f"s{i // 3}" for i in range(30)]
    found = versus.compare(("a", "b"), (rows(first), rows(second)), speakers, 0)
    alone = Bootstrap(speakers).ratio(first, [2] * 30)
    low, high = found["difference_ci"]
    assert found["resampled"] == "speaker" and found["difference"] == pytest.approx(1 / 60)
    assert high - low < (alone.high - alone.low) / 2
    assert found["verdict"].startswith(
        "not resolved: a and b differ by 1.7 points of WER (95 % inter"
    )


def test_the_better_model_is_named_and_its_lead_is_positive():
    wrong, right = (
        [{"text": "hold on", "pred_text": text, "duration": 1.0, "time": 1.0}] * 6
        for text in ("hold", "hold on")
    )
    for rows in ((wrong, right), (right, wrong)):
        names = ("bad", "good") if rows[0] is wrong else ("good", "bad")
        found = versus.compare(names, rows, [""] * 6, 0)
        assert found["verdict"] == (
            "good is better than bad by 50.0 points of WER (95 % interval 50.0 to 50.0)"
        )
    few = versus.compare(("a", "b"), (wrong[:5], right[:5]), [""] * 5, 0)
    assert few["verdict"] == (
        "not resolved: a and b differ by 50.0 points of WER, on fewer than 6 utterances"
    )
    one = versus.compare(("a", "b"), (wrong[:1], right[:1]), [""], 0)
    assert one["difference_ci"] is None and one["verdict"].startswith("not resolved: ")


def test_a_model_is_not_compared_with_itself(folder, capsys):
    same = folder / "twin" / ".." / "model"
    shutil.copytree(folder / "model", folder / "twin", dirs_exist_ok=True)
    for name in (folder / "model", same):
        with pytest.raises(UsageError, match="this is --checkpoint itself"):
            run(folder, capsys, "--versus", name)
    with pytest.raises(UsageError, match="this is --checkpoint itself"):
        evaluate.main(["builtin/test", "--checkpoint", "whisper-base", "--versus", "whisper-base"])
    with pytest.raises(UsageError, match="no checkpoint 'mel-maxi'"):
        run(folder, capsys, "--versus", "mel-maxi")


def test_rows_of_other_clips_are_refused(folder, perfect, capsys, tmp_path):
    with pytest.raises(UsageError, match=r"its 6 rows are not of these 2 clips; take the same --l"):
        run(folder, capsys, "--versus", perfect, "--limit", "2")
    with pytest.raises(UsageError, match=r"has rows of .*data.jsonl, not of builtin/test"):
        evaluate.main(["builtin/test", "--versus", str(perfect)])
    shutil.copytree(perfect, tmp_path / "copy")
    (tmp_path / "copy" / "rows.jsonl").write_text('{"audio_filepath": "a.wav"}\n')
    with pytest.raises(UsageError, match=r"rows.jsonl:1: text: missing or of another kind"):
        run(folder, capsys, "--versus", tmp_path / "copy")
    (tmp_path / "copy" / "summary.json").unlink()
    with pytest.raises(UsageError, match=r"holds no summary.json of evaluate's"):
        run(folder, capsys, "--versus", tmp_path / "copy")


def test_what_whisper_does_not_hear_is_known_before_it_listens(folder):
    u, *others = read_manifest(folder / "data.jsonl")[:2]
    both, sounds = [u, *others], waves(31.0, 1.0)
    with pytest.raises(BadAudio, match=r"0.flac: 31.0 s, and Whisper hears 30 s at once: cut it"):
        hearing.leave_out_unheard(None, both, sounds, "error")
    (reason,) = hearing.leave_out_unheard(None, both, sounds, "skip")
    assert "31.0 s" in reason and both == others and len(sounds) == 1
    with pytest.raises(BadAudio, match="all 1 are too long"):
        hearing.leave_out_unheard(None, [u], waves(31.0), "skip")
