"""What cuts are called, and what a model was given, in the words of reports."""

from typing import NamedTuple

from melprobe.report.schema import Results


class Cut(NamedTuple):
    """What is done to a block at some positions; see `melprobe.hooks.cuts`."""

    verb: str
    ing: str
    done: str
    spared: str
    """What isn't needed where the cut costs nothing."""


CUTS = {
    "skip": Cut("skip", "skipping", "skipped", "No single block is needed {}"),
    "knock-out": Cut(
        "knock out", "knocking out", "knocked out", "No single block’s reading is needed {}"
    ),
    "bypass": Cut("bypass", "bypassing", "bypassed", "No single block is needed {}"),
    "patch": Cut("patch", "patching", "patched", "No block still reads what stands {}"),
    "without-lora": Cut(
        "no LoRA in",
        "switching LoRA off in",
        "run without LoRA",
        "No single block’s LoRA is needed {}",
    ),
}


PARTS = {"no-attention": "attention", "no-mlp": "MLP"}
# Of a part, which takes the place of {0}.
BY = {
    "zero": Cut(
        "no {0} in",
        "leaving out the {0} of",
        "run without {0}",
        "No single block’s {0} is needed {{}}",
    ),
    "mean": Cut(
        "mean {0} in",
        "putting its mean in place of the {0} of",
        "run on mean {0}",
        "No single block’s {0} is needed {{}} beyond its mean",
    ),
    "resample": Cut(
        "another clip’s {0} in",
        "putting another clip’s in place of the {0} of",
        "run on another clip’s {0}",
        "No single block’s {0} is needed {{}} as it is for this clip",
    ),
}


HEADS = {
    "zero": Cut("no head", "leaving out", "left out", "No single head is needed {}"),
    "mean": Cut(
        "mean of head",
        "putting its mean in place of",
        "replaced by its mean",
        "No single head is needed {} beyond its mean",
    ),
    "resample": Cut(
        "another clip’s head",
        "putting another clip’s in place of",
        "replaced by another clip’s",
        "No single head is needed {} as it is for this clip",
    ),
}


class Medium(NamedTuple):
    """What the model was given, as a report speaks of it."""

    one: str
    right: str
    """Being given what belongs to the answer."""
    deaf: str
    """What a model is like that was given another one."""
    answer: str
    gate: str
    does: str
    """What the gate asks of the model."""
    passed: str
    failed: str


AUDIO = Medium(
    one="clip",
    right="hearing the right clip",
    deaf="deaf",
    answer="transcript",
    gate="listening",
    does="listen",
    passed="The model listens: its answers depend on the clip that it hears.",
    failed="A deaf model makes every layer look dispensable, because its text prior answers.",
)
TEXT = Medium(
    one="text",
    right="reading the right text",
    deaf="reading another text",
    answer="copy",
    gate="reading",
    does="copy",
    passed="The model copies: its answers depend on the text that it reads.",
    failed="Where answers don’t depend on the text that is read, every layer looks dispensable.",
)


def medium(results: Results) -> Medium:
    return TEXT if results["question"]["copy_text"] else AUDIO


def cut(results: Results) -> Cut:
    question = results["question"]
    if question["cut"] == "no-head":
        return HEADS[question["by"]]
    if part := PARTS.get(question["cut"]):
        return Cut(*(text.format(part) for text in BY[question["by"]]))
    return CUTS[question["cut"]]
