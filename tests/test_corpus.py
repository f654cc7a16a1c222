"""Manifests, the built-in set, leakage, and the corpora built from planted files."""

import json
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile

from melprobe.audio.load import BadAudio, load_usable
from melprobe.corpus import asterisk
from melprobe.corpus.__main__ import main
from melprobe.corpus.cuts import to_cuts
from melprobe.corpus.leakage import clusters, without_leaks
from melprobe.corpus.manifest import (
    BUILTIN,
    Span,
    Utterance,
    find_manifest,
    read_manifest,
    write_manifest,
)
from melprobe.errors import UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MELPROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def said(*texts: str) -> list[Utterance]:
    return [Utterance(f"{i}", Path(f"/{i}.wav"), text, 1.0) for i, text in enumerate(texts)]


def tone(seconds: float = 1.0, rate: int = 16_000) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)


# Manifests


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    folder = tmp_path / "corpus"
    spans = (Span("HH", 0.0, 0.1), Span("AY", 0.1, 0.5))
    full = Utterance(
        "", folder / "audio" / "a.flac", "Hi, “you”!", 1.25, "S", "T", spans, spans[:1]
    )
    plain = Utterance("", tmp_path / "else" / "b.wav", "ok", 0.5)
    write_manifest(folder / "train.jsonl", [full, plain])
    first, second = read_manifest(folder / "train.jsonl")
    assert first.id == "audio/a.flac" and second.id == "../else/b.wav"
    assert first.where == f"{folder / 'train.jsonl'}:1"
    assert (first.text, first.duration, first.speaker) == (full.text, 1.25, "S")
    assert first.phones == spans and first.words == spans[:1] and second.phones == ()
    assert second.audio.resolve() == plain.audio
    assert list(folder.iterdir()) == [folder / "train.jsonl"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object but list"),
        ('{"text": "a", "duration": 1}', "audio: is missing"),
        ('{"audio": "a.wav", "duration": 1}', "text: is missing"),
        ('{"audio": "a.wav", "text": " ", "duration": 1}', "text: must be a non-empty string"),
        ('{"audio": "a.wav", "text": "a"}', "duration: is missing"),
        ('{"audio": "a.wav", "Text": "a"}', "Text: there is no such field; did you mean text?"),
        ('{"audio": "a.wav", "text": "a", "duration": "2"}', "duration: must be seconds"),
        ('{"audio": "a.wav", "text": "a", "duration": NaN}', "duration: must be seconds"),
        ('{"audio": "a.wav", "text": "a", "duration": 1, "speaker": 3}', "speaker: must be"),
        (
            '{"audio": "a.wav", "text": "a", "duration": 1, "phones": [["A", 2, 1]]}',
            "phones: must be [label, start_s, end_s] rows, not ['A', 2, 1]",
        ),
        ('{"audio": "good.wav", "text": "a", "duration": 1}', "audio: good.wav is already at"),
    ],
)
def test_a_bad_line_names_file_line_and_field(tmp_path, line, problem):
    path = tmp_path / "m.jsonl"
    path.write_text('{"audio": "good.wav", "text": "a", "duration": 1}\n\n' + line)
    with pytest.raises(UsageError) as error:
        read_manifest(path)
    assert str(error.value).startswith(f"{path}:3: {problem}")


def test_text_in_another_encoding_is_named_with_its_line(tmp_path):
    line = '{"audio": "a.wav", "text": "caf\xe9", "duration": 1}\n'
    (tmp_path / "m.jsonl").write_bytes(2 * b"\n" + line.encode("latin-1"))
    with pytest.raises(UsageError, match=r"m\.jsonl:3: not UTF-8 .*; save it as UTF-8"):
        read_manifest(tmp_path / "m.jsonl")


def test_no_manifest_and_an_empty_one_are_said_to_be_so(tmp_path):
    with pytest.raises(UsageError, match="no such manifest"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="empty"):
        read_manifest(tmp_path / "m.jsonl")


