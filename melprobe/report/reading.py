"""What a run's results say, in words: outcomes and the headline.

Pure functions of `results.json`. A block's outcome compares its whole band of normalised damage
with the margin that was fixed beforehand; nothing is said of blocks when the gate failed.
"""

from collections.abc import Sequence
from typing import Literal

from melprobe.report import terms
from melprobe.report.notation import (
    equals,
    interval,
    label_text,
    listing,
    names,
    number,
    percent,
    places,
    points,
    sentence,
)
from melprobe.report.schema import Layer, Results
from melprobe.report.terms import Cut

Outcome = Literal["costly", "spare", "open", "built-in"]
OUTCOMES: dict[Outcome, str] = {
    "costly": "costs",
    "spare": "spare",
    "open": "undecided",
    "built-in": "zero by construction",
}
EACH_BLOCK = "each block in turn"
EACH_HEAD = "each head in turn"
# Series of sets, and what stands for a set on an axis: {0} is its N, {1} how blocks are cut.
SERIES = {
    "windows": "first of {0} neighbouring blocks {1}",
    "prefixes": "highest of the bottom blocks {1}",
    "suffixes": "lowest of the top blocks {1}",
    "greedy": "number of blocks {1}, the least harmful next",
    "picks": "how the {0} blocks {1} were chosen",
}


def outcome(layer: Layer, margin: float) -> Outcome:
    """The whole band above the margin, the whole band below it, or neither."""
    if layer["zero_by_construction"]:
        return "built-in"
    if layer["damage_ci"] is None:
        return "open"
    low, high = layer["damage_ci"]
    if low > margin:
        return "costly"
    return "spare" if high < margin else "open"


def series(results: Results) -> str:
    """What was cut in turn: EACH_BLOCK, EACH_HEAD or one of SERIES; "" for one set."""
    if results["question"]["cut"] == "no-head":
        return EACH_HEAD
    name, _, _ = results["question"]["layers"].partition(":")
    return name if name in {EACH_BLOCK, *SERIES} else ""


def where_on_axis(results: Results, layer: Layer) -> int:
    """Where a set stands in a figure: see SERIES."""
    if series(results) in {"greedy", "picks"}:
        return results["layers"].index(layer) + 1
    first, _, last = str(layer["layer"]).partition("-")
    return int(last or first) if series(results) == "prefixes" else int(first)


def tick(results: Results, layer: Layer) -> str:
    """What a set is called on the map."""
    picks = series(results) == "picks"
    return label_text(layer["layer"]) if picks else str(where_on_axis(results, layer))


def by_damage(layers: Sequence[Layer]) -> list[Layer]:
    """Most damaging first; ΔNLL orders as damage does, and exists without a gap too."""
    return sorted(layers, key=lambda layer: layer["delta_nll"], reverse=True)


def headline(results: Results) -> str:
    """The answer in one sentence, from the rows of `layers` alone."""
    where, margin = place(results), results["margin"]["damage"]
    gate = results["gate"]
    if not gate["passed"]:
        gap = gate["nll_gap_ci"]
        worth = f"at least {number(gap[0])}" if gap else "an unknown number of"
        given = terms.medium(results)
        return (
            f"No claim about layers is made: {results['checkpoint']['name']} did not pass the "
            f"{given.gate} gate ({given.right} is worth {worth} nat per token, and the word error "
            f"rate with another {given.one} is {percent(gate['wer_swapped'])})."
        )
    if not results["layers"]:
        return f"No block was {terms.cut(results).done}, so there is nothing to say of layers yet."
    if not series(results):
        return _set_headline(results, where, margin)
    if series(results) in {*SERIES, EACH_HEAD}:
        return _series_headline(results)
    if results["question"]["cut"] == "patch":
        return _patch_headline(results["layers"], where, margin)
    groups: dict[Outcome, list[Layer]] = {kind: [] for kind in OUTCOMES}
    for layer in by_damage(results["layers"]):
        groups[outcome(layer, margin)].append(layer)
    counted = groups["costly"] + groups["spare"] + groups["open"]
    if not counted:
        parts = [f"Nothing to find {where}"]
    elif len(groups["open"]) == len(counted):
        parts = [
            f"{sentence(where)} the data don’t decide about {names(counted)}: "
            f"no band lies on one side of the margin {equals(margin)}"
        ]
    else:
        parts = _costly(groups["costly"], where, margin, terms.medium(results).deaf)
        parts += _rest(groups, terms.cut(results), where, margin)
    if groups["built-in"]:
        verb = "cost" if len(groups["built-in"]) > 1 else "costs"
        parts.append(
            f"{names(groups['built-in'])} {verb} nothing by construction, which is no finding"
        )
    return "; ".join(parts) + "."


