"""Labels in time: exact on hand-made spans; F0 and energy of known sounds; of a capture's rows."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from melprobe import capture
from melprobe.audio.load import load_utterance
from melprobe.audio.mel import frame_count, log_mel
from melprobe.audio.patches import patch_at, patch_span
from melprobe.captured import Capture
from melprobe.corpus.manifest import (
    Span,
    Utterance,
    find_manifest,
    read_manifest,
    write_manifest,
)
from melprobe.corpus.phones import CLASSES
from melprobe.corpus.voices import sex_of, voice_of
from melprobe.errors import UsageError
from melprobe.probing.clip import NO_WORD
from melprobe.probing.labels import LABELS, label
from melprobe.probing.pitch import energy, pitch
from melprobe.probing.tracks import (
    BROAD,
    UNKNOWN,
    Track,
    class_track,
    control,
    frequent,
    majority,
    mean_of_most,
    phone_tracks,
    speaking_rate,
    with_silence,
)

EDGES = np.array([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], [None, None, None, None]),
        ([("a", 0, 0.4)], ["a", "a", "a", "a"]),
        ([("a", 0, 0.14), ("b", 0.14, 0.4)], ["a", "b", "b", "b"]),
        ([("a", 0, 0.15), ("b", 0.15, 0.4)], ["a", "a", "b", "b"]),  # as much: the earlier
        ([("a", 0.16, 0.4)], [None, None, "a", "a"]),  # most of 0.1 to 0.2 is nothing
        ([("a", 0.15, 0.4)], [None, "a", "a", "a"]),  # half is enough
        ([("a", 0, 0.03), ("b", 0.03, 0.07), ("a", 0.07, 0.1)], ["a", None, None, None]),
        ([("a", 0, 0.04), ("b", 0.04, 0.07), ("c", 0.07, 0.1)], ["a", None, None, None]),
        ([("a", 0.35, 9.0)], [None, None, None, "a"]),  # beyond the last
        ([("a", 0.1, 0.1)], [None, None, None, None]),  # of no length
    ],
)
def test_the_label_is_what_covers_most_of_a_patch(spans, expected):
    assert majority([Span(*span) for span in spans], EDGES) == expected


def test_majority_is_what_counting_milliseconds_says():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cuts = np.sort(rng.integers(0, 401, 9)) / 1000
        spans = [Span("abcdefgh"[i], cuts[i], cuts[i + 1]) for i in range(0, 8)]
        for patch, found in enumerate(majority(spans, EDGES)):
            middles = (np.arange(100 * patch, 100 * patch + 100) + 0.5) / 1000
            counts = {s.label: int(((s.start < middles) & (middles < s.end)).sum()) for s in spans}
            counts = {name: n for name, n in counts.items() if n} | {
                None: 100 - sum(counts.values())
            }
            assert counts[found] == max(counts.values())


def test_silence_fills_what_phones_leave_and_two_phones_share_a_label():
    spans = with_silence([Span("əl", 0.1, 0.3), Span("T", 0.3, 0.4), Span("AH0", 0.5, 0.6)], 0.8)
    assert [(s.label, round(s.start, 3), round(s.end, 3)) for s in spans] == [
        ("sil", 0, 0.1),
        ("ah", 0.1, 0.2),
        ("l", 0.2, 0.3),
        ("t", 0.3, 0.4),
        ("sil", 0.4, 0.5),
        ("ah", 0.5, 0.6),
        ("sil", 0.6, 0.8),
    ]
    with pytest.raises(UsageError, match="phone 'qq': neither ARPAbet"):
        with_silence([Span("qq", 0, 1)], 1)


def test_the_rate_is_phones_a_second_around_a_patch():
    """Of phones of 0.1 s ten a second, and a pause among them changes nothing."""
    edges = np.arange(0, 4.01, 0.08)
    even = with_silence([Span("t", i / 10, (i + 1) / 10) for i in range(40)], 4)
    assert speaking_rate(even, edges, 4) == pytest.approx(10)
    paused = [s for s in even if not 1 < s.start < 1.3]
    assert speaking_rate(with_silence(paused, 4), edges, 4) == pytest.approx(10)
    longer = with_silence([Span("aa", 0, 2), Span("t", 2, 2.1)], 4)
    rate = speaking_rate(longer, edges, 4)[:, 0]
    middles = (edges[:-1] + edges[1:]) / 2
    # Half of the window, 0.3125 s of it, has to be sounding; 2.1 s is the last that is said.
    assert (np.isfinite(rate) == (middles < 2.1)).all()
    assert rate[:20] == pytest.approx(0.5)
    (window,) = np.flatnonzero(np.isclose(middles, 2.04))
    low = 2.04 - 0.3125
    assert rate[window] == pytest.approx((1 + (2 - low) / 2) / (2.1 - low))
    assert np.isnan(speaking_rate(with_silence([], 4), edges, 4)).all()


def test_every_phone_has_one_broad_class():
    assert set(BROAD) == set(CLASSES)
    phone, broad = phone_tracks(["t", None, "sil", "ng"])
    assert phone.known.tolist() == broad.known.tolist() == [True, False, True, True]
    assert [broad.classes[i] for i in broad.values[[0, 2, 3]]] == ["stop", "silence", "nasal"]


def test_rare_classes_become_unknown_and_the_others_keep_their_rows():
    track = class_track("word", ["a", "b", "a", "b", "c", None, "a"])
    first = np.array([1, 1, 0, 0, 1, 1, 0], bool)
    kept = frequent(track, {"train": first, "test": ~first}, 1)
    assert kept.classes == ("a", "b")
    assert kept.values.tolist() == [0, 1, 0, 1, UNKNOWN, UNKNOWN, 0]


def test_a_control_task_gives_each_word_type_one_label():
    rng = np.random.default_rng(0)
    phones = class_track("phone", list(rng.choice(["a", "b", "c"], 3000, p=[0.7, 0.2, 0.1])))
    words = [f"w{i}" for i in rng.integers(0, 500, 3000)]
    made = control(phones, words, 0)
    of_word = {}
    for word, value in zip(words, made.values, strict=True):
        assert of_word.setdefault(word, value) == value
    assert np.bincount(list(of_word.values())) / len(of_word) == pytest.approx(
        [0.7, 0.2, 0.1], abs=0.06
    )
    assert (control(phones, words, 0).values == made.values).all()
    assert (control(phones, words, 1).values != made.values).any()


def sine(hertz, seconds=0.5, level=0.5):
    """A wave with overtones, as a voice has."""
    t = np.arange(int(16_000 * seconds)) / 16_000
    wave = sum(np.sin(2 * np.pi * k * hertz * t) / k for k in range(1, 6))
    return (level * wave / np.abs(wave).max()).astype(np.float32)


@pytest.mark.parametrize("hertz", [80, 101.3, 150, 220, 333, 480])
def test_f0_of_a_tone_is_its_frequency(hertz):
    wave = sine(hertz)
    found = pitch(wave)[3:-3]
    assert len(pitch(wave)) == frame_count(len(wave))
    assert np.isfinite(found).all() and found == pytest.approx(hertz, rel=0.01)


def test_noise_and_silence_have_no_f0():
    rng = np.random.default_rng(0)
    assert np.isfinite(pitch(rng.standard_normal(16_000).astype(np.float32))).mean() < 0.02
    assert not np.isfinite(pitch(np.zeros(16_000, np.float32))).any()
    assert len(pitch(np.zeros(100, np.float32))) == 0


# In a process of its own: beside torch's other libraries it can't always be imported.
PRAAT = """
import sys
import numpy as np
import parselmouth
waves = np.load(sys.argv[1])
for name in waves.files:
    sound = parselmouth.Sound(waves[name].astype(np.float64), 16_000)
    found = sound.to_pitch_ac(time_step=0.01, pitch_floor=75, pitch_ceiling=500)
    frames = (len(waves[name]) - 400) // 160 + 1
    print(*(found.get_value_at_time(0.0125 + 0.01 * i) for i in range(frames)))
