"""The report says what the rows say, stands alone, and is the same bytes every time."""

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from melprobe.errors import UsageError
from melprobe.report import examples, reading, schema
from melprobe.report.__main__ import main
from melprobe.report.html import render
from tests.synthetic_run import sweep_damages, synthetic_layer, synthetic_results, write_run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A rendered sweep; read only."""
    run = write_run(tmp_path_factory.mktemp("sweep"), synthetic_results(sweep_damages()))
    return run, render(run).read_text()


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def as_set(damage: float, **changes):
    results = synthetic_results(sweep_damages())
    results["question"]["layers"] = "3,5-8"
    nothing = {"block_influence": None, "angular_distance": None}
    rng = np.random.default_rng(0)
    results["layers"] = [synthetic_layer("3,5-8", damage, rng, **nothing, **changes)]
    return results


def test_headline_names_the_costly_the_spare_the_undecided_and_the_built_in():
    text = plain(reading.headline(synthetic_results(sweep_damages())))
    assert "most of all blocks 0, 11 and 1 (d = 1.12, 0.90 and 0.62" in text
    assert "each of blocks 17–28, skipped alone, costs less than d = 0.05" in text
    assert "blocks 10 and 12–16 stay undecided" in text
    assert text.endswith("block 29 costs nothing by construction, which is no finding.")


def test_headline_with_one_costly_block():
    text = plain(reading.headline(synthetic_results([0.001, 0.5, 0.002, 0.003, 0.0])))
    assert text.startswith("At speech positions block 1 costs most (d = 0.50")
    assert "each of blocks 0, 2 and 3, skipped alone, costs less" in text


def test_headline_when_all_lie_within_the_margin_does_not_count_the_built_in():
    text = plain(reading.headline(synthetic_results([0.004] * 9 + [0.0])))
    assert text.startswith("No single block is needed at speech positions")
    assert "any one of blocks 0–8 costs less than d = 0.05" in text
    assert "block 9 costs nothing by construction, which is no finding" in text


def test_headline_when_nothing_is_decided():
    text = plain(reading.headline(synthetic_results([0.05] * 4 + [0.0])))
    assert text.startswith("At speech positions the data don’t decide about blocks 0–3")


def test_headline_when_only_the_built_in_was_skipped():
    results = synthetic_results([0.0])
    assert plain(reading.headline(results)) == (
        "Nothing to find at speech positions; "
        "block 0 costs nothing by construction, which is no finding."
    )


def test_headline_makes_no_claim_when_the_gate_failed():
    text = plain(reading.headline(synthetic_results(sweep_damages(), passed=False)))
    assert text.startswith("No claim about layers is made: synthetic-smol did not pass")
    assert "block" not in text


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (0.31, "more than the margin of 0.05"),
        (0.01, "less than the margin of 0.05"),
        (0.05, "undecided against the margin of 0.05"),
    ],
)
def test_headline_of_a_set(damage, says):
    text = plain(reading.headline(as_set(damage)))
    assert text.startswith("Skipping blocks 3, 5–8 at speech positions") and says in text


def test_headline_of_a_set_that_is_zero_by_construction():
    text = reading.headline(as_set(0.0, zero_by_construction=True))
    assert text.endswith("costs nothing by construction, which is no finding.")


def test_ranges_and_numbers():
    assert reading.ranges([9, 0, 1, 12, 13, 14]) == ["0", "1", "9", "12–14"]
    assert reading.number(-0.0001) == "0.00" and reading.number(-1.5) == "−1.50"
    assert reading.points(0.05) == "+5.0" and reading.points(-0.05) == "−5.0"
    assert reading.number(None) == "–"


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
@pytest.mark.parametrize("kind", ["sweep", "quiet", "set", "failed", "empty"])
def test_every_page_stands_alone_and_every_picture_has_words(kind, tmp_path):
    results = {
        "sweep": synthetic_results(sweep_damages()),
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
    figures = {"sweep": 3, "quiet": 3, "set": 1}.get(kind, 0)
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


def test_where_no_clip_changed_the_table_says_so(sweep):
    row = sweep[1].partition('id="block-29"')[2].partition("</tr>")[0]
    assert '0.0 <span class="ci">no clip changed</span>' in row


def test_a_failed_gate_speaks_of_an_error_rate_not_of_wrong_words():
    results = synthetic_results(sweep_damages(), passed=False)
    results["gate"]["wer_swapped"] = 1.5
    assert "the word error rate on swapped audio is 150.0 %" in plain(reading.headline(results))


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
    with pytest.raises(UsageError, match="schema 1, but this melprobe reads 2"):
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


def run_of(sets, damages, question):
    """Results of a series of sets, with bands of ±18 %."""
    rng = np.random.default_rng(0)
    results = synthetic_results([0.0])
    results["layers"] = [
        synthetic_layer(label, damage, rng) for label, damage in zip(sets, damages, strict=True)
    ]
    results["question"] = results["question"] | {"layers": question}
    return results


def test_headline_of_suffixes_says_how_far_one_can_go():
    sets = [3, "2-3", "1-3", "0-3"]
    text = plain(reading.headline(run_of(sets, [0.0, 0.01, 0.4, 1.2], "suffixes")))
    assert text == (
        "At speech positions blocks 2–3 can be skipped together for less than d = 0.05, whole band "
        "included; blocks 1–3 cost more (d = 0.40)."
    )
    results = run_of(sets, [0.0, 0.4, 0.4, 1.2], "suffixes")
    results["layers"][0]["zero_by_construction"] = True
    assert plain(reading.headline(results)) == (
        "At speech positions the data show no run of blocks that can be skipped together for less "
        "than d = 0.05; blocks 2–3 cost more (d = 0.40); block 3 costs nothing by construction, "
        "which is no finding."
    )


def test_headline_of_windows_counts_them():
    results = run_of(["0-1", "1-2", "2-3"], [1.2, 0.3, 0.01], "windows:2")
    assert plain(reading.headline(results)) == (
        "At speech positions, of 3 runs of neighbouring blocks, each skipped together, 2 cost more "
        "than the margin of 0.05, 1 less, and 0 stay undecided; most blocks 0–1 (d = 1.20), least "
        "blocks 2–3 (d = 0.01)."
    )


def test_headline_without_lora_speaks_of_lora():
    results = as_set(0.3)
    results["question"] = {"cut": "without-lora", "positions": "all", "layers": "3,5-8"}
    text = plain(reading.headline(results))
    assert text.startswith("Switching LoRA off in blocks 3, 5–8 at all positions takes the model")
    results = synthetic_results([0.001] * 5)
    results["question"]["cut"], results["layers"] = "without-lora", results["layers"][:-1]
    text = plain(reading.headline(results))
    assert text.startswith("No single block’s LoRA is needed: switching LoRA off in any one of")