def healed(results: Results) -> str:
    """What healing brought, in a sentence; "" where there was none."""
    healing = results["healing"]
    if healing is None or not results["gate"]["passed"]:
        return ""
    before, after = results["layers"][0], healing["layer"]
    return (
        f"After {healing['steps']:,} steps of training with {names([before])} skipped, d is "
        f"{number(after['damage'])} {interval(after['damage_ci'])} instead of "
        f"{number(before['damage'])} {interval(before['damage_ci'])}, and the word error rate "
        f"{percent(after['wer'])} instead of {percent(before['wer'])} "
        f"({percent(results['baseline']['wer'])} intact)."
    )


def _patch_headline(layers: Sequence[Layer], where: str, margin: float) -> str:
    """A patch of one block is felt by it and all above: so how far up anything is still read."""
    kinds = [outcome(layer, margin) for layer in layers]
    reading = [i for i, kind in enumerate(kinds) if kind == "costly"]
    top = reading[-1] if reading else -1
    parts = []
    if reading:
        last = layers[top]
        above = "" if top == len(layers) - 1 else " or one above it"
        parts.append(
            f"what stands {where} is still read by {names([last])}{above} "
            f"({equals(number(last['damage']))} {interval(last['damage_ci'])} when what enters it "
            "is exchanged)"
        )
    rest = range(top + 1, len(layers))
    if unread := [layers[i] for i in rest if kinds[i] == "spare"]:
        parts.append(
            f"exchanging what enters {names(unread)} costs less than {equals(margin)}, whole band "
            "included"
        )
    if undecided := [layers[i] for i in rest if kinds[i] == "open"]:
        parts.append(f"{names(undecided)} stay{'s' * (len(undecided) == 1)} undecided")
    return sentence("; ".join(parts)) + "."


def _set_headline(results: Results, where: str, margin: float) -> str:
    layer = results["layers"][0]
    skipped = sentence(f"{terms.cut(results).ing} {names([layer])} {where}")
    if layer["zero_by_construction"]:
        return f"{skipped} costs nothing by construction, which is no finding."
    if layer["damage_ci"] is None:
        return f"{skipped} costs {number(layer['delta_nll'])} nat per token."
    says = {
        "costly": f"more than the margin of {number(margin)}, whole interval included",
        "spare": f"less than the margin of {number(margin)}, whole interval included",
        "open": f"undecided against the margin of {number(margin)}",
    }[outcome(layer, margin)]
    return (
        f"{skipped} takes the model {number(layer['damage'])} {interval(layer['damage_ci'])} of "
        f"the way from intact (0) to {terms.medium(results).deaf} (1), {says}; the word error rate "
        f"moves by {points(layer['delta_wer'])} points to {percent(layer['wer'])}."
    )


