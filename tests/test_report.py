"""The report says what the rows say, stands alone, and is the same bytes every time."""

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from melprobe.errors import UsageError
from melprobe.report import examples, figures, reading, schema
from melprobe.report.__main__ import main
from melprobe.report.html import render
from tests.synthetic_run import (
    as_heads,
    as_set,
    plain,
    sweep_damages,
    synthetic_results,
    write_run,
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A rendered sweep; read only."""
    run = write_run(tmp_path_factory.mktemp("sweep"), synthetic_results(sweep_damages()))
    return run, render(run).read_text()


def test_rebuilt_without_torch_the_page_is_the_same_bytes(sweep):
    run, page = sweep
    code = (
        "import sys; from melprobe.report.__main__ import main; main(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, capture_output=True)
    assert (run / "report.html").read_text() == page


class Page(HTMLParser):
    """Collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.unnamed: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        held = dict(attrs)
        self.tags.append(tag)
        self.loads += [held[name] for name in ("src", "href", "xlink:href") if name in held]
        self.ids += [held["id"]] if "id" in held else []
        self.links += [held["href"][1:]] if held.get("href", "").startswith("#") else []
        if tag in ("img", "svg", "audio") and not (
            held.get("aria-label") or held.get("alt") or held.get("aria-hidden") == "true"
        ):
            self.unnamed.append(self.get_starttag_text())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["sweep", "heads", "quiet", "set", "failed", "empty"])
def test_every_page_stands_alone_and_every_picture_has_words(kind, tmp_path):
    results = {
        "sweep": synthetic_results(sweep_damages()),
        "heads": as_heads([0.3, 0.01, 0.06, -0.01, 0.0, 0.0], n_heads=2),
        "quiet": synthetic_results([0.004] * 3 + [0.0]),
        "set": as_set(0.31),
        "failed": synthetic_results(sweep_damages(), passed=False),
        "empty": synthetic_results([0.0]) | {"layers": []},
    }[kind]
    text = render(write_run(tmp_path, results)).read_text()
    page = Page(text)
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert not re.search(r"url\((?!#|data:)", text) and "@import" not in text
    assert page.unnamed == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.links) <= set(page.ids)
    assert len(text) < 8_000_000
    gate = "failed" if kind == "failed" else "passed"
    assert f"Listening gate {gate}" in text
    assert text.index(f"Listening gate {gate}") < text.index('class="headline"')
    figures = {"sweep": 3, "heads": 1, "quiet": 3, "set": 1}.get(kind, 0)
    assert page.tags.count("figure") == figures
    assert page.tags.count("audio") == examples.MOST_EXAMPLES


def test_a_failed_gate_shows_no_outcomes(tmp_path):
    results = synthetic_results(sweep_damages(), passed=False)
    text = render(write_run(tmp_path, results)).read_text()
    assert "no claim about layers is made" in text
    assert 'class="map"' not in text and ">outcome<" not in text
    assert text.count('aria-label="zero by construction"') == 1
    assert "Zero by construction (the open circle): what the last block writes" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("passed", [True, False])
def test_where_no_limits_are_known_there_is_a_dash_and_no_bar(passed, tmp_path):
    results = synthetic_results(sweep_damages(), passed=passed)
    unknown = {"damage_ci": None, "delta_nll_ci": None, "delta_wer_ci": None}
    results["layers"] = [layer | unknown for layer in results["layers"]]
    results["baseline"]["wer_ci"] = None
    if not passed:
        results["gate"]["nll_gap_ci"] = None
    text = render(write_run(tmp_path, results)).read_text()
    row = text[text.index('id="block-0"') :].partition("</tr>")[0]
    assert '<td data-value="">–</td>' in row and row.count('<span class="ci">[–]</span>') == 2
    assert "inf" not in reading.headline(results) and "None" not in text


