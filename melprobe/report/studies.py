"""A study's table and its sentence, from its `results.json` alone."""

from collections.abc import Sequence
from typing import Any

from melprobe.analysis.gate import GATE_NAT, GATE_WER
from melprobe.report.notation import listing

Found = dict[str, Any]


def markdown(results: Found) -> str:
    """The whole report of a study."""
    lines = [f"# {results['title']}", ""]
    lines += [f"**{sentence(results)}**", ""]
    lines += [_head(results), "|---|" + "---:|" * (4 + bool(results["table"]))]
    lines += [_row(arm, bool(results["table"])) for arm in results["arms"]]
    lines += [
        "",
        f"{_how(results)} {results['note']}".rstrip(),
        "",
        "| pair | difference in points | order |",
        "|---|---:|---|",
    ]
    lines += [_pair(pair, results) for pair in results["pairs"]]
    if any(pair["difference_ci"] for pair in results["pairs"]):
        level = 100 * (1 - (1 - results["confidence_of_pairs"]) * max(1, len(results["pairs"])))
        lines += ["", f"The intervals of all pairs hold together at {level:.0f} %."]
    lines += [""]
    lines += [f"Made by `{results['command']}` on {results['hardware']['cpu']}."]
    return "\n".join(lines) + "\n"


def _how(results: Found) -> str:
    """What the table's columns are."""
    test, seeds = results["test"], results["seeds"]
    table = f" (the paper's Table {results['table']})" if results["table"] else ""
    runs = "of one training run each, which has no interval"
    if seeds > 1:
        unit = results["unit"]
        runs = f"mean of {seeds} training runs with their 95 % interval over runs and {unit}s"
    apart = any(arm["seconds"] for arm in results["arms"])
    hear = "and how many runs hear, on clips of all lengths"
    if not apart:
        hear = "that of each run; and how many runs hear"
    return (
        f"Word error rates{table} of {test['name']}, {test['clips']} clips of {test['speakers']} "
        f"speaker{'s' * (test['speakers'] != 1)}: {runs}; {hear} "
        f"(the right clip is worth more than {GATE_NAT} nat per token, and WER on another is above "
        f"{100 * GATE_WER:.0f} %). Of two arms that don't hear no order is said. {_steps(results)}"
    )


def _steps(results: Found) -> str:
    found = {arm["steps"] for arm in results["arms"]}
    told = f"They had {min(found):,} to {max(found):,} steps"
    if len(found) == 1:
        told = "All had as many steps"
    before = any(arm["took_over"] for arm in results["arms"])
    return f"{told}{', besides those of an adapter that was taken over' * before}."


def sentence(results: Found) -> str:
    """Whether our order is the paper's: only what intervals separate is said."""
    pairs = results["pairs"]
    whose = results["whose"]
    against = [pair for pair in pairs if pair["verdict"] == "disagrees"]
    for_it = [pair for pair in pairs if pair["verdict"] == "agrees"]
    if len(for_it) == len(pairs):
        which = f", in all {len(pairs)} pairs" if len(pairs) > 1 else ""
        return f"Agrees with {whose}{which}."
    if against:
        named = listing([_names(pair, results) for pair in against])
        verb = "is" if len(against) == 1 else "are"
        return f"Disagrees with {whose}: {named} {verb} the other way round."
    if not for_it:
        return f"Not resolved: no pair is told apart, of {len(pairs)}."
    named = listing([_names(pair, results) for pair in for_it])
    return (
        f"Not resolved as a whole: {len(for_it)} of {len(pairs)} pairs agree with {whose} "
        f"({named}), the others are not told apart."
    )


def _head(results: Found) -> str:
    paper = " the paper's WER % |" if results["table"] else ""
    return f"| arm | WER % |{paper} of each run | hear | training |"


def _row(arm: Found, paper: bool) -> str:
    cells = [_label(arm), _rate(arm["wer"], arm["wer_ci"])]
    if paper:
        cells.append("" if arm["paper_wer"] is None else f"{100 * arm['paper_wer']:.2f}")
    of_seeds = arm["wer_of_seeds"]
    cells.append("" if of_seeds is None else ", ".join(f"{100 * wer:.1f}" for wer in of_seeds))
    gates = [gate["passed"] for gate in arm["gates"]]
    cells.append(f"{sum(gates)} of {len(gates)}")
    seconds = arm["training_seconds"]
    cells.append("" if seconds is None else f"{seconds / 60:.1f} min")
    return f"| {' | '.join(cells)} |"


def _pair(pair: Found, results: Found) -> str:
    low_high = pair["difference_ci"]
    limits = f" [{100 * low_high[0]:.1f}, {100 * low_high[1]:.1f}]" if low_high else ""
    return (
        f"| {_names(pair, results)} | {100 * pair['difference']:.1f}{limits} | {pair['verdict']} |"
    )


def _names(pair: Found, results: Found) -> str:
    label_of = {arm["arm"]: arm["label"] for arm in results["arms"]}
    span = f", {_span(pair['seconds'])}" if pair["seconds"] else ""
    return f"“{label_of[pair['lower']]}” below “{label_of[pair['higher']]}”{span}"


def _label(arm: Found) -> str:
    return f"{arm['label']}, {_span(arm['seconds'])}" if arm["seconds"] else arm["label"]


def _span(seconds: Sequence[float]) -> str:
    return f"clips of {seconds[0]:g} to {seconds[1]:g} s"


def _rate(value: float, limits: Sequence[float] | None) -> str:
    ci = f" [{100 * limits[0]:.1f}, {100 * limits[1]:.1f}]" if limits else ""
    return f"{100 * value:.1f}{ci}"
