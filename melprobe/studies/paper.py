"""The paper's experiments as arms: what each changes in a recipe, and what the paper reports.

Figures are those of arXiv 2606.10231, third version, as a public reading note has them: word error
rates in per cent on eight English sets, at 64,000 hours and 3.8 billion parameters. They are not
ours to equal at another size and on other speech. What can be compared is the order.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from melprobe.audio.patches import patch_rate
from melprobe.hooks.layers import format_layers
from melprobe.studies.sizes import Size


class Arm(NamedTuple):
    """One recipe of a study."""

    name: str
    label: str
    changes: dict[str, Any]
    """of the size's recipe, by dotted field"""
    paper: float | None = None
    """word error rate that the paper reports, per cent"""
    start: str = ""
    """an arm before it whose checkpoint, of the same seed, it needs"""
    start_field: str = "model.lora.init"
    """of its recipe, that names this checkpoint: its adapter is taken over, or it is the teacher"""
    without_lora: tuple[int, ...] = ()
    """blocks in which the adapter is switched off when it is tested; nothing is trained for it"""


class Study(NamedTuple):
    """A table of the paper."""

    name: str
    title: str
    table: str
    arms: tuple[Arm, ...]
    order: tuple[tuple[str, str], ...]
    """pairs of arms, the one first that the paper, or who reports it, has the lower error of"""
    lengths: tuple[tuple[float, float], ...] = ()
    """seconds of clips that are scored apart; all together when there are none"""
    note: str = ""
    """what a reader must know beside the table"""
    whose: str = "the paper's order"
    """what that order is"""


def pair(size: Size) -> Study:
    """The matched pair that findings about layers rest on: one base, data, schedule, adapter."""
    return Study(
        "pair",
        "The matched pair: how well does each arm hear?",
        "",
        (
            Arm("encoder", "pretrained encoder", size.twin),
            Arm("none", "no encoder", size.bare),
        ),
        (("encoder", "none"),),
        note="Nothing of one arm went into the other: both began with the same base and with "
        "random fronts and adapters.",
    )


def initialisation(size: Size) -> Study:
    random_encoder = {**size.twin, **size.random_encoder}
    has_heard, of = _trained_lora(size, "pretrained-random")
    arms = (
        Arm("pretrained-random", "pretrained encoder, random LoRA", size.twin),
        Arm(
            "pretrained-pretrained",
            "pretrained encoder, pretrained LoRA",
            {**size.twin, **has_heard},
            5.61,
            of,
        ),
        Arm("random-random", "random encoder, random LoRA", random_encoder),
        Arm(
            "random-pretrained",
            "random encoder, pretrained LoRA",
            {**random_encoder, **has_heard},
            6.97,
            of,
        ),
        Arm(
            "none-pretrained",
            "no encoder, pretrained LoRA",
            {**size.bare, **has_heard},
            7.12,
            of,
        ),
        Arm("none-random", "no encoder, random LoRA", size.bare, 7.44),
    )
    return Study(
        "initialisation",
        "What is a pretrained encoder worth, and a pretrained LoRA?",
        "II",
        arms,
        _by_paper(arms),
        note="A pretrained LoRA is that of the first arm after its training, which is where the "
        "paper's came from in kind: an encoder-initialised model of the same base. The pretrained "
        "encoder stays as it was trained; the random one learns.",
    )


def data_scale(size: Size) -> Study:
    scales = {"1/16": 1 / 16, "1/4": 1 / 4, "1": 1.0, "10 x synthetic": None}
    arms, pairs = [], []
    for scale, share in scales.items():
        train = size.more if share is None else size.shared(share)
        place = scale.replace("/", "-").replace(" ", "")
        for name, label, front in (
            ("encoder", "pretrained encoder", size.twin),
            ("none", "no encoder", size.bare),
        ):
            changes = {**front, "data.train": train}
            arms.append(Arm(f"{name}-{place}", f"{label}, {scale} of the data", changes))
        pairs.append((f"encoder-{place}", f"none-{place}"))
    return Study(
        "data-scale",
        "Does the gap to the encoder close with more data?",
        "III",
        tuple(arms),
        tuple(pairs),
        note="The paper reports the gap alone, relative to the encoder-initialised model: 11.3 % "
        "with limited data, 3.8 % with ten times as much.",
    )


def token_rate(size: Size) -> Study:
    rates = {1: 6.58, 2: 6.71, 4: 7.21, 8: 7.12, 16: 8.02}
    arms = tuple(
        Arm(
            f"{front}-{frames}",
            f"{100 / frames:g} Hz, {front}",
            {"model.front": front, "model.frames_per_patch": frames},
            paper if front == "conv" else None,
        )
        for front in ("conv", "linear")
        for frames, paper in rates.items()
    )
    order = _by_paper(arms[: len(rates)])
    order += tuple((a.replace("conv", "linear"), b.replace("conv", "linear")) for a, b in order)
    return Study(
        "token-rate",
        "How many positions a second does listening need?",
        "IV",
        arms,
        order,
        note="The paper's front is convolutional down to 50 Hz and bare at 100; its figures stand "
        "beside ours of that kind.",
    )


