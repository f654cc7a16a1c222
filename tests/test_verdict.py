"""The verdict: what it is asked, what it refuses, and the command on a pair that hears nothing."""

import json
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from melprobe import verdict
from melprobe.analysis.agreement import difference_of_means, within_less_between
from melprobe.analysis.statistics import Bootstrap
from melprobe.corpus.manifest import read_manifest, write_manifest
from melprobe.errors import UsageError
from melprobe.judging.agree import agreements, also_at
from melprobe.judging.evidence import ablation, top_quarter
from melprobe.judging.judge import Judge
from melprobe.judging.need import needs, top_quarter_claim
from melprobe.judging.question import Question, read_study
from melprobe.model.ancestry import Ancestor, write_ancestors
from tests.test_probe import make_manifest
from tests.tiny import N_LAYERS

ARMS = {"none": ["none-0", "none-1"], "encoder": ["encoder-0", "encoder-1"]}
MARGINS = {"exchanged": 0.1, "stitched": 0.1, "h": 0.1, "delta": 0.1, "probe": 0.05}


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """Four runs whose adapters are different noise, clips and other clips, and a study of them."""
    place = tmp_path_factory.mktemp("verdict")
    for seed, name in enumerate([*ARMS["none"], *ARMS["encoder"]]):
        shutil.copytree(folder / "model", place / name)
        adapter = load_file(place / name / "adapter.safetensors")
        generator = torch.Generator().manual_seed(seed)
        for tensor, value in adapter.items():
            value += 0.05 * torch.randn(value.shape, generator=generator) * ("lora" in tensor)
        save_file(adapter, place / name / "adapter.safetensors")
    make_manifest(place)
    clips = read_manifest(place / "clips.jsonl")
    write_manifest(place / "heard.jsonl", clips[::2])
    write_manifest(place / "fit.jsonl", clips[1::2])
    ask(place / "study.yaml", place, folder)
    return place


def ask(path, place, folder, **changes):
    study = {
        "arms": {arm: [str(place / run) for run in runs] for arm, runs in ARMS.items()},
        "reader": str(folder / "base"),
        "data": str(place / "heard.jsonl"),
        "fit": str(place / "fit.jsonl"),
        "probe": "phone",
        "clips": 12,
    }
    path.write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def judged(place):
    verdict.main([str(place / "study.yaml"), "--out", str(place / "out")])
    return place / "out"


def test_a_pair_that_hears_nothing_is_judged_in_nothing(judged):
    found = json.loads((judged / "verdict.json").read_text())
    assert not found["gates_passed"] and len(found["layers"]) == N_LAYERS
    assert [layer["judged"] for layer in found["layers"]] == [True] * (N_LAYERS - 1) + [False]
    for layer in found["layers"][:-1]:
        assert {arm["need"] for arm in layer["need"].values()} == {"undecided: gate"}
        assert layer["agreement"]["agreement"] == "undecided: gate"
        assert layer["agreement"]["at_equal_computing"] == "undecided: seeds"
        for line in layer["agreement"]["lines"].values():
            assert line["claim"] == "undecided" and line["error"] is None
            assert line["difference"] is not None
    assert {q["verdict"] for q in found["top_quarter"].values()} == {"undecided: gate"}
    for runs in found["arms"].values():
        for run in runs:
            assert len(run["adapter_sizes"]) == N_LAYERS and min(run["adapter_sizes"]) > 0
    ET.fromstring((judged / "verdict.svg").read_text())
    # Any of these can be given again by hand.
    assert len(found["evidence"]) == 1 + 4 * 5 + 2 * 6
    assert all(command.startswith("python -m melprobe.") for command in found["evidence"])


def test_evidence_is_made_once(judged, place, capsys):
    before = (judged / "verdict.json").read_bytes()
    verdict.main([str(place / "study.yaml"), "--out", str(judged)])
    assert "--out" not in capsys.readouterr().err
    assert (judged / "verdict.json").read_bytes() == before


