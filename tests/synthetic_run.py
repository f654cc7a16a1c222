"""A made-up run folder for tests of the report: every number and transcript in it is synthetic."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from melprobe.report.examples import clip_path
from melprobe.report.schema import Layer, Results
from melprobe.store import Row, RowStore

SENTENCES = (
    "Please hold while I try that extension.",
    "The number you have dialed is not in service.",
    "Thank you for calling, goodbye.",
    "You have three new messages.",
    "To leave a message, press one.",
    "All agents are busy with other callers.",
    "Your call will be answered in the order it was received.",
    "Press pound when you are finished.",
)
WORDS = ("the", "press", "call", "message", "number", "one", "three", "please", "hold", "your")


def synthetic_layer(layer: int | str, damage: float, rng: np.random.Generator, **changes) -> Layer:
    """A plausible row of `layers` whose band is as wide as its damage makes likely."""
    half = 0.01 + 0.18 * abs(damage)
    wer = 0.23 + 0.7 * max(0.0, damage) ** 0.8
    words = 60
    errors = round(wer * words)
    insertions = round(errors * min(0.6, damage * 0.4)) if damage > 0 else 0
    deletions = (errors - insertions) // 3
    return {
        "layer": layer,
        "positions": "speech",
        "wer": errors / words,
        "delta_wer": errors / words - 14 / words,
        "delta_wer_ci": (errors / words - 0.3 - 0.05 * wer, errors / words - 0.15 + 0.06 * wer),
        "delta_nll": damage * 2.4,
        "delta_nll_ci": ((damage - half) * 2.4, (damage + half) * 2.4),
        "damage": damage,
        "damage_ci": (damage - half, damage + half),
        "kl": abs(damage) * 1.9,
        "block_influence": float(0.004 + 0.3 * damage**2 + 0.02 * rng.random()),
        "angular_distance": float(0.04 + 0.2 * math.sqrt(abs(damage)) + 0.02 * rng.random()),
        "substitutions": errors - insertions - deletions,
        "deletions": deletions,
        "insertions": insertions,
        "attribution": None,
        "zero_by_construction": False,
        "picked_by": [],
        **changes,
    }


def synthetic_results(damages: Sequence[float], *, passed: bool = True) -> Results:
    """A sweep over `len(damages)` blocks; the last one is zero by construction."""
    rng = np.random.default_rng(0)
    layers = [synthetic_layer(i, damage, rng) for i, damage in enumerate(damages[:-1])]
    nothing = {"damage_ci": (0.0, 0.0), "delta_nll_ci": (0.0, 0.0), "delta_wer_ci": (0.0, 0.0)}
    last = {"delta_wer": 0.0, "zero_by_construction": True, **nothing}
    layers.append(synthetic_layer(len(damages) - 1, 0.0, rng, **last))
    return {
        "schema": 5,
        "run": "synthetic",
        "question": {
            "cut": "skip",
            "positions": "speech",
            "readers": "",
            "beyond": 0.0,
            "by": "",
            "source_noise_db": 0.0,
            "copy_text": False,
            "layers": "each block in turn",
        },
        "checkpoint": {
            "name": "synthetic-smol",
            "sha256": "0" * 64,
            "base": "a made-up base model",
            "front": "linear",
            "token_rate_hz": 12.5,
            "n_layers": len(damages),
            "targets_after": [7, 12],
            "trained_on": ["made-up speech", "more made-up speech"],
            "dtype": "float32",
        },
        "choice": None,
        "healing": None,
        "data": {
            "name": "synthetic/test",
            "n_utterances": len(SENTENCES),
            "n_speakers": 1,
            "seconds": 21.4,
            "sha256": "1" * 64,
            "note": "Synthetic data for a test: it shows nothing but the report itself.",
            "left_out": ["audio/broken.flac: test.jsonl:9: silent (synthetic reason)"],
        },
        "n_utterances": len(SENTENCES),
        "seed": 0,
        "baseline": {
            "wer": 14 / 60,
            "wer_ci": (0.16, 0.31),
            "nll": 0.62,
            "substitutions": 9,
            "deletions": 3,
            "insertions": 2,
            "reference_words": 60,
            "rtfx": 6.4,
        },
        "gate": {
            "nll_intact": 0.62,
            "nll_swapped": 3.02 if passed else 0.8,
            "nll_gap_ci": (2.1, 2.7) if passed else (0.05, 0.31),
            "wer_swapped": 1.04 if passed else 0.71,
            "passed": passed,
            "reason": "synthetic: both conditions hold"
            if passed
            else "synthetic: the gap is small",
        },
        "layers": layers,
        "intervals": "Synthetic intervals: paired bootstrap by utterance, 10,000 resamples, "
        "simultaneous 95 % bands (max-t) over blocks.",
        "margin": {"damage": 0.05},
        "versions": {"python": "3.11", "melprobe": "0 (synthetic)"},
        "hardware": {"cpu": "synthetic", "cores": 2, "memory": "8.0 GiB", "gpu": "none"},
        "command": "python -m melprobe.ablate --skip-layers",
        "warnings": ["Synthetic numbers made for a test; no model was run."],
    }


def as_heads(damages: Sequence[float], n_heads: int) -> Results:
    """Every head of each block in turn: `damages` block by block; the last block is unread."""
    results = synthetic_results(damages)
    for place, layer in enumerate(results["layers"]):
        block, head = divmod(place, n_heads)
        layer["layer"] = f"{block}.{head}"
        layer["block_influence"] = layer["angular_distance"] = None
        layer["zero_by_construction"] = block == len(damages) // n_heads - 1
    results["question"] |= {"cut": "no-head", "by": "zero"}
    return results


def sweep_damages() -> list[float]:
    """Thirty blocks in the shape of the first look: three costly ones, a quiet top."""
    rng = np.random.default_rng(1)
    middle = 0.16 * np.exp(-np.arange(24) / 9) + 0.004 * rng.standard_normal(24)
    return [1.12, 0.62, *middle[:9], 0.9, *middle[9:], 0.001, 0.0006, 0.0]


def garble(text: str, damage: float, rng: np.random.Generator) -> str:
    """Change, drop and add words, more of them with more damage; loops when very damaged."""
    heard = [
        rng.choice(WORDS) if rng.random() < 0.7 * damage else word
        for word in text.split()
        if rng.random() > 0.25 * damage
    ]
    return " ".join([*heard, *(["the"] * 30 if damage > 1 else [])])


def write_run(run_dir: Path, results: Results, *, reference: str | None = None) -> Path:
    """Write results.json, rows.parquet and audio/ as `melprobe.ablate` does, for made-up rows."""
    rng = np.random.default_rng(2)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "results.json").write_text(json.dumps(results))
    (run_dir / "audio").mkdir(exist_ok=True)
    conditions = [("intact", "", 0.15), ("swapped", "", 0.98)]
    conditions += [("skip", str(x["layer"]), x["damage"] or 0.3) for x in results["layers"]]
    rows = []
    for i, sentence in enumerate(SENTENCES if reference is None else (reference, *SENTENCES[1:])):
        tone = 0.1 * np.sin(np.arange(24_000) * (0.05 + 0.01 * i)).astype(np.float32)
        soundfile.write(clip_path(run_dir, f"audio/clip-{i}.flac"), tone, 16_000)
        for condition, layer, damage in conditions:
            rows.append(
                Row(
                    run="synthetic",
                    condition=condition,
                    layer=layer,
                    utterance=f"audio/clip-{i}.flac",
                    positions="speech" if condition == "skip" else "",
                    speaker="nobody",
                    nll=4.0 + i + 20 * damage,
                    answer_tokens=10,
                    kl=0.0 if condition == "intact" else 10 * abs(damage),
                    reference=sentence,
                    hypothesis=garble(sentence, damage + 0.12, rng),
                    substitutions=1,
                    deletions=0,
                    insertions=0,
                    reference_words=len(sentence.split()),
                    seconds=0.1,
                )
            )
    with RowStore(run_dir / "rows.sqlite") as store:
        store.add(rows)
        store.export_parquet(run_dir / "rows.parquet")
    return run_dir


def plain(text: str) -> str:
    """With spaces that may break."""
    return text.replace("\N{NO-BREAK SPACE}", " ")


def as_set(damage: float, **changes) -> Results:
    """A study of one set of blocks."""
    results = synthetic_results(sweep_damages())
    results["question"]["layers"] = "3,5-8"
    nothing = {"block_influence": None, "angular_distance": None}
    rng = np.random.default_rng(0)
    results["layers"] = [synthetic_layer("3,5-8", damage, rng, **nothing, **changes)]
    return results
