"""Title, question, captions and alternative texts: what a reader or a screen reader is told.

Like `reading`, pure functions of `results.json`.
"""

from typing import NamedTuple

from melprobe.report import reading, terms
from melprobe.report.notation import (
    equals,
    interval,
    label_text,
    names,
    number,
    percent,
    places,
    points,
)
from melprobe.report.reading import place
from melprobe.report.schema import Results


class Caption(NamedTuple):
    title: str
    text: str
    alt: str


def copies(results: Results) -> bool:
    """Whether text was read and not audio heard."""
    return results["question"]["copy_text"]


def title(results: Results) -> str:
    if reading.series(results) == reading.EACH_HEAD:
        return "Which heads copy text?" if copies(results) else "Which heads listen?"
    if reading.series(results):
        return "Which layers copy text?" if copies(results) else "Which layers listen?"
    return f"Can {names(results['layers'])} be {terms.cut(results).done}?"


EFFECTS = {
    "skip": "what stands there passes by unchanged, can still be read from elsewhere, and stays "
    "skipped in every step of the answer. If the {answer} suffers, what was skipped was needed.",
    "knock-out": "what stands there is worked on as ever, but nothing that stands elsewhere reads "
    "it there, in any step of the answer. If the {answer} suffers, reading there was needed.",
    "bypass": "what stands there passes by unchanged, and nothing that stands elsewhere reads it "
    "there, in any step of the answer. If the {answer} suffers, the block was needed, to work on "
    "what stands there or to read it.",
    "no-attention": "what attention adds to the residual there {instead}. If the {answer} suffers, "
    "that was needed.",
    "no-mlp": "what the MLP adds to the residual there {instead}. If the {answer} suffers, that "
    "was needed.",
    "no-head": "what a head of attention adds to the residual there {instead}. If the {answer} "
    "suffers, that was needed.",
    "patch": "what enters the block there is exchanged for what enters it when the model hears "
    "{instead}. Blocks below have read the right clip. If the {answer} suffers, this block or one "
    "above it still reads what stands there.",
    "without-lora": "it then works there as the base model’s block, as it was before speech "
    "training. If the {answer} suffers, what the training changed there was needed. It does not "
    "say what training without LoRA there would give: other blocks could then have made up for it.",
}
INSTEAD = {
    "": "",
    "zero": "is left out",
    "mean": "gives way to its mean over all that is given, which keeps what it adds to each alike "
    "and takes away what it says of this one",
    "resample": "gives way to what it adds to another clip of like length",
}
SETS = {
    "windows": "each run of {0} neighbouring blocks is {1} in turn",
    "prefixes": "the lowest block is {1}, then the two lowest together, and so on,",
    "suffixes": "the highest block is {1}, then the two highest together, and so on,",
    "greedy": "the block whose loss hurts least is {1}, then with it the next least harmful, and "
    "so on until the margin is passed,",
    "picks": "sets of {0} blocks, chosen in four ways, are {1} in turn",
}
PLACES = {
    "speech": "at the positions that hold sound{}, and there only",
    "text": "at the positions that hold text, prompt and answer, and there only",
    "prompt": "at the positions of the prompt, and there only",
    "answer": "at the positions of the answer, and there only",
    "bos": "at the first position, and there only",
    "all": "at every position, the first one included",
}


TEXT_PLACES = PLACES | {
    "prompt": "at the positions of the prompt, the text among them, and there only",
}


def question(results: Results) -> str:
    """What was asked, for somebody who has not read the design."""
    done = terms.cut(results).done
    name, _, times = results["question"]["positions"].partition(":")
    when = f" from {times.replace('-', ' to ')} s" if times else ""
    series = reading.series(results)
    what = f"each block is {done} in turn"
    if series in SETS:
        size = results["question"]["layers"].partition(":")[2]
        what = SETS[series].format(size, done)
    if series == reading.EACH_HEAD:
        what = f"each attention head{_of_blocks(results)} is {done} in turn"
    if not series:
        who = names(results["layers"])
        what = f"{who} are {done} together" if who.startswith("blocks") else f"{who} is {done}"
    given = terms.medium(results)
    effect = EFFECTS[results["question"]["cut"]].format(
        instead=instead(results), answer=given.answer
    )
    if readers := results["question"]["readers"]:
        who = f"{places(readers)} don’t read"
        effect = effect.replace("nothing that stands elsewhere reads", who)
    if beyond := results["question"]["beyond"]:
        effect = effect.replace("it there", f"it there more than {beyond:g} s later")
    where = TEXT_PLACES if copies(results) else PLACES
    return f"{_task(results)} Here {what} {where[name].format(when)}: {effect}"


def _task(results: Results) -> str:
    """What the model does, in a sentence."""
    checkpoint = results["checkpoint"]
    name, blocks = checkpoint["name"], f"the {checkpoint['n_layers']} blocks of a language model"
    if copies(results):
        return (
            f"{name} is given the words of a clip as text and is to write them once more, with "
            f"{blocks}: the control that tells what serves speech from what serves any text."
        )
    ours = checkpoint["front"] in ("linear", "conv")
    patches = "patches of log-mel spectrogram" if ours else "speech positions"
    return f"{name} reads {checkpoint['token_rate_hz']:.3g} {patches} a second with {blocks}."


def _of_blocks(results: Results) -> str:
    layers = results["question"]["layers"]
    if layers == reading.EACH_BLOCK:
        return ""
    return f" of block{'s' * (not layers.isdecimal())} {label_text(layers)}"


