"""A clip's labels as a picture: they are those that probes get."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from melprobe import capture
from melprobe.captured import Capture
from melprobe.corpus.__main__ import main
from melprobe.corpus.manifest import Span, read_manifest, write_manifest
from melprobe.errors import UsageError
from melprobe.probing.labels import label
from melprobe.probing.picture import picture
from melprobe.report.track import draw_track

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def timed(folder):
    """The tiny manifest with times of an l that another follows, and a word without a phone."""
    phones = (Span("t", 0.1, 0.3), Span("əl", 0.3, 0.5), Span("l", 0.5, 0.6))
    words = (Span("press", 0.1, 0.3), Span("the", 0.3, 0.6), Span("<b>&", 0.65, 0.75))
    clips = [
        replace(u, phones=phones, words=words, times="exact")
        for u in read_manifest(folder / "data.jsonl")
    ]
    clips[1] = replace(clips[1], phones=(), words=(), times="", no_times="not alignable")
    write_manifest(folder / "timed.jsonl", clips)
    return folder / "timed.jsonl"


def test_a_picture_has_the_labels_that_probes_get(folder, timed):
    words = ["--checkpoint", str(folder / "model"), "--data", str(timed), "--device", "cpu"]
    capture.main([*words, "--out", str(folder / "capture")])
    captured = Capture.open(folder / "capture")
    found = label(captured)
    for u in read_manifest(timed):
        seen = picture(u, 8)
        rows = np.flatnonzero(captured.rows.utterance == u.id)
        assert len(rows) == len(seen["edges"]) - 1
        phone = found.tracks["phone"]
        labels = [phone.classes[i] if i >= 0 else None for i in phone.values[rows]]
        assert labels == seen["patch_phones"]
        assert [found.words[i] for i in rows] == seen["patch_words"]
        for name in ("energy", "rate"):
            values = found.tracks[name].values[rows, 0]
            assert values == pytest.approx(seen[f"patch_{name}"], nan_ok=True)
        octaves = found.tracks["f0"].values[rows, 0]
        assert 100 * 2**octaves == pytest.approx(seen["patch_f0"], nan_ok=True)
        seconds = captured.rows.seconds.to_numpy()[rows]
        assert ((seen["edges"][:-1] < seconds) & (seconds < seen["edges"][1:])).all()


def texts(svg):
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_all_labels_can_be_read_in_the_picture(timed, tmp_path, capsys):
    first = read_manifest(timed)[-1]
    out = tmp_path / "new" / "track.svg"
    main(["show", str(timed), first.id, "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    svg = out.read_text(encoding="utf-8")
    told = texts(svg)
    assert f"{first.id}, 12.5 patches a second, times: exact" in told
    assert told.count("press") == 2 and told.count("the") == 2 and "<b>&" in told
    assert told.count("t") == 2 and "ah" in told and "sil" in told
    assert svg == draw_track(picture(first, 8))
    assert [p.name for p in out.parent.iterdir()] == ["track.svg"]


def test_a_clip_without_times_says_why(timed, tmp_path):
    second = read_manifest(timed)[1]
    words = [str(timed), second.id.removesuffix(".flac"), "--patches-per-second", "50"]
    main(["show", *words, "--out", str(tmp_path / "track.svg")])
    told = texts((tmp_path / "track.svg").read_text())
    assert f"{second.id}, 50 patches a second, times: none (not alignable)" in told


def test_a_long_clip_goes_on_in_a_second_line(timed):
    clip = picture(read_manifest(timed)[0], 8)
    count = len(clip["edges"]) - 1
    one = texts(draw_track(clip))
    clip["edges"] = np.linspace(0, 4.5, count + 1)
    two = texts(draw_track(clip))
    assert (one.count("mel bin"), two.count("mel bin")) == (1, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["9"], r"timed\.jsonl: has no clip 9; the nearest are \d\.flac"),
        (
            ["0", "--patches-per-second", "10"],
            "--patches-per-second 10: there are 100, 50, 25, 12.5",
        ),
        (["0", "--out", "/"], "--out /: this is a folder; name a file in it"),
    ],
)
def test_bad_input_is_one_line(timed, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        main(["show", str(timed), "--out", str(tmp_path / "x" / "track.svg"), *words])
    assert not (tmp_path / "x").exists()


def test_drawing_needs_no_torch():
    code = (
        "import sys; import melprobe.report.track; "
        "print([m for m in ('torch', 'transformers', 'melprobe.probing') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
