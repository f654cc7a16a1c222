"""Synthetic speech: who says what is settled by the seed, splits share nothing, times are true."""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from melprobe.audio.load import load_utterance
from melprobe.corpus import casting, sentences, synth
from melprobe.corpus.engines import Clip, Segment, espeak, festival, spans, word_labels
from melprobe.corpus.manifest import Span, read_manifest
from melprobe.corpus.sentences import clean, ngrams
from melprobe.errors import UsageError

SMALL = ("--n", "400", "--dev", "30", "--test", "60", "--test-engine", "30")


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    synth.add_arguments(parser)
    return parser.parse_args(options)


def speakers(clips: list[Clip]) -> set[str]:
    return {f"{clip.engine}:{clip.voice}" for clip in clips}


def test_a_plan_follows_from_arguments_and_seed() -> None:
    plan = casting.plan(arguments(*SMALL))
    assert plan == casting.plan(arguments(*SMALL))
    assert plan != casting.plan(arguments(*SMALL, "--seed", "1"))
    sizes = {split: len(clips) for split, clips in plan.items()}
    assert sizes == {"dev": 30, "test": 60, "test-engine": 30, "train": 400}


def test_splits_share_no_held_out_voice() -> None:
    plan = casting.plan(arguments("--n", "3000"))
    train, dev, test, foreign = (
        speakers(plan[split]) for split in ("train", "dev", "test", "test-engine")
    )
    assert not (train | dev) & (test | foreign)
    assert not test & foreign
    assert "flite:rms" in test
    assert foreign == {f"festival:{voice}" for voice in festival.VOICES}
    assert not any("en-gb-scotland" in speaker or "+zac" in speaker for speaker in train)
    assert len(train) >= 150


def test_word_sequences_are_unique_and_share_no_trigram_with_train() -> None:
    plan = casting.plan(arguments("--n", "3000"))
    train = [clip.text for clip in plan.pop("train")]
    others = [clip.text for clips in plan.values() for clip in clips]
    assert len(set(train)) == len(train)
    assert len(set(others)) == len(others)
    assert (
        set()
        .union(*(ngrams(s, 3) for s in train))
        .isdisjoint(set().union(*(ngrams(s, 3) for s in others)))
    )
    assert {len(sentence.split()) for sentence in train} == {2, 3, 4, 5, 6}
    vocabulary = sentences.WORDS.read_text().split()
    assert len(vocabulary) == 240
    assert {word for sentence in train for word in sentence.split()} == set(vocabulary)


def test_a_text_file_is_split_and_only_train_repeats(tmp_path: Path) -> None:
    lines = [
        f"the {a} saw a {b}" for a in ("dog", "cat", "wolf") for b in ("tree", "bone", "mouse")
    ]
    path = tmp_path / "lines.txt"
    sizes = ("--n", "20", "--dev", "1", "--test", "1", "--test-engine", "0")
    path.write_text("\n".join([*lines, lines[0].upper(), lines[1] + ".", "room 12"]))
    plan = casting.plan(arguments("--text", str(path), *sizes))
    assert "test-engine" not in plan
    train = {clip.text for clip in plan["train"]}
    assert len(plan["train"]) == 20
    held_out = [clip.text for split in ("dev", "test") for clip in plan[split]]
    for sentence in held_out:
        assert all(ngrams(sentence, 4).isdisjoint(ngrams(other, 4)) for other in train)