def instead(results: Results) -> str:
    """What stands in the place of what belongs there."""
    asked = results["question"]
    if asked["cut"] != "patch":
        return INSTEAD[asked["by"]]
    if asked["by"] == "resample":
        return "another clip of like length"
    return f"the same clip in noise {asked['source_noise_db']:g} dB below it"


def sample(results: Results) -> str:
    """ "30 utterances of 1 speaker"; without the speakers where the data names none"""
    if copies(results):
        return f"{results['n_utterances']} texts"
    speakers = results["data"]["n_speakers"]
    of = f" of {speakers} speaker{'s' if speakers > 1 else ''}" if speakers else ""
    return f"{results['n_utterances']} utterances{of}"


def damage(results: Results) -> Caption:
    layers, margin = results["layers"], results["margin"]["damage"]
    ing, each = terms.cut(results).ing, reading.series(results) == reading.EACH_BLOCK
    top = ", ".join(
        f"{names([layer])} {number(layer['damage'])}" for layer in reading.by_damage(layers)[:3]
    )
    what, marks = ("one block", "blocks") if each else ("blocks together", "sets of blocks")
    title = "What each block is worth" if each else "What blocks are worth together"
    if each and results["question"]["cut"] == "patch":
        title = "What is still read from each block on"
    deaf = "reads another text" if copies(results) else "hears another clip"
    return Caption(
        title,
        f"Normalised damage d of {ing} {what} {place(results)}: 0 is the intact model, 1 a "
        f"model that {deaf} instead. Below {margin:g}, the shaded margin, the scale is "
        f"linear, above it logarithmic. Lines are simultaneous 95 % bands over all {marks} "
        f"(n = {sample(results)}).{_built_in(results)}",
        f"Damage of {ing} each of {len(layers)} {marks}, with bands. Largest: {top}. "
        f"{reading.headline(results)}",
    )


def heads(results: Results) -> Caption:
    layers, ing = results["layers"], terms.cut(results).ing
    worst = reading.by_damage(layers)[0]
    return Caption(
        "What each head is worth",
        f"Normalised damage d of {ing} one head {place(results)}: the area of a mark goes with d, "
        f"and the largest is {names([worst])} with {equals(worst['damage'] or 0.0)}. "
        f"Colours and shapes go by the simultaneous 95 % bands over all heads, which are in the "
        f"table (n = {sample(results)}).{_built_in(results)}",
        f"Map of {len(layers)} heads by block and head, marks as large as the damage of {ing} the "
        f"head. {reading.headline(results)}",
    )


def errors(results: Results) -> Caption:
    baseline = results["baseline"]
    worst = max(results["layers"], key=lambda layer: layer["wer"])
    marks = "block" if reading.series(results) == reading.EACH_BLOCK else "set of blocks"
    return Caption(
        "What it does to the words",
        "Above: the change in word error rate against the intact model "
        f"({percent(baseline['wer'])} {interval(baseline['wer_ci'], 1, 100)}), "
        "linear within 10 points and logarithmic beyond, with simultaneous 95 % bands; colours and "
        "shapes as in figure 1. Below: what the errors are. Many insertions mean that the answer "
        "ran in a loop "
        f"(n = {sample(results)}, {baseline['reference_words']} reference words).",
        f"Change in word error rate and kinds of errors for each {marks} "
        f"{terms.cut(results).done}. Highest word error "
        f"rate: {percent(worst['wer'])} with {names([worst])}; intact model "
        f"{percent(baseline['wer'])}.",
    )


def similarity(results: Results) -> Caption:
    least = min(results["layers"], key=lambda layer: layer["block_influence"] or 0.0)
    where = places(results["question"]["positions"])
    return Caption(
        "Would similarity have told?",
        "Two scores that need no cutting, each against the measured damage: block influence "
        "(1 − the mean cosine between what enters and what leaves the block) and angular distance "
        f"(the same angle in half turns), both at {where} of the intact model. Only the "
        "measured damage is evidence. The four most damaging blocks are numbered "
        f"(n = {sample(results)}).",
        "Two scatter plots of damage against block influence and against angular distance, one "
        f"mark for each block. The lowest block influence is that of block {least['layer']}, whose "
        f"damage is {number(least['damage'])}.",
    )


def scale(results: Results) -> Caption:
    layer, baseline = results["layers"][0], results["baseline"]
    who, cut, given = names([layer]), terms.cut(results), terms.medium(results)
    other = f"another {given.one}"
    return Caption(
        f"Between intact and {given.deaf}",
        f"Above: normalised damage d of {cut.ing} {who} {place(results)}, with its 95 % interval; "
        f"the margin of {results['margin']['damage']:g} is shaded. Below: what the errors are, "
        f"beside the total with {other} (outlined) "
        f"(n = {sample(results)}, {baseline['reference_words']} reference words).",
        f"Damage of {cut.ing} {who}: {number(layer['damage'])} {interval(layer['damage_ci'])} "
        f"between intact, 0, and {given.deaf}, 1. Word error rate {percent(baseline['wer'])} "
        f"intact, {percent(layer['wer'])} ({points(layer['delta_wer'])} points) with {who} "
        f"{cut.done}, {percent(results['gate']['wer_swapped'])} with {other}.",
    )


def _built_in(results: Results) -> str:
    layers = [layer for layer in results["layers"] if layer["zero_by_construction"]]
    if not layers:
        return ""
    what, verb = ("circle is", "writes") if len(layers) == 1 else ("circles are", "write")
    return (
        f" The small open {what} zero by construction: what {names(layers)} {verb} there is "
        "read by nobody."
    )
