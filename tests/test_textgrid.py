"""TextGrids: read as Praat reads them, and what becomes of their times."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from melprobe.corpus.__main__ import main
from melprobe.corpus.manifest import Span, Utterance, read_manifest, write_manifest
from melprobe.corpus.phones import PHONES, fold
from melprobe.corpus.praat import read_textgrid
from melprobe.corpus.textgrid import choose
from melprobe.errors import UsageError

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = "say ""é"" [1] = 3 item ["
        intervals [2]:
            xmin = 0.5
            xmax = 1e0
            text = ""
    item [2]:
        class = "TextTier"
        name = "bells"
        xmin = 0
        xmax = 1
        points: size = 1
        points [1]:
            number = 0.25
            mark = "ding"
    item [3]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1
            text = "two
lines"
"""
SHORT = """"ooTextFile"
"TextGrid"
0 1 ! the time domain, and "no text" 7
<exists> three tiers, or 3
"IntervalTier" "words" 0 1 2
0 0.5 "say ""é"" [1] = 3 item [" 0.5 1 ""
"TextTier" "bells" 0 1 1
0.25 "ding"
"IntervalTier" "phones" 0 1 1
0 1 "two
lines"
"""
TIERS = [
    ("words", (Span('say "é" [1] = 3 item [', 0, 0.5), Span("", 0.5, 1))),
    ("phones", (Span("two\nlines", 0, 1),)),
]


@pytest.mark.parametrize("text", [LONG, SHORT, LONG.replace("\n", "\r\n")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_both_formats_say_the_same_in_all_encodings(tmp_path, text, encoding):
    path = tmp_path / "a.TextGrid"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + text).encode(encoding))
    tiers = [(n, tuple(s._replace(label=s.label.replace("\r", "")) for s in t)) for n, t in TIERS]
    found = [
        (t.name, tuple(s._replace(label=s.label.replace("\r", "")) for s in t.spans))
        for t in read_textgrid(path)
    ]
    assert found == tiers


# In a process of its own: beside torch's other libraries it can't always be imported.
PRAAT = """
import sys
import parselmouth
from parselmouth.praat import call
folder = sys.argv[1]
grid = parselmouth.read(folder + "/short.TextGrid")
call("Text writing preferences...", "UTF-16")
for kind in ("text", "short text", "binary"):
    call(grid, f"Save as {kind} file...", f"{folder}/{kind.replace(' ', '-')}.TextGrid")
"""


def test_what_praat_reads_and_writes_we_read(tmp_path):
    if not find_spec("parselmouth"):
        pytest.skip("parselmouth is not installed")
    (tmp_path / "short.TextGrid").write_text(SHORT, encoding="utf-8")
    subprocess.run([sys.executable, "-c", PRAAT, str(tmp_path)], check=True)
    for name in ("text", "short-text"):
        path = tmp_path / f"{name}.TextGrid"
        assert path.read_bytes()[:2] == b"\xfe\xff"  # UTF-16
        assert [tuple(tier) for tier in read_textgrid(path)] == TIERS
    with pytest.raises(UsageError, match="it is binary: save it as a text file in Praat"):
        read_textgrid(tmp_path / "binary.TextGrid")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it ends too early"),
        (b"\xff\xff", "neither UTF-8 nor UTF-16"),
        (b'{"start": 0}', "it ends too early"),
        (b'"ooTextFile" "Pitch"', "it holds a Pitch"),
        (b'"hello" "TextGrid"', "it does not begin with ooTextFile"),
        (SHORT.encode()[:-9], "it ends too early"),
        (SHORT.encode().replace(b'"words" 0', b'"words" "0"'), "'0' stands for a number"),
        (SHORT.encode().replace(b'"words" 0 1 2', b'"words" 0 1 2.5'), "2.5 can't be a count"),
        (SHORT.encode().replace(b"TextTier", b"Tears"), "a tier is a 'Tears'"),
    ],
)
def test_other_files_are_refused(tmp_path, data, reason):
    path = tmp_path / "a.TextGrid"
    path.write_bytes(data)
    with pytest.raises(UsageError) as error:
        read_textgrid(path)
    assert str(error.value).startswith(f"{path}: not a TextGrid, or a damaged one ({reason}")
    assert "\n" not in str(error.value)