def test_a_corpus_is_found_by_name_and_an_unknown_one_lists_what_there_is(cache, tmp_path):
    assert find_manifest("builtin/test") == BUILTIN / "test.jsonl"
    write_manifest(cache / "corpora" / "mine" / "dev.jsonl", said("a"))
    assert find_manifest("mine/dev") == cache / "corpora" / "mine" / "dev.jsonl"
    path = tmp_path / "some.jsonl"
    path.touch()
    assert find_manifest(str(path)) == path
    with pytest.raises(UsageError) as error:
        find_manifest("queen/test")
    assert {"builtin/test", "builtin/train", "mine/dev"} <= set(
        str(error.value).replace(",", "").replace(";", "").split()
    )
    assert "python -m melprobe.corpus build queen" in str(error.value)


def test_the_builtin_set_is_whole_small_and_does_not_leak():
    train, test = (read_manifest(find_manifest(f"builtin/{split}")) for split in ("train", "test"))
    assert (len(train), len(test)) == (60, 40)
    assert all(len(u.text.split()) >= 3 for u in test)
    for utterances in (train, test):
        _, waves, _ = load_usable(utterances, "error")
        for wave, utterance in zip(waves, utterances, strict=True):
            assert len(wave) / 16_000 == pytest.approx(utterance.duration, abs=1e-3)
    assert without_leaks(train, test) == (train, [])
    assert {path.name for path in (BUILTIN / "audio").iterdir()} == {
        u.audio.name for u in (*train, *test)
    }
    assert sum(path.stat().st_size for path in BUILTIN.rglob("*.*")) < 5_000_000
    assert "CC-BY-SA-3.0" in (BUILTIN / "ATTRIBUTION.md").read_text()


def test_cuts_keep_id_duration_text_and_speaker_and_open_no_file():
    utterance = Utterance("audio/a.wav", Path("/nowhere/a.wav"), "hello", 1.234567, "Ann")
    (cut,) = to_cuts([utterance])
    assert cut.id == "audio/a.wav" and cut.duration == pytest.approx(1.234567, abs=1 / 16_000)
    assert cut.num_samples == 19_753 and cut.sampling_rate == 16_000
    assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("hello", "Ann")


# Leakage


def test_near_equal_texts_are_one_cluster_and_chains_hold_together():
    texts = [
        "Please enter your password.",
        "please enter your passwords",  # one letter more
        "a parrot flew over the lazy old bridge",
        "they met on the lazy old bridge",  # the same four words
        "They met an the lazy old bride!",  # near the one before, no four words of the first
        "on the lazy",
        "yes",
        "yet",
        "Yes!",
        "...",
    ]
    numbers = clusters(texts)
    assert numbers == [0, 0, 1, 1, 1, 2, 3, 4, 3, 5]


def test_planted_near_duplicates_of_a_test_never_reach_training():
    tests = said("He put the red lamp on the table.", "What do you want?", "No.")
    clean = ["the lamp is red", "what do they want", "now", "do you want it", "nothing at all"]
    planted = [
        "he put the red lamp on the table",
        "He puts the red lamp on the tables!",
        "Nobody saw that he put the red one",
        "WHAT DO YOU WANT",
        "tell me what do you want from me",
        "you want from me a song",  # only through the one before
        "no",
    ]
    train = said(*clean, *planted)
    random.Random(0).shuffle(train)
    kept, dropped = without_leaks(train, tests)
    assert {u.text for u in dropped} == set(planted)
    assert {u.text for u in kept} == set(clean)


def test_growing_from_the_tests_gives_the_clusters_of_all_texts():
    rng = random.Random(0)
    words = [*"abcd", "red", "blue", "lamp", "table", "door", "under", "old", "new"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 7))) for _ in range(900)]
    train, tests = said(*texts[:800]), said(*texts[800:])
    numbers = clusters(texts)
    leaked = set(numbers[800:])
    kept, dropped = without_leaks(train, tests)
    assert [u.id for u in dropped] == [str(i) for i in range(800) if numbers[i] in leaked]
    assert len(kept) + len(dropped) == 800 and kept


