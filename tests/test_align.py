"""Word and phone times by forced alignment, on built-in recordings."""

import os
import shutil
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from melprobe.audio.load import load_utterance
from melprobe.corpus import align
from melprobe.corpus.__main__ import main
from melprobe.corpus.manifest import (
    Utterance,
    find_manifest,
    read_manifest,
    read_records,
    write_records,
)
from melprobe.corpus.phones import PHONES
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError

pocketsphinx = pytest.mark.skipif(
    find_spec("pocketsphinx") is None, reason="`pocketsphinx` is not installed"
)
KNOWN = {"doctor": "D AA K T ER", "boss": "B AO S", "hat": "HH AE T"}


def copy(folder: Path, texts: dict[str, str]) -> Path:
    """A manifest of built-in clips (file name: text), with a field that melprobe doesn't read."""
    builtin = {u.audio.stem: u for u in read_manifest(find_manifest("builtin/train"))}
    records = []
    for name, text in texts.items():
        audio = os.path.relpath(builtin[name].audio, folder)
        duration = builtin[name].duration
        records.append({"audio": audio, "mood": "é", "text": text, "duration": duration})
    path = folder / "own.jsonl"
    write_records(path, records)
    return path


@pocketsphinx
def test_words_come_in_order_and_their_phones_tile_them(tmp_path, capsys):
    texts = {
        "sorry": "We're sorry.",
        "tt-weasels": "WEASELS have eaten our phone-system",
        "vm-youhave": "you have",
    }
    path = copy(tmp_path, texts)
    before = [record for _, record in read_records(path)]
    main(["align", str(path), "--jobs", "1"])
    assert capsys.readouterr().out.endswith(f"{path}: 3 of 3 aligned\n")
    utterances = read_manifest(path)
    for u in utterances:
        assert [word.label for word in u.words] == plain_text(u.text).split()
        assert {phone.label for phone in u.phones} <= set(PHONES)
        for spans in (u.words, u.phones):
            times = [seconds for span in spans for seconds in (span.start, span.end)]
            assert times == sorted(times) and times[0] >= 0 and times[-1] <= u.duration
        phones = list(u.phones)
        for word in u.words:
            inside = [p for p in phones if word.start <= p.start < word.end]
            assert (inside[0].start, inside[-1].end) == (word.start, word.end)
            assert all(a.end == b.start for a, b in pairwise(inside))
            phones = phones[len(inside) :]
        assert not phones
    we_are, sorry = utterances[0].words
    assert 0.0 <= we_are.start < 0.2 and 0.2 < sorry.start < 0.6
    assert [p.label for p in utterances[2].phones] == ["y", "uw", "hh", "ae", "v"]
    after = [record for _, record in read_records(path)]
    added = ("words", "phones", "times")
    assert [{k: row[k] for k in row if k not in added} for row in after] == before
    assert {u.times for u in utterances} == {"forced alignment"}
    aligned = path.read_bytes()
    main(["align", str(path)])
    assert path.read_bytes() == aligned


@pocketsphinx
def test_a_clip_that_cannot_be_aligned_keeps_its_row_and_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no espeak-ng
    texts = {
        "sorry": "We're sorry.",
        "tt-weasels": "...",
        "vm-youhave": "you have a very long sentence that nobody said",
    }
    path = copy(tmp_path, texts)
    records = [record for _, record in read_records(path)]
    (tmp_path / "empty.wav").touch()
    records += [
        {**records[0], "audio": "empty.wav"},
        {**records[0], "audio": "gone.wav", "text": "Xyzzyx!"},
        {"audio": "timed.wav", "text": "Hi", "duration": 1, "words": [["hi", 0, 1]]},
    ]
    write_records(path, records)
    main(["align", str(path), "--jobs", "1"])
    out, err = capsys.readouterr()
    said = out.splitlines()[-1]
    reasons = {"2 not alignable", "1 with bad audio", "1 with words not in the dictionary"}
    assert said.startswith(f"{path}: 2 of 6 aligned; ")
    assert set(said.partition("; ")[2].split(", ")) == reasons
    assert f"{path}:4: {tmp_path / 'empty.wav'}: the file is empty" in err
    after = [record for _, record in read_records(path)]
    why = ["not alignable", "not alignable", "with bad audio", "with words not in the dictionary"]
    assert [row.pop("no_times", None) for row in after] == [None, *why, None]
    assert after[1:] == records[1:] and after[0].keys() - records[0].keys() == {
        *("words", "phones", "times")
    }
    assert [u.no_times for u in read_manifest(path)[1:5]] == why


@pocketsphinx
def test_manifests_can_become_one_and_stay_as_they_were(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    one = copy(tmp_path / "one", {"sorry": "We're sorry."})
    before = one.read_bytes()
    words = ["align", str(one), "--jobs", "1", "--out", str(tmp_path / "all.jsonl")]
    main(words)
    (u,) = read_manifest(tmp_path / "all.jsonl")
    assert u.audio.resolve() == read_manifest(one)[0].audio.resolve() and u.words
    assert one.read_bytes() == before
    (tmp_path / "two").mkdir()
    two = copy(tmp_path / "two", {"sorry": "We're sorry."})
    with pytest.raises(
        UsageError, match=r"two/own\.jsonl:1: .*sorry\.flac is already at .*one/own"
    ):
        main(["align", str(one), str(two), *words[2:]])
    with pytest.raises(UsageError, match="this is a folder; name a manifest in it"):
        main(["align", str(one), "--out", str(tmp_path)])


@pocketsphinx
def test_the_times_of_a_clip_do_not_depend_on_the_clips_before():
    first, second = read_manifest(find_manifest("builtin/test"))[1:3]
    used, fresh = align.load_decoder(), align.load_decoder()
    times = []
    for decoder, utterance in ((used, first), (used, second), (fresh, second)):
        text = plain_text(utterance.text)
        times.append(align.align(decoder, text, load_utterance(utterance)))
    assert times[0] and times[1] and times[1] == times[2]


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("doctor's", "D AA K T ER Z"),
        ("hats", "HH AE T S"),
        ("boss's", "B AO S IH Z"),
    ],
)
def test_a_word_with_an_s_sounds_like_the_one_without(word, phones):
    utterance = Utterance("", Path(), f"The {word}, hat", 1.0)
    known = {**KNOWN, "the": "DH AH"}.get
    assert align.pronunciations([utterance], known) == {word: [phones]}


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_other_words_and_numerals_sound_as_espeak_says_them():
    ways = align.pronunciations([Utterance("", Path(), "Floda, 25", 1.0)], {}.get)
    assert ways["floda"] == ["F L OW D AH"]
    assert ways["25"] == ["T UW F AY V", "T W EH N T IY F AY V"]


def test_without_pocketsphinx_or_a_manifest_nothing_is_done(tmp_path, monkeypatch):
    path = copy(tmp_path, {"sorry": "We're sorry."})
    before = path.read_bytes()
    with monkeypatch.context() as without, pytest.raises(UsageError, match="pip install"):
        without.setitem(sys.modules, "pocketsphinx", None)
        main(["align", str(path)])
    if find_spec("pocketsphinx"):
        with pytest.raises(UsageError, match="no/where: neither a manifest file nor a corpus"):
            main(["align", str(path), "no/where"])
    with pytest.raises(UsageError, match="NAME"):
        main(["align"])
    assert path.read_bytes() == before