# Montreal Forced Aligner's English dictionary (its documentation, English MFA phone set).
MFA = """
aj aw b bʲ c cʰ cʷ d dʒ dʲ d̪ ej f fʲ h i iː j k kʰ kʷ l m mʲ m̩ n n̩ ow p pʰ pʲ pʷ s t tʃ tʰ tʲ
tʷ t̪ v vʲ w z æ ç ð ŋ ɐ ɑ ɑː ɒ ɒː ɔj ə ɚ ɛ ɛː ɝ ɟ ɟʷ ɡ ɡʷ ɪ ɫ ɫ̩ ɱ ɲ ɹ ɾ ɾʲ ɾ̃ ʃ ʉ ʉː ʊ ʎ ʒ ʔ θ
əw e eː a aː o ɜː fʷ vʷ
"""


def test_every_phone_of_mfas_english_is_known():
    for label in MFA.split():
        assert set(fold(label)) <= set(PHONES)
    assert [fold(x) for x in ("ɟʷ", "ɫ̩", "cʰ", "ɾ̃")] == [("g",), ("ah", "l"), ("k",), ("n",)]


def grid(**tiers):
    """A TextGrid in short form, of tiers [(label, start, end), …]."""
    lines = ['"ooTextFile" "TextGrid"', f"0 1 <exists> {len(tiers)}"]
    for name, spans in tiers.items():
        lines.append(f'"IntervalTier" "{name}" 0 1 {len(spans)}')
        lines += [f'{start} {end} "{label}"' for label, start, end in spans]
    return "\n".join(lines)


WORDS = [("", 0, 0.1), ("it's", 0.1, 0.4), ("sil", 0.4, 0.5), ("call-forward", 0.5, 1.03)]
SOUNDS = [("sil", 0, 0.1), ("IH1", 0.1, 0.3), ("T", 0.3, 0.4), ("sp", 0.4, 0.5), ("EL", 0.5, 1.0)]


def clip(name, folder=Path(), **fields):
    return Utterance(name, folder / name, "It's call forward!", 1.0, **fields)