# Asterisk


def test_transcripts_lose_stage_notes_and_gain_the_words_for_signs():
    listing = """; Core sounds

beep: [a simple beep tone]
silence/1: (1 second of silence)
confbridge-join: <beep ascending>
letters/at: at [@]
dictate/enter_filename: Enter a  filename followed by # or just # to exit
press: press * now
dir-multi2: ... for ...
conf-menu: to mute or umute
iax2: IAX (note: does not say "2")
"""
    assert asterisk.parse_transcripts(listing) == {
        "beep": "",
        "silence/1": "",
        "confbridge-join": "",
        "letters/at": "at",
        "dictate/enter_filename": "Enter a filename followed by pound or just pound to exit",
        "press": "press star now",
        "dir-multi2": "for",
        "conf-menu": "to mute or unmute",
        "iax2": "IAX",
    }


def test_prompts_are_split_by_cluster_the_same_way_every_time():
    rng = random.Random(1)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdgklmnrst"]
    texts = [" ".join(rng.sample(words, rng.choice([1, 6]))) for _ in range(300)]
    texts += [text + "s" for text in texts[:60] if " " in text]
    prompts = said(*texts)
    splits = asterisk.split(prompts)
    assert splits == asterisk.split(prompts[::-1])
    assert sorted(u.id for s in splits.values() for u in s) == sorted(u.id for u in prompts)
    assert without_leaks(splits["train"], splits["test"] + splits["dev"])[1] == []
    for name, share in asterisk.SHARES.items():
        long = [u for u in splits[name] if " " in u.text]
        assert len(splits[name]) / len(prompts) == pytest.approx(share, abs=0.04)
        assert len(long) / sum(" " in text for text in texts) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    ("argv", "package"),
    [
        (["asterisk", "--sounds", "/nowhere"], "apt install asterisk-core-sounds-en-g722"),
        (["queen", "--bank", "/nowhere"], "apt install flight-of-the-amazon-queen"),
    ],
)
def test_a_missing_package_is_named(argv, package):
    with pytest.raises(UsageError, match=package):
        main(["build", *argv])


# A user's own recordings, and the hub