def _series_headline(results: Results) -> str:
    """Of runs of blocks and of heads: how many can go; of prefixes and suffixes: how far."""
    where, margin = sentence(place(results)), results["margin"]["damage"]
    counted = [layer for layer in results["layers"] if not layer["zero_by_construction"]]
    built_in = [layer for layer in results["layers"] if layer["zero_by_construction"]]
    after = "."
    if built_in:
        verb = "cost" if len(built_in) > 1 else "costs"
        after = f"; {names(built_in)} {verb} nothing by construction, which is no finding."
    if not counted:
        return f"Nothing to find {place(results)}{after}"
    kinds = [outcome(layer, margin) for layer in counted]
    done = terms.cut(results).done
    if series(results) == "picks":
        ordered = by_damage(counted)[::-1]
        size = results["question"]["layers"].partition(":")[2]
        found = "; ".join(_pick(layer, margin) for layer in ordered)
        return f"{where}, of {size} blocks {done} together, {found}{after}"
    if series(results) in {"windows", EACH_HEAD}:
        ordered = by_damage(counted)
        what = "runs of neighbouring blocks, each {} together"
        if series(results) == EACH_HEAD:
            what = "attention heads, each {} alone"
        ends = ", ".join(
            f"{which} {names([layer])} ({equals(number(layer['damage']))})"
            for layer, which in ((ordered[0], "most"), (ordered[-1], "least"))
        )
        return (
            f"{where}, of {len(counted)} {what.format(done)}, "
            f"{kinds.count('costly')} cost more than the margin of {number(margin)}, "
            f"{kinds.count('spare')} less, and {kinds.count('open')} stay undecided; {ends}{after}"
        )
    free = next((n for n, kind in enumerate(kinds) if kind != "spare"), len(kinds))
    if free:
        gone = names([counted[free - 1]])
        found = f"{where} {gone} can be {done} together for less than {equals(margin)}, whole band "
        found += "included"
    else:
        found = f"{where} the data show no run of blocks that can be {done} together for less than "
        found += equals(margin)
    if free == len(kinds):
        return f"{found}: that is all there are{after}"
    more = names([counted[free]])
    verb = "cost more" if kinds[free] == "costly" else "stay undecided"
    if more.startswith("block "):
        verb = verb.replace(" ", "s ", 1)
    return f"{found}; {more} {verb} ({equals(number(counted[free]['damage']))}){after}"


def _pick(layer: Layer, margin: float) -> str:
    ways = layer["picked_by"]
    return (
        f"{listing(ways)} {'choose' if len(ways) > 1 else 'chooses'} {names([layer])} "
        f"({equals(number(layer['damage']))}, {OUTCOMES[outcome(layer, margin)]})"
    )


def _costly(costly: Sequence[Layer], where: str, margin: float, deaf: str) -> list[str]:
    if not costly:
        return []
    top = costly[:3]
    values = listing([number(layer["damage"]) for layer in top])
    scale = f"{equals(values)} on a scale from 0, intact, to 1, {deaf}"
    if len(costly) > len(top):
        return [
            f"{sentence(where)} {len(costly)} blocks each cost more than the margin of "
            f"{number(margin)}, most of all {names(top, ordered=True)} ({scale})"
        ]
    verb = "costs" if len(costly) == 1 else "cost"
    return [f"{sentence(where)} {names(top, ordered=True)} {verb} most ({scale})"]


def _rest(groups: dict[Outcome, list[Layer]], how: Cut, where: str, margin: float) -> list[str]:
    spare, undecided, parts = groups["spare"], groups["open"], []
    if spare:
        below = f"costs less than {equals(margin)}, whole band included"
        if groups["costly"]:
            each = "each of " if len(spare) > 1 else ""
            parts.append(f"{each}{names(spare)}, {how.done} alone, {below}")
        elif undecided:
            parts.append(f"{sentence(where)} {how.ing} any one of {names(spare)} {below}")
        else:
            parts.append(f"{how.spared.format(where)}: {how.ing} any one of {names(spare)} {below}")
    if undecided:
        verb = "stay" if len(undecided) > 1 else "stays"
        parts.append(f"{names(undecided)} {verb} undecided")
    return parts


def place(results: Results) -> str:
    """ "at speech positions", and whom they are hidden from"""
    asked = results["question"]
    where = f"at {places(asked['positions'])}"
    if asked["readers"]:
        later = f" more than {asked['beyond']:g} s later" if asked["beyond"] else ""
        where += f" (as read from {places(asked['readers'])}{later})"
    return where