def test_numbers_on_an_axis_stand_apart_however_much_a_clip_is_worth(sweep):
    run, _ = sweep
    results, _ = schema.load(run)
    for gap in (0.6, 2.0, 6.0, 14.0):
        results["gate"]["nll_swapped"] = results["gate"]["nll_intact"] + gap
        figure = Figure()
        figures.damage(results, figure, narrow=False)
        for ax in figure.axes:
            ticks = [ax.transData.transform((0, tick))[1] for tick in ax.get_yticks()]
            assert min(b - a for a, b in pairwise(ticks)) > 10


def test_where_no_clip_changed_the_table_says_so(sweep):
    row = sweep[1].partition('id="block-29"')[2].partition("</tr>")[0]
    assert '0.0 <span class="ci">no clip’s errors</span>' in row


def test_a_failed_gate_speaks_of_an_error_rate_not_of_wrong_words():
    results = synthetic_results(sweep_damages(), passed=False)
    results["gate"]["wer_swapped"] = 1.5
    assert "the word error rate with another clip is 150.0 %" in plain(reading.headline(results))


def test_markup_in_data_is_shown_as_text(tmp_path):
    evil = "<script>alert(1)</script> & \"quotes\" 'too'"
    results = as_set(0.31)
    results["warnings"] = results["data"]["left_out"] = [evil]
    results["data"]["note"] = results["checkpoint"]["name"] = results["command"] = evil
    text = render(write_run(tmp_path, results, reference=evil)).read_text()
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    assert Page(text).tags.count("script") == 1


def test_word_differences():
    assert examples.difference("Please hold the line.", "please told the old line") == [
        ("same", "please", ""),
        ("wrong", "told", "hold"),
        ("same", "the", ""),
        ("added", "old", ""),
        ("same", "line", ""),
    ]
    assert examples.difference("one two", "two") == [("missing", "one", ""), ("same", "two", "")]
    assert examples.difference("one", "") == [("missing", "one", "")]
    assert examples.difference("", "one") == [("added", "one", "")]
    assert examples.difference("", "") == []


def test_words_heard_where_none_were_said_are_added(tmp_path):
    results = as_set(0.31)
    run = write_run(tmp_path, results)
    _, rows = schema.load(run)
    first = rows.utterance == rows.utterance.min()
    rows.loc[first, ["reference", "reference_words"]] = ["[cough]", 0]
    kinds = {
        part.kind
        for example in examples.examples(run, results, rows)
        if example.reference == "[cough]"
        for transcript in example.transcripts
        for part in transcript.runs
    }
    assert kinds == {"added"}


def test_a_clip_stays_inside_the_run_folder(tmp_path):
    assert examples.clip_path(tmp_path, "../a/b.wav") == tmp_path / "audio" / "..__a__b.flac"


def test_missing_or_odd_runs_are_usage_errors(sweep, tmp_path):
    with pytest.raises(UsageError, match=r"no results\.json there; make it with"):
        main([str(tmp_path)])
    run, _ = sweep
    good = json.loads((run / "results.json").read_text())
    (tmp_path / "rows.parquet").write_bytes((run / "rows.parquet").read_bytes())
    bad = copy.deepcopy(good)
    del bad["gate"]["passed"]
    (tmp_path / "results.json").write_text(json.dumps(bad))
    with pytest.raises(UsageError, match=r"gate\.passed: Field required"):
        render(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(good | {"schema": 1}))
    with pytest.raises(UsageError, match="schema 1, but this melprobe reads 5"):
        render(tmp_path)
    infinite = copy.deepcopy(good)
    infinite["baseline"]["wer_ci"] = [0, float("inf")]
    (tmp_path / "results.json").write_text(json.dumps(infinite))
    with pytest.raises(UsageError, match=r"baseline\.wer_ci.*finite"):
        render(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(good))
    for content in (b"", (run / "rows.parquet").read_bytes()[:500]):
        (tmp_path / "rows.parquet").write_bytes(content)
        with pytest.raises(UsageError, match=r"rows\.parquet: damaged"):
            render(tmp_path)
    with pytest.raises(UsageError, match="the following arguments are required: RUN"):
        main([])