def test_own_recordings_become_flac_whatever_their_format(tmp_path):
    soundfile.write(tmp_path / "cd.wav", np.tile(tone(1.0, 44_100)[:, None], 2), 44_100)
    soundfile.write(tmp_path / "phone.wav", tone(0.5, 8000), 8000)
    rows = [
        {"audio_filepath": "cd.wav", "text": "One", "duration": 1.0, "speaker": "Ann"},
        {"audio": "phone.wav", "text": "Two"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["build", "jsonl", str(tmp_path / "own.jsonl"), "--name", "mine"])
    one, two = read_manifest(find_manifest("mine/test"))
    assert (one.text, one.speaker, one.duration) == ("One", "Ann", 1.0)
    assert (two.text, two.duration) == ("Two", 0.5)
    assert [soundfile.info(u.audio).samplerate for u in (one, two)] == [16_000, 16_000]


def test_a_bad_recording_of_ones_own_stops_the_build_or_is_listed(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    rows = [{"audio": f"{name}.wav", "text": name, "duration": 1.0} for name in "ab"]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["build", "jsonl", str(tmp_path / "own.jsonl"), "--name", "mine"]
    reason = rf"own.jsonl:2: {tmp_path / 'b.wav'}: the file is missing"
    with pytest.raises(BadAudio, match=reason):
        main(argv)
    main([*argv, "--on-bad-audio", "skip"])
    assert reason in capsys.readouterr().err
    assert [u.text for u in read_manifest(find_manifest("mine/test"))] == ["a"]


def test_a_recording_listed_twice_stops_the_build(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    (tmp_path / "own.jsonl").write_text(2 * '{"audio": "a.wav", "text": "a"}\n')
    with pytest.raises(UsageError, match=r"own\.jsonl:2: audio: a\.wav is already at"):
        main(["build", "jsonl", str(tmp_path / "own.jsonl"), "--name", "mine"])


def test_a_failed_build_leaves_the_corpus_as_it_was(cache, tmp_path):
    manifest = tmp_path / "own.jsonl"
    argv = ["build", "jsonl", str(manifest), "--name", "mine"]

    def build(hertz: float, *names: str) -> None:
        soundfile.write(tmp_path / "a.wav", tone(hertz), 16_000)
        manifest.write_text("".join(f'{{"audio": "{n}.wav", "text": "a"}}\n' for n in names))
        main(argv)

    build(1.0, "a")
    (first,) = read_manifest(find_manifest("mine/test"))
    with pytest.raises(BadAudio):
        build(0.5, "a", "gone")
    assert soundfile.info(first.audio).duration == 1.0
    build(0.5, "a")
    assert soundfile.info(first.audio).duration == 0.5
    assert [path.name for path in (cache / "corpora").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(name, "test") for name in ("../../evil", "a/b", "", ".hidden", "builtin", "queen")],
        *[("mine", split) for split in ("../../evil", "a/b", "")],
    ],
)
def test_a_corpus_has_a_name_of_its_own(cache, tmp_path, name, split):
    (tmp_path / "own.jsonl").write_text('{"audio": "a.wav", "text": "a"}')
    argv = ["build", "jsonl", str(tmp_path / "own.jsonl"), "--name", name, "--split", split]
    with pytest.raises(UsageError, match=r"--name|--split"):
        main(argv)
    assert not cache.exists() or not list((cache / "corpora").iterdir())


def test_a_manifest_may_hold_a_byte_order_mark_line_separators_and_nulls(tmp_path):
    line = (
        '{"audio": "a.wav", "text": "one\u2028two", "duration": 1, "speaker": null, "words": null}'
    )
    (tmp_path / "m.jsonl").write_text(line, encoding="utf-8-sig")
    (utterance,) = read_manifest(tmp_path / "m.jsonl")
    assert utterance.text == "one\u2028two"
    assert utterance.speaker == "" and utterance.words == ()
    write_manifest(tmp_path / "again.jsonl", [utterance])
    assert read_manifest(tmp_path / "again.jsonl")[0].text == utterance.text


@pytest.mark.parametrize("name", ["a\0b.wav", "\ud800.wav"])
def test_a_path_that_no_file_can_have_is_bad_audio(name):
    with pytest.raises(BadAudio, match="no file can have this name"):
        load_usable([Utterance(name, Path(name), "a", 1.0)], "error")


@pytest.mark.skipif(find_spec("datasets") is None, reason="`datasets` is not installed")
def test_a_data_set_of_the_hub_is_streamed_and_checked_for_its_columns(tmp_path):
    import datasets

    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0, 22_050), 22_050)
    audio = {"bytes": path.read_bytes(), "path": "a.wav"}
    broken = {"bytes": b"not audio", "path": "b.wav"}
    rows = {"audio": [audio, broken, audio, audio], "sentence": ["One", "Two", " ", "Four"]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "test.parquet")
    argv = ["build", "hub", str(tmp_path / "set"), "--name", "web"]
    with pytest.raises(UsageError, match="no column text; there are audio, sentence"):
        main(argv)
    main([*argv, "--text-column", "sentence"])
    assert [u.text for u in read_manifest(find_manifest("web/test"))] == ["One", "Four"]
    main([*argv, "--text-column", "sentence", "--limit", "1"])
    (one,) = read_manifest(find_manifest("web/test"))
    assert one.duration == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(UsageError, match="not readable"):
        main(["build", "hub", str(tmp_path / "gone"), "--name", "web"])
