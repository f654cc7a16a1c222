"""What a layer study asks: which cut, at which positions, of which blocks; and what makes no sense.

Everything that can be refused is refused here, before a model has run.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from melprobe.audio.augment import check_snr
from melprobe.corpus.manifest import Utterance
from melprobe.errors import UsageError
from melprobe.hooks.layers import parse_layers
from melprobe.hooks.parts import Part, PartName, Target
from melprobe.hooks.patching import check_patched_positions
from melprobe.hooks.positions import Kind, parse_positions, patches_between
from melprobe.model.prompts import Given, Prompts
from melprobe.report.reading import EACH_BLOCK, SERIES
from melprobe.report.schema import By, CutName

PARTS: dict[CutName, PartName] = {"no-attention": "attention", "no-mlp": "mlp", "no-head": "head"}


class Question(NamedTuple):
    """As it was put on the command line."""

    cut: CutName
    positions: str
    layers: str
    """EACH_BLOCK, one of `reading.SERIES`, picks:N, or a set such as 3,5-8."""
    readers: str = ""
    """Of a knock-out: the positions that are not to read; "" for all others."""
    beyond: float = 0.0
    """Of a knock-out of speech from speech: seconds within which it is read."""

    by: By = ""
    """Of parts of blocks and of patches: what stands in the place of what belongs there."""
    source_noise_db: float = 0.0
    """Of a patch by noise: how far below the clip that is."""
    copy_text: bool = False
    """Whether texts stand in the place of clips, to be copied."""

    def parts(self, target: Target) -> list[Part]:
        """The parts of a target that are replaced; none where blocks are cut as wholes."""
        name = PARTS.get(self.cut)
        return [Part(layer, name, target.head) for layer in target.layers] if name else []

    @property
    def chooses(self) -> bool:
        """Whether the sets are found by measuring; see `melprobe.analysis.choice`."""
        return self.layers == "greedy" or self.layers.startswith("picks:")

    def picks(self, n_blocks: int) -> int:
        """N of picks:N."""
        return _number(self.layers, "picks", 2, n_blocks - 1)

    def targets(self, n_layers: int, n_heads: int, with_lora: Sequence[int]) -> list[Target]:
        """What is cut in turn; where sets are chosen, each block to choose from.

        with_lora: blocks that an adapter changed.
        """
        if self.cut == "without-lora" and not with_lora:
            raise UsageError("--without-lora: this model has no LoRA apart from its weights")
        if self.cut == "no-head":
            if self.layers.partition(":")[0] in SERIES:
                raise UsageError(
                    f"--ablate-heads {self.layers}: heads go one by one; take blocks, such as 3,5-8"
                )
            named = self.layers != EACH_BLOCK
            within = parse_layers(self.layers, n_layers) if named else list(range(n_layers))
            return [Target((layer,), head) for layer in within for head in range(n_heads)]
        sets = _layer_sets(EACH_BLOCK if self.chooses else self.layers, n_layers)
        if self.cut == "without-lora":
            there = [layers for layers in sets if set(layers) <= set(with_lora)]
            named = self.layers != EACH_BLOCK and not self.chooses
            if not there or (named and len(there) < len(sets)):
                raise UsageError(
                    f"--without-lora {self.layers}: this checkpoint has LoRA in blocks "
                    f"{', '.join(map(str, with_lora))} only"
                )
            sets = there
        if self.layers.startswith("picks:"):
            self.picks(len(sets))
        return [Target(tuple(layers)) for layers in sets]

    def check(self, processor: Prompts) -> None:
        """UsageError where the prompt leaves nothing to ask."""
        if self.positions == "prompt" and Kind.PROMPT not in processor.kinds:
            raise UsageError("positions 'prompt': this checkpoint has no words around the audio")
        if self.cut == "knock-out" and not self._hides(processor):
            who = f" --readers {self.readers}" if self.readers else ""
            raise UsageError(
                f"--knockout --positions {self.positions}{who}: nothing that stands behind these "
                "could read them, so there is nothing to hide them from"
            )

    def _hides(self, processor: Prompts) -> bool:
        """Whether any reader stands behind any of the positions."""
        order = [*processor.kinds, Kind.ANSWER, Kind.ANSWER]
        there = set(parse_positions(self.positions).kinds)
        readers = set(parse_positions(self.readers).kinds) if self.readers else set(Kind) - there
        if self.readers and there == readers == {Kind.SPEECH}:
            hidden, reads = parse_positions(self.positions).seconds, parse_positions(self.readers)
            if hidden and reads.seconds and reads.seconds[1] <= hidden[0]:
                return False
        return any(kind in there and readers & set(order[i + 1 :]) for i, kind in enumerate(order))

    def unread_block(self, processor: Prompts, n_layers: int, given: Sequence[Given]) -> str | None:
        """The block whose cut costs nothing by construction: the last, whose output nobody reads.

        None where an answer token is read off one of the positions that the cut changes: those
        that it is made at, or the readers of a knock-out.
        """
        changed = self.readers if self.cut == "knock-out" else self.positions
        if not changed or self.cut in {"bypass", "patch", "without-lora"}:
            return None
        selection = parse_positions(changed)
        before_answer = processor.kinds[-1]
        read = bool({before_answer, Kind.ANSWER} & set(selection.kinds))
        if selection.seconds and before_answer is Kind.SPEECH:
            read = any(
                processor.positions_of(wave) - 1 in _patches(selection.seconds, wave, processor)
                for wave in given
            )
        return None if read else str(n_layers - 1)

    def without_patches(
        self, utterances: Sequence[Utterance], given: Sequence[Given], processor: Prompts
    ) -> list[int]:
        """Places of clips in which nothing sounds in the seconds that are asked about.

        UsageError when that is all of them.
        """
        if self.beyond and len(given):
            patches = max(processor.positions_of(wave) for wave in given)
            if (patches - 1) * processor.speech.seconds <= self.beyond + 1e-4:
                raise UsageError(
                    f"--beyond {self.beyond:g}: no clip has patches so far apart; the longest "
                    f"lasts {max(u.duration for u in utterances):.2f} s"
                )
        seconds = parse_positions(self.positions).seconds
        if seconds is None:
            return []
        silent = [i for i, wave in enumerate(given) if not _patches(seconds, wave, processor)]
        if len(silent) == len(given):
            longest = max(u.duration for u in utterances)
            raise UsageError(
                f"positions {self.positions!r}: no patch of any clip has its middle there; the "
                f"longest clip lasts {longest:.2f} s"
            )
        return silent


def asked(options: Any, cuts: dict[str, CutName]) -> Question:
    """The question in parsed options, of which one names a cut; cuts: option to name of the cut."""
    given = {
        cut: layers
        for option, cut in cuts.items()
        if (layers := getattr(options, option.removeprefix("--").replace("-", "_"))) is not None
    }
    ((cut, layers),) = given.items()
    if cut != "knock-out" and (options.readers is not None or options.beyond):
        raise UsageError("--readers and --beyond go with --knockout")
    usual = "prompt" if options.copy_text else "speech"
    usual = "all" if cut == "without-lora" else usual
    positions = usual if options.positions is None else options.positions
    parse_positions(positions)
    if options.readers is not None:
        parse_positions(options.readers)
    if options.copy_text:
        _check_text(options, positions)
    by, source_noise_db = _by(options.by, cut)
    if cut == "patch":
        check_patched_positions(positions)
    if by == "resample" and parse_positions(positions).kinds != (Kind.SPEECH,):
        raise UsageError(
            f"--by resample --positions {positions}: another clip's answer is none to this one; "
            "take speech positions"
        )
    question = Question(
        cut,
        positions,
        layers,
        options.readers or "",
        options.beyond,
        by,
        source_noise_db,
        options.copy_text,
    )
    speech = question.positions == question.readers == "speech"
    if not 0 <= question.beyond < math.inf or (question.beyond and not speech):
        raise UsageError(
            f"--beyond {question.beyond:g}: give seconds, with --positions speech --readers speech"
        )
    return question


def _check_text(options: Any, positions: str) -> None:
    """UsageError for what can only be asked of clips."""
    for option, value in (("positions", positions), ("readers", options.readers or "all")):
        if parse_positions(value).kinds == (Kind.SPEECH,):
            raise UsageError(
                f"--copy-text --{option} {value}: where text is read there is no speech; take "
                "prompt, answer, text, bos or all"
            )
    for option, asked_for in (
        ("--patch", options.patch is not None),
        ("--by resample", options.by == "resample"),
        ("--beyond", bool(options.beyond)),
        ("--noise", options.noise is not None),
        ("--heal", options.heal is not None),
    ):
        if asked_for:
            raise UsageError(f"--copy-text {option}: this is for clips, and here text is read")


def _by(text: str | None, cut: CutName) -> tuple[By, float]:
    """What `--by` says, and the decibels of `noise:DB`."""
    if cut == "patch":
        name, _, decibels = (text or "resample").partition(":")
        if text in (None, "resample"):
            return "resample", 0.0
        try:
            snr_db = float(decibels)
        except ValueError:
            name = ""
        if name != "noise":
            raise UsageError(f"--patch --by {text}: take resample (another clip) or noise:DB")
        check_snr(snr_db, f"--patch --by {text}")
        return "noise", snr_db
    if cut in PARTS:
        if text in (None, "zero", "mean", "resample"):
            return text or "zero", 0.0  # type: ignore[return-value]
        raise UsageError(f"--by {text}: take zero, mean or resample")
    if text:
        raise UsageError("--by goes with --ablate-attention, -mlp and -heads, and with --patch")
    return "", 0.0


def _patches(seconds: tuple[float, float], wave: Given, processor: Prompts) -> list[int]:
    return patches_between(*seconds, processor.positions_of(wave), processor.speech)


def _layer_sets(text: str, n_layers: int) -> list[list[int]]:
    if text == EACH_BLOCK:
        return [[layer] for layer in range(n_layers)]
    if text == "prefixes":
        return [list(range(n)) for n in range(1, n_layers + 1)]
    if text == "suffixes":
        return [list(range(n_layers - n, n_layers)) for n in range(1, n_layers + 1)]
    if text.startswith("windows:"):
        width = _number(text, "windows", 2, n_layers - 1)
        return [list(range(first, first + width)) for first in range(n_layers - width + 1)]
    return [parse_layers(text, n_layers)]


def _number(text: str, name: str, low: int, high: int) -> int:
    """N of `name:N`."""
    size = text.removeprefix(f"{name}:")
    if not (size.isascii() and size.isdecimal() and low <= int(size) <= high):
        raise UsageError(f"layers {text!r}: take {name}:N with N from {low} to {high}")
    return int(size)