"""


def test_f0_agrees_with_praat(tmp_path):
    if not find_spec("parselmouth"):
        pytest.skip("parselmouth is not installed")
    waves = [load_utterance(u) for u in read_manifest(find_manifest("builtin/test"))[:10]]
    np.savez(tmp_path / "waves.npz", *waves)
    command = [sys.executable, "-c", PRAAT, str(tmp_path / "waves.npz")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    agreed, close = [], []
    for wave, line in zip(waves, told.splitlines(), strict=True):
        found, theirs = pitch(wave), np.array(line.split(), np.float64)
        both = np.isfinite(found) & np.isfinite(theirs)
        agreed.append((np.isfinite(found) == np.isfinite(theirs)).mean())
        close.append((np.abs(found[both] / theirs[both] - 1) < 0.03).mean())
    assert np.mean(agreed) > 0.93 and np.mean(close) > 0.95


def test_energy_is_mean_power_in_decibels():
    assert energy(np.full(16_000, 0.1, np.float32)) == pytest.approx(-20, abs=1e-4)
    assert energy(np.zeros(1600, np.float32)) == pytest.approx(-80)
    assert len(energy(np.zeros(100, np.float32))) == 0


def test_a_patch_is_voiced_if_half_of_its_frames_are():
    frames = np.array([[1.0], [3.0], [np.nan], [np.nan]])
    assert mean_of_most(frames) == 2
    assert np.isnan(mean_of_most(frames[1:])).all()


def test_a_voice_is_one_in_all_accents():
    assert voice_of("espeak:en-us+Alicia") == voice_of("espeak:en+Alicia") == "espeak:Alicia"
    assert voice_of("festival:slt-hts") == voice_of("flite:slt")
    assert voice_of("Allison Smith") == "Allison Smith" and voice_of("") == ""
    assert [sex_of(s) for s in ("espeak:en+f2", "flite:rms", "espeak:en+klatt", "")] == [
        "female",
        "male",
        "",
        "",
    ]


def test_a_manifest_may_say_a_speakers_sex(folder, tmp_path):
    lines = (folder / "data.jsonl").read_text().splitlines()
    record = {**json.loads(lines[0]), "sex": "female"}
    (folder / "sex.jsonl").write_text(json.dumps(record))
    (u,) = read_manifest(folder / "sex.jsonl")
    write_manifest(folder / "again.jsonl", [u])
    assert u.sex == "female" and read_manifest(folder / "again.jsonl")[0].sex == "female"
    (folder / "sex.jsonl").write_text(json.dumps({**record, "sex": "f"}))
    with pytest.raises(UsageError, match="sex: must be female or male, or left out, not 'f'"):
        read_manifest(folder / "sex.jsonl")


def test_a_manifest_may_say_where_times_come_from(folder):
    record = json.loads((folder / "data.jsonl").read_text().splitlines()[0])
    for field, value in (("times", "TextGrid"), ("no_times", "not alignable")):
        (folder / "times.jsonl").write_text(json.dumps({**record, field: value}))
        (u,) = read_manifest(folder / "times.jsonl")
        write_manifest(folder / "again.jsonl", [u])
        assert getattr(read_manifest(folder / "again.jsonl")[0], field) == value
    (folder / "times.jsonl").write_text(json.dumps({**record, "times": "mfa"}))
    message = (
        r"times\.jsonl:1: times: must be one of exact, forced alignment, TextGrid, or left out"
    )
    with pytest.raises(UsageError, match=message):
        read_manifest(folder / "times.jsonl")


@pytest.mark.parametrize(
    ("source", "corpus"),
    [
        ("asterisk", "asterisk"),
        ("queen:jungle", "queen"),
        ("synth:flite", "synth"),
        ("hub:mozilla/common", "hub:mozilla/common"),
        ("", ""),
    ],
)
def test_a_corpus_is_one_whatever_its_source_says_of_a_clip(source, corpus):
    assert Utterance("", Path(), "hi", 1.0, source=source).corpus == corpus


@pytest.fixture(scope="module")
def timed(folder):
    """The tiny manifest with a phone and a word from 0.1 to 0.3 s, and its capture."""
    utterances = read_manifest(folder / "data.jsonl")
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for line in lines[:-1]:
        line |= {"phones": [["t", 0.1, 0.3]], "words": [["press", 0.1, 0.3]]}
    (folder / "timed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--checkpoint", str(folder / "model"), "--data", str(folder / "timed.jsonl")]
    words += ["--device", "cpu", "--positions", "all", "--model-dtype", "float32"]
    capture.main([*words, "--out", str(folder / "timed")])
    return Capture.open(folder / "timed"), utterances


def test_rows_have_the_labels_of_their_patches(timed):
    captured, utterances = timed
    found = label(captured)
    assert tuple(found.tracks) == LABELS
    rows, phone = captured.rows, found.tracks["phone"]
    last = utterances[-1].id
    for i, row in rows.iterrows():
        tracks = {name: track.known[i] for name, track in found.tracks.items()}
        if row.kind != "speech":
            assert not any(tracks.values()) and found.words[i] is None
            assert np.isnan(found.patches[i]).all()
            continue
        start, end = patch_span(patch_at(row.seconds, 8), 8)
        inside = min(end, 0.3) - max(start, 0.1) >= (end - start) / 2
        assert tracks["phone"] == tracks["class"] == (row.utterance != last)
        if row.utterance != last:
            assert phone.classes[phone.values[i]] == ("t" if inside else "sil")
            assert found.words[i] == ("press" if inside else NO_WORD)
        assert tracks["word"] == (inside and row.utterance != last)
        assert not tracks["corpus"]
        u = next(u for u in utterances if u.id == row.utterance)
        around = [max(row.seconds - 0.3125, 0), min(row.seconds + 0.3125, u.duration)]
        sounding = min(around[1], 0.3) - max(around[0], 0.1)
        known = sounding >= (around[1] - around[0]) / 2 and row.utterance != last
        assert tracks["rate"] == known
        if known:
            assert found.tracks["rate"].values[i] == pytest.approx(5)  # one in 0.2 s
        assert found.tracks["time"].values[i] == pytest.approx(row.seconds)
        patch = patch_at(row.seconds, 8)
        mel = log_mel(torch.from_numpy(load_utterance(u))[None])[0][patch * 8 : patch * 8 + 8]
        assert found.tracks["mel"].values[i] == pytest.approx(mel.mean(0).numpy(), abs=1e-4)
        assert found.patches[i][: mel.numel()] == pytest.approx(mel.flatten().numpy(), abs=1e-4)
        assert not found.patches[i][mel.numel() :].any()
    assert not found.tracks["sex"].known.any()
    assert found.tracks["speaker"].classes == ("noise",)


def test_another_manifest_is_refused(timed, folder, tmp_path):
    captured, _ = timed
    lines = (folder / "timed.jsonl").read_text().splitlines()
    (folder / "fewer.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(UsageError, match=r"fewer\.jsonl: lacks 0\.flac, which .* heard"):
        label(captured, folder / "fewer.jsonl")
    changed = [json.dumps({**json.loads(line), "text": "other"}) for line in lines]
    (folder / "other.jsonl").write_text("\n".join(changed))
    with pytest.raises(UsageError, match=r"0\.flac is not the clip that"):
        label(captured, folder / "other.jsonl")
    unknown = json.loads(lines[0]) | {"phones": [["qq", 0, 0.1]]}
    (folder / "phones.jsonl").write_text("\n".join([json.dumps(unknown), *lines[1:]]))
    with pytest.raises(UsageError, match=r"phones\.jsonl:1: phone 'qq'"):
        label(captured, folder / "phones.jsonl")


def test_audio_that_became_shorter_is_refused(timed, folder, tmp_path):
    captured, utterances = timed
    for u in utterances:
        soundfile.write(tmp_path / u.id, np.full(4_000, 0.1), 16_000)
    (tmp_path / "timed.jsonl").write_text((folder / "timed.jsonl").read_text())
    with pytest.raises(UsageError, match=r"0\.flac"):
        label(captured, tmp_path / "timed.jsonl")


def test_numbers_are_known_where_all_of_them_are():
    track = Track("f0", np.array([[1.0], [np.nan]], np.float32))
    assert track.known.tolist() == [True, False]