def test_a_training_manifest_is_spoken_a_test_is_not(tmp_path: Path) -> None:
    for name, texts in {
        "train": ["go to the old house", "Go to the old house."],
        "test": ["no"],
    }.items():
        rows = [{"audio": f"{i}.flac", "text": t, "duration": 1} for i, t in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--n", "4", "--dev", "0", "--test", "0", "--test-engine", "0")
    plan = casting.plan(arguments("--text", f"manifest:{tmp_path / 'train.jsonl'}", *options))
    assert [clip.text for clip in plan["train"]] == ["go to the old house"] * 4
    with pytest.raises(UsageError, match="speak a training split, not test"):
        casting.plan(arguments("--text", f"manifest:{tmp_path / 'test.jsonl'}", *options))


def test_shuffled_sentences_keep_their_words_and_lengths_but_no_order(tmp_path: Path) -> None:
    lines = [f"{a} went to {b} with {c} again" for a in "xyz" for b in ("us", "them") for c in "uv"]
    lines = [line.translate(str.maketrans({"x": "he", "y": "she", "z": "we"})) for line in lines]
    lines = [line.replace(" u ", " rope ").replace(" v ", " love ") for line in lines]
    rows = [{"audio": f"{i}.flac", "text": t, "duration": 1} for i, t in enumerate(lines)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--n", str(len(lines)), "--dev", "0", "--test", "0", "--test-engine", "0")
    plan = casting.plan(arguments("--text", f"shuffled:{tmp_path / 'train.jsonl'}", *options))
    spoken = [clip.text for clip in plan["train"]]
    assert not set(spoken) & set(lines)
    assert [len(text.split()) for text in spoken] == [7] * len(lines)
    assert sorted(" ".join(spoken).split()) == sorted(" ".join(lines).split())


@pytest.mark.parametrize(
    ("line", "spoken"),
    [
        ('Well... "I am half-asleep", he said', "Well, I am half asleep, he said"),
        ("Yes, sir!It's me; no.. Really?!", "Yes, sir! It's me; no, Really?"),
        ("Wait - what?", "Wait, what?"),
        ("Room 12", None),
        ("the FBI came", None),
        ("Dr. No", None),
        ("plan B", None),
        ("measure the pH", None),
        ("a café", None),
        ("...", None),
    ],
)
def test_only_lines_that_are_spoken_as_written_pass(line: str, spoken: str | None) -> None:
    assert clean(line) == spoken


def test_a_text_source_names_its_folder() -> None:
    texts = ("words", "manifest:queen/train", "my/lines.txt", "shuffled:queen/train")
    names = ["synth-words", "synth-queen", "synth-lines", "synth-shuffled-queen"]
    assert [*map(synth.default_name, texts)] == names


def test_festivals_lines_are_read() -> None:
    lines = "pau 0.22 0\nax 0.3 _1\nr 0.4 _2\nih 0.5 _2\nr 0.6 0\npau 0.8 0\n"
    segments = festival.segments(lines, 0.75)
    assert segments[0] == Segment("", 0.0, 0.22, None)
    assert segments[-1] == Segment("", 0.6, 0.75, None)
    phones, words = spans("a re", segments) or ([], [])
    assert phones[1:3] == [Span("r", 0.3, 0.4), Span("ih", 0.4, 0.5)]
    # The linking r that festival adds after a word counts as that word's.
    assert words == [Span("a", 0.22, 0.3), Span("re", 0.3, 0.6)]


def test_espeaks_events_become_phones_and_words() -> None:
    events = [
        espeak.Event(True, 0),
        espeak.Event(False, 100, "ɐ"),
        espeak.Event(True, 300),
        espeak.Event(False, 400, "w"),
        espeak.Event(False, 500, "ɛ"),
        espeak.Event(False, 700, "l"),
        espeak.Event(False, 700, ""),
        espeak.Event(True, 900),  # the library ends with a word that has no phones
        espeak.Event(False, 900, ""),
    ]
    segments = espeak.segments(events, 1000, 900)
    phones, words = spans("A well.", segments) or ([], [])
    # The l has no time of its own and is left out.
    assert phones == [Span("ɐ", 0.1, 0.4), Span("w", 0.4, 0.5), Span("ɛ", 0.5, 0.7)]
    assert words == [Span("a", 0.1, 0.4), Span("well", 0.4, 0.7)]
    assert spans("A well known word", segments) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engines", "spike=1"), "spike=1 is not ENGINE=SHARE; engines: espeak, flite, festival"),
        (("--engines", "festival"), "nothing is left without festival"),
        (("--hold-out-voices", "flite:bob"), "flite:bob: matches none of 796 voices"),
        (("--hold-out-voices", "*"), "no voice is left for dev"),
        (("--engines", "flite=0"), "flite=0 is not ENGINE=SHARE"),
        (("--jobs", "0"), "--n and --jobs must be at least 1"),
        (("--text", "nowhere.txt"), "nowhere.txt: not a text file, `words`, `wordnet`"),
    ],
)
def test_wrong_arguments_are_named(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        casting.plan(arguments(*SMALL, *options))
    assert message in str(caught.value)


def test_too_few_sentences_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("only one sentence here")
    with pytest.raises(UsageError, match="too few sentences"):
        casting.plan(arguments("--text", str(path), *SMALL))


def test_a_missing_engine_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="festival is not installed: run `apt install festival`"):
        festival.check()


@pytest.fixture
def engines_present() -> None:
    for name in casting.ENGINES:
        try:
            casting.engine(name).check()
        except UsageError as error:
            pytest.skip(str(error))


@pytest.mark.usefixtures("engines_present")
def test_a_corpus_has_true_times_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    args = arguments("--n", "30", "--dev", "2", "--test", "8", "--test-engine", "6", "--jobs", "1")
    out = tmp_path / "synth-words"
    synth.build(args, tmp_path / "synth")
    finished = {path: path.read_bytes() for path in sorted(out.glob("*.jsonl"))}
    assert {path.stem for path in finished} == {"dev", "test", "test-engine", "train"}
    for path in finished:
        for utterance in read_manifest(path):
            wave = load_utterance(utterance)
            assert utterance.times == "exact"
            assert [word.label for word in utterance.words] == word_labels(utterance.text)
            for found in (utterance.phones, utterance.words):
                assert all(before.end <= after.start for before, after in pairwise(found))
                assert found[-1].end <= utterance.duration
            loud = np.flatnonzero(np.abs(wave) > 0.05 * np.abs(wave).max()) / 16_000
            assert abs(loud[0] - utterance.phones[0].start) < 0.15
            assert abs(loud[-1] - utterance.phones[-1].end) < 0.15

    clips = {path: path.read_bytes() for path in sorted(out.glob("audio/*/*.flac"))}
    (out / "parts" / "test-0000.jsonl").unlink()
    (out / "audio" / "test" / "00001.flac").unlink()
    (out / "test.jsonl").unlink()
    untouched = (out / "audio" / "train" / "00000.flac").stat().st_mtime_ns
    synth.build(args, tmp_path / "synth")
    assert {path: path.read_bytes() for path in sorted(out.glob("*.jsonl"))} == finished
    assert {path: path.read_bytes() for path in sorted(out.glob("audio/*/*.flac"))} == clips
    assert (out / "audio" / "train" / "00000.flac").stat().st_mtime_ns == untouched
    with pytest.raises(UsageError, match="was begun with other arguments"):
        synth.build(arguments("--n", "31", "--jobs", "1"), tmp_path / "synth")