@pytest.fixture
def place(tmp_path):
    clips = [
        clip("ann/a.flac", tmp_path, speaker="Ann"),
        clip("bob/a.flac", tmp_path, speaker="Bob", words=(Span("old", 0, 1),), times="exact"),
        clip("b.flac", tmp_path),
        clip("c.flac", tmp_path, no_times="not alignable"),
    ]
    write_manifest(tmp_path / "own.jsonl", clips)
    lines = (tmp_path / "own.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"mood": "é"} for line in lines]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "grids" / "ann").mkdir(parents=True)
    return tmp_path


def put(place, name, **tiers):
    (place / "grids" / f"{name}.TextGrid").write_text(grid(**tiers), encoding="utf-8")


def test_times_are_taken_and_what_has_none_is_named(place, capsys):
    put(place, "ann/a", **{"Bob - words": [], "Ann - words": WORDS, "Ann - phones": SOUNDS})
    put(place, "b", words=WORDS, phones=[*SOUNDS[:-1], ("spn", 0.5, 1)])
    main(["textgrid", str(place / "own.jsonl"), str(place / "grids")])
    out, err = capsys.readouterr()
    path = place / "own.jsonl"
    assert out.splitlines() == [
        f"{path}: 2 of 4 have times of TextGrids; 2 without a TextGrid",
        "1 of them with words alone",
    ]
    told = err.splitlines()
    assert told[0] == f"{path}:2: bob/a.flac: there is no TextGrid of its name"
    assert told[1].startswith(f"{path}:3: b.flac: {place / 'grids' / 'b.TextGrid'}: phone 'spn': ")
    assert told[2:] == [f"{path}:4: c.flac: there is no TextGrid of its name"]
    ann, bob, b, c = read_manifest(path)
    assert ann.words == (Span("it's", 0.1, 0.4), Span("call forward", 0.5, 1.0))
    assert ann.phones == (
        *(Span("ih", 0.1, 0.3), Span("t", 0.3, 0.4)),
        *(Span("ah", 0.5, 0.75), Span("l", 0.75, 1.0)),
    )
    assert (ann.times, bob.times, b.times) == ("TextGrid", "exact", "TextGrid")
    assert bob.words == (Span("old", 0, 1),) and not bob.no_times
    assert b.words == ann.words and not b.phones
    assert c.no_times == "without a TextGrid"
    assert all(json.loads(line)["mood"] == "é" for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("tiers", "reason", "line"),
    [
        (
            {"bells": []},
            "with unusable TextGrids",
            "has no interval tier of words; there are bells",
        ),
        ({}, "with unusable TextGrids", "has no interval tier of words; there are none"),
        (
            {"words": WORDS[:2]},
            "with other words than their text",
            'says "it\'s", the manifest "it\'s call forward"',
        ),
        (
            {"words": [*WORDS[:3], ("call forward", 0.5, 1.2)]},
            "with unusable TextGrids",
            "words end at 1.20 s, the clip at 1.00; it may be another's",
        ),
        (
            {"words": [*WORDS[:3], ("call forward", 0.3, 1)]},
            "with unusable TextGrids",
            "words: its times don't rise",
        ),
        (
            {"Ann - words": WORDS, "Cid - words": WORDS},
            "with unusable TextGrids",
            "has tiers Ann - words, Cid - words, and the clip's speaker is ''",
        ),
    ],
)
def test_a_textgrid_that_does_not_fit_is_left(place, capsys, tiers, reason, line):
    put(place, "ann/a", words=WORDS, phones=SOUNDS)
    put(place, "c", **tiers)
    out = place / "out" / "new.jsonl"
    main(["textgrid", str(place / "own.jsonl"), str(place / "grids"), "--out", str(out)])
    told = capsys.readouterr()
    path = place / "grids" / "c.TextGrid"
    assert told.err.splitlines()[-1] == f"{place / 'own.jsonl'}:4: c.flac: {path}: {line}"
    assert f"1 {reason}" in told.out
    (ann, *_, c) = read_manifest(out)
    assert ann.times and c.no_times == reason and not c.words
    assert read_manifest(place / "own.jsonl")[3].no_times == "not alignable"


def test_a_name_finds_the_nearest_file_or_none():
    files = [Path("out/x/a.TextGrid"), Path("out/b.TextGrid"), Path("out/y/c.d.textgrid")]
    files += [Path("one/e.TextGrid"), Path("two/e.TextGrid")]

    def named(*ids):
        return [[str(file) for file in found] for found in choose(files, list(map(clip, ids)))]

    assert named("x/a.flac", "y/a.flac") == [["out/x/a.TextGrid"], []]
    assert named("p/b.flac", "q/b.flac") == [["out/b.TextGrid"] * 2] * 2
    assert named("c.d.flac", "c.d", "zz") == [["out/y/c.d.textgrid"] * 2] * 2 + [[]]
    assert named("e.flac") == [["one/e.TextGrid", "two/e.TextGrid"]]
    assert named("two/e.flac") == [["two/e.TextGrid"]]


def test_folders_without_any_that_fit_are_refused(place):
    manifest = str(place / "own.jsonl")
    before = (place / "own.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"nowhere: no such folder"):
        main(["textgrid", manifest, str(place / "nowhere")])
    with pytest.raises(UsageError, match=r"grids: holds no \*\.TextGrid"):
        main(["textgrid", manifest, str(place / "grids")])
    put(place, "other", words=WORDS)
    with pytest.raises(
        UsageError, match=r"none of its 1 TextGrids gives a clip of .*own\.jsonl its"
    ):
        main(["textgrid", manifest, str(place / "grids")])
    assert (place / "own.jsonl").read_bytes() == before