def test_margins_are_kept_from_before_the_rows(judged, place, folder):
    later = ask(place / "later.yaml", place, folder, margins={"damage": 0.2})
    with pytest.raises(UsageError, match=r"made with other settings \(other margins\).*--out"):
        verdict.main([str(later), "--out", str(judged)])


def test_with_gates_passed_two_seeds_say_what_blocks_need_and_no_more(judged, place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(judged, out)
    question = Question(read_study(place / "study.yaml"))
    for folder in [ablation(out, "copying"), *(ablation(out, "speech", r) for r in question.runs)]:
        results = json.loads((folder / "results.json").read_text())
        results["gate"]["passed"] = True
        (folder / "results.json").write_text(json.dumps(results))
    layers = Judge(question, out, N_LAYERS).verdict()["layers"][:-1]
    assert {layer["agreement"]["agreement"] for layer in layers} == {"undecided: seeds"}
    needs = {arm["need"] for layer in layers for arm in layer["need"].values()}
    assert "undecided: gate" not in needs
    (ablation(out, "copying") / "rows.parquet").write_text("")
    with pytest.raises(UsageError, match=r"copying: rows missing or damaged .* delete .*\.done"):
        Judge(question, out, N_LAYERS).verdict()


def test_bad_questions_are_refused(place, folder, tmp_path):
    def refused(match, **changes):
        path = ask(tmp_path / "study.yaml", place, folder, **changes)
        with pytest.raises(UsageError, match=match):
            verdict.main([str(path), "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()

    one, two = str(place / "none-0"), str(place / "none-1")
    refused("arms: name one or two, there are 3", arms={"a": [one], "b": [two], "c": [one]})
    refused("arms: b has no runs", arms={"a": [one], "b": []})
    refused("none-0 is named twice", arms={"a": [one], "b": [one]})
    refused("no checkpoint 'nobody'", arms={"a": ["nobody"]})
    refused("margins.damage: Input should be greater than 0", margins={"damage": 0})
    refused("margin: there is no such field; did you mean margins", margin=3)
    refused("probe: f0 is none of phone, class", probe="f0")
    refused("nearest_wer: third is none of the arms", nearest_wer={"third": [one]})
    refused("neither a manifest file nor a corpus", data="nowhere.jsonl")
    with pytest.raises(UsageError, match="there is no such file; see recipes/verdicts"):
        verdict.main([str(tmp_path / "none.yaml")])
    with pytest.raises(UsageError, match="--jobs 0: take 1 or more"):
        verdict.main([str(place / "study.yaml"), "--jobs", "0"])
    copy = tmp_path / "copy"
    shutil.copytree(place / "none-0", copy)
    refused("none-0 and copy have the same weights", arms={"a": [one], "b": [str(copy)]})


def test_what_grew_from_the_other_arm_is_no_pair(place, folder, tmp_path):
    for name in ("none-0", "encoder-0"):
        shutil.copytree(place / name, tmp_path / name)
    arms = {"a": [str(tmp_path / "none-0")], "b": [str(tmp_path / "encoder-0")]}
    path = ask(tmp_path / "study.yaml", place, folder, arms=arms)
    sha256 = Question(read_study(path)).runs[0].sha256
    write_ancestors(tmp_path / "encoder-0", [Ancestor("none-0", sha256, "targets")])
    with pytest.raises(UsageError, match="no matched pair: in a there is none-0, in b none-0, whi"):
        Question(read_study(path))
    for name in ("none-0", "encoder-0"):  # a third that went into both
        write_ancestors(tmp_path / name, [Ancestor("teacher", "0" * 64, "targets")])
    with pytest.raises(UsageError, match="in a there is teacher, which gave none-0 its targets"):
        Question(read_study(path))
    for name in ("none-0", "encoder-0"):
        write_ancestors(tmp_path / name, [])
    recipe = json.loads((tmp_path / "none-0" / "recipe.json").read_text())
    recipe["data"]["stages"][0]["steps"] += 1
    (tmp_path / "none-0" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(UsageError, match=r"not trained alike: data.stages is .* or "):
        verdict.main([str(path), "--out", str(tmp_path / "out")])


def damages(*truth, n=200, spread=0.02, seed=0):
    """Tests of damages [L] that are measured on n clips."""
    rng = np.random.default_rng(seed)
    values = np.array(truth) + spread * rng.standard_normal((n, len(truth)))
    return Bootstrap([""] * n, resamples=2000, seed=seed).tests(values)


def test_need_is_what_all_runs_and_the_control_say():
    speech = [damages(0.5, 0.0, 0.5, 0.0, 0.5, 0.5, seed=1)]
    speech.append(damages(0.5, 0.0, 0.5, 0.0, 0.5, 0.0, seed=2))
    answer = [damages(0.0, 0.5, 0.5, 0.0, 0.0, 0.0, seed=s) for s in (3, 4)]
    copying = damages(0.0, 0.0, 0.0, 0.0, 0.5, 0.0, seed=5)
    found = [one.need for one in needs(speech, answer, copying, 0.05)]
    # The fifth is needed by any text, the last by one run.
    assert found == ["speech", "text", "both", "neither", "both", "undecided"]


@pytest.mark.parametrize(
    ("top", "rest", "told"),
    [
        (0.0, (0.5, 0.5), "agrees"),
        (0.5, (0.5, 0.5), "disagrees"),
        (0.0, (0.5, 0.0), "disagrees"),
        (0.05, (0.5, 0.5), "undecided"),
        (0.0, (0.5, 0.05), "undecided"),
    ],
)
def test_the_top_quarter_is_claimed_together_with_the_rest(top, rest, told):
    runs = [damages(*rest, 0.0, seed=s) for s in (1, 2)]
    of_top = [damages(top, seed=s) for s in (3, 4)]
    found = top_quarter_claim(of_top, runs, 2, 0.05)
    assert found.verdict == told and found.spare == ([1] if rest[1] == 0.0 else [])
    assert top_quarter(10) == [8, 9] and top_quarter(3) == [2]


def lines(runs=3, **truth):
    """Differences of lines, 0 unless named, each in three blocks."""
    rng = np.random.default_rng(0)
    arms, m = ["none"] * runs + ["encoder"] * runs, 2 * runs
    same = np.equal.outer(np.arange(m) < runs, np.arange(m) < runs)
    found = {}
    for line in ("exchanged", "stitched", "h", "delta"):
        noise = 0.002 * rng.standard_normal((3, m, m))
        s = 0.8 * np.ones((3, m, m)) - truth.get(line, 0.0) * ~same + noise + noise.swapaxes(1, 2)
        found[line] = within_less_between(s, arms)
    scores = 0.5 + 0.001 * rng.standard_normal((3, m)) + truth.get("probe", 0.0) * same[0]
    return found | {"probe": difference_of_means(scores, arms)}


@pytest.mark.parametrize(
    ("truth", "label"),
    [
        ({}, "agnostic"),
        ({"exchanged": 0.5, "delta": 0.5}, "specific"),
        ({"stitched": 0.5, "probe": -0.5}, "specific"),
        ({"exchanged": 0.5}, "undecided"),  # harm alone
        ({"h": 0.5, "delta": 0.5, "probe": 0.5}, "undecided"),  # difference alone
    ],
)
def test_agreement_takes_all_lines_and_specificity_one_of_each_kind(truth, label):
    found = agreements(lines(**truth), MARGINS)
    assert {one.agreement for one in found} == {label}
    claims = {name: one.claim for name, one in found[0].lines.items()}
    assert {name for name, claim in claims.items() if claim == "above"} == set(truth)
    few = agreements(lines(runs=2, **truth), MARGINS)
    assert {one.agreement for one in few} == {"undecided: seeds"}


def test_a_conclusion_has_to_hold_at_equal_word_error_rates_too():
    alike, unlike = agreements(lines(), MARGINS), agreements(lines(h=0.5), MARGINS)
    assert also_at(alike, alike) == ["agnostic"] * 3
    assert also_at(alike, unlike) == ["undecided: nearest WER"] * 3
    assert also_at(alike, None) == ["undecided: nearest WER"] * 3
    assert also_at(unlike, None) == also_at(unlike, unlike) == ["undecided"] * 3