def freezing(size: Size) -> Study:
    """The paper freezes 4, 8, 12 and 16 of 32 blocks from the top."""
    n = size.n_layers
    tops = {eighths: range(n - max(1, round(n * eighths / 8)), n) for eighths in (1, 2, 3, 4)}
    paper = {1: 7.40, 2: 7.43, 3: 7.77, 4: 7.94}
    has_heard, of = _trained_lora(size, "all")
    started = {**size.bare, **has_heard}
    arms = [
        Arm("all", "LoRA on all blocks", size.bare, 7.12),
        Arm("all-started", "LoRA on all blocks, from a trained one", started, None, of),
    ]
    for eighths, top in tops.items():
        blocks = format_layers(top)
        removed = {**size.bare, "model.lora.layers": list(range(top[0]))}
        held = {**started, "model.lora.held": list(top)}
        arms += [
            Arm(f"removed-{eighths}", f"none on {blocks}", removed, paper[eighths]),
            Arm(f"held-{eighths}", f"held on {blocks} at a trained one", held, None, of),
            Arm(
                f"off-{eighths}",
                f"trained on all, switched off on {blocks}",
                size.bare,
                without_lora=tuple(top),
            ),
        ]
    return Study(
        "freezing",
        "Which blocks must adapt to speech?",
        "V",
        tuple(arms),
        _by_paper(arms),
        note="Whether the paper's frozen LoRA is removed or held at its start is not known: from a "
        "random one, which changes nothing at first, the two are the same. Switching a trained "
        "LoRA off retrains nothing, and is another question.",
    )


def masking(size: Size) -> Study:
    long = {**size.bare, **size.long}
    frames = size.with_changes(long, Path("long"), 0).model.frames_per_patch
    most = round(max(end for _, end in size.lengths) * patch_rate(frames))
    reach = "" if most > 500 else f" Clips here take up to {most} positions, so this can't be seen."
    ahead = {**long, "model.audio_attention": "bidirectional"}
    arms = (
        Arm("causal", "causal", long),
        Arm("bidirectional", "bidirectional in the audio", ahead),
    )
    return Study(
        "masking",
        "Do patches have to see what follows them, and the more so the longer the clip?",
        "",
        arms,
        (("bidirectional", "causal"),),
        size.lengths,
        note="Users of Gemma 4, which has no audio encoder either, report that hearing collapses "
        "past 450 to 500 positions and that attention in both directions inside the audio mends "
        f"it.{reach}",
        whose="what is reported",
    )


def alignment(size: Size) -> Study:
    """Not in the paper: what helps a decoder to find out which patch each word came from."""
    middle = size.n_layers // 2
    stages: list[dict[str, Any]] = [
        {**stage, "steps": int(stage["steps"])} for stage in size.recipe["data"]["stages"]
    ]
    steps = sum(stage["steps"] for stage in stages)
    first = {**stages[0], "steps": max(1, stages[0]["steps"] // 10)}
    rest = {**stages[0], "steps": stages[0]["steps"] - first["steps"]}
    front_first = {"data.stages": [{**first, "train": "front"}, rest, *stages[1:]]}
    all_at_once = {"data.stages": [{**stages[-1], "steps": steps}]}
    arms = (
        Arm("alone", "next tokens alone, short clips first", size.bare),
        Arm("at-once", "clips of all lengths from the start", {**size.bare, **all_at_once}),
        Arm("front-first", "the front alone at first", {**size.bare, **front_first}),
        Arm(
            "ctc",
            f"CTC after block {middle}",
            {**size.bare, "ctc": {"layer": middle, "steps": steps}},
        ),
        Arm("twin", "the twin", size.twin),
        Arm(
            "distilled",
            f"the twin's residuals after block {middle}",
            {**size.bare, "distil.layer": middle, "distil.steps": steps},
            None,
            "twin",
            "distil.teacher",
        ),
        Arm("times", "phones and tokens at known times", {**size.bare, **size.timed}),
    )
    helped = ("front-first", "ctc", "distilled", "times")
    return Study(
        "alignment",
        "What helps a decoder without an encoder to align words with sounds?",
        "",
        arms,
        (("alone", "at-once"), *((arm, "alone") for arm in helped)),
        note="The last arm spends some of its steps on the lower blocks alone.",
        whose="the order expected",
    )


STUDIES: dict[str, Callable[[Size], Study]] = {
    "pair": pair,
    "initialisation": initialisation,
    "data-scale": data_scale,
    "token-rate": token_rate,
    "freezing": freezing,
    "masking": masking,
    "alignment": alignment,
}


def _trained_lora(size: Size, arm: str) -> tuple[dict[str, Any], str]:
    """Changes that take a trained adapter, and the arm it is taken from if it is an arm's."""
    if size.pretrained_lora:
        return {"model.lora.init": size.pretrained_lora}, ""
    return {}, arm


def _by_paper(arms: Sequence[Arm]) -> tuple[tuple[str, str], ...]:
    """Neighbours in the paper's order, of those that it reports."""
    reported = sorted((a for a in arms if a.paper is not None), key=lambda arm: arm.paper or 0.0)
    return tuple((a.name, b.name) for a, b in pairwise(reported))
