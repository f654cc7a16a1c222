"""What a finished layer study writes down: `results.json`, from its rows and what it ran on."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from melprobe.analysis.choice import Chosen
from melprobe.analysis.damage import score_layers
from melprobe.analysis.study import LayerStudy
from melprobe.audio.load import SAMPLE_RATE
from melprobe.hooks.anatomy import anatomy
from melprobe.listener import Listener
from melprobe.model.checkpoint import weights_file
from melprobe.report.notation import listing
from melprobe.report.schema import SCHEMA
from melprobe.store import provenance
from melprobe.wheels import file_sha256

ENOUGH_FOR_WER = 120  # simulated: LOG.md, "Intervals"


def layer_findings(
    rows: pd.DataFrame,
    study: LayerStudy,
    chosen: Chosen | None,
    *,
    checkpoint: Mapping[str, Any],
    data: Mapping[str, Any],
    unread: str | None,
    healing: Mapping[str, Any] | None,
    seed: int,
    words: Sequence[str],
) -> dict[str, Any]:
    """All of `results.json`; see `melprobe.report.schema`.

    checkpoint, data: as described below; unread: see `score_layers`; words: of the command line.
    """
    question, n = study.question, len(study.utterances)
    labels = [target.label for target in study.targets]
    read = question.copy_text
    scores = score_layers(rows, question.cut, labels, question.positions, unread, seed, read)
    ways = chosen.ways if chosen else {}
    for layer, label in zip(scores["layers"], labels, strict=True):
        layer["picked_by"] = ways.get(label, [])
    if healing:
        healed = score_layers(rows, "healed", labels, question.positions, unread, seed)["layers"][0]
        healing = {**healing, "layer": healed | {"picked_by": []}}
    seconds = rows[rows.condition == "intact"].seconds.sum()
    scores["baseline"]["rtfx"] = data["seconds"] and data["seconds"] / seconds
    command = ["python -m melprobe.ablate", *map(shlex.quote, words)]
    return {
        "schema": SCHEMA,
        "run": study.run,
        "question": question._asdict(),
        "checkpoint": checkpoint,
        "data": data,
        "choice": chosen
        and {
            "n_utterances": chosen.n_clips,
            "sets_tried": chosen.n_tried,
            "not_offered": chosen.free,
        },
        "healing": healing,
        "n_utterances": n,
        **scores,
        **provenance(seed=seed, command=command),
        "warnings": warnings(n, checkpoint["targets_after"], read),
    }


def warnings(n: int, targets: Sequence[int], read: bool) -> list[str]:
    """What a reader must know beside the figures; read: texts, in the place of clips."""
    found = []
    if targets and not read:
        blocks = f"block{'s' * (len(targets) > 1)} {listing([str(b) for b in targets])}"
        found.append(
            f"Training read phones or words off the speech positions right after {blocks}, which "
            "draws hearing down to there. A profile that ends about there was asked for in "
            "training; it does not say where a model without such targets would listen."
        )
    if n < ENOUGH_FOR_WER:
        found.append(
            f"With {n} {'texts' if read else 'utterances'} the bands on ΔWER hold less often than "
            "95 %, because few of them change their words: claims rest on ΔNLL."
        )
    return found


def checkpoint_name(folder: Path) -> str:
    """The folder's name; a run's `best`, `last` and `at-STEP` say whose they are."""
    folder = folder.resolve()
    of_run = folder.name in {"best", "last"} or folder.name.startswith("at-")
    return f"{folder.parent.name}-{folder.name}" if of_run else folder.name


def describe_checkpoint(folder: Path, listener: Listener) -> dict[str, Any]:
    data = folder / "data.json"
    manifests = json.loads(data.read_text())["manifests"] if data.exists() else []
    config = listener.model.config
    return {
        "name": checkpoint_name(folder),
        "sha256": file_sha256(weights_file(folder)),
        "base": config.base,
        "front": config.audio_front,
        "token_rate_hz": anatomy(listener.model).rate,
        "n_layers": listener.n_layers,
        "trained_on": list(dict.fromkeys(corpus["manifest"] for corpus in manifests)),
        "targets_after": targets_after(folder),
        "dtype": str(listener.model.dtype).removeprefix("torch."),
    }


def describe_other(name: str, fingerprint: str, listener: Listener) -> dict[str, Any]:
    """Of a model that was not trained here."""
    return {
        "name": name.rstrip("/").rpartition("/")[2],
        "sha256": fingerprint,
        "base": type(listener.model).__name__,
        "front": listener.model.config.model_type,
        "token_rate_hz": None if math.isnan(rate := anatomy(listener.model).rate) else rate,
        "n_layers": listener.n_layers,
        "trained_on": [],
        "targets_after": [],
        "dtype": str(listener.model.dtype).removeprefix("torch."),
    }


def targets_after(folder: Path) -> list[int]:
    """Blocks that training gave targets of their own, by all recipes that lie with a checkpoint."""
    pruned = folder / "prune.json"
    blocks: set[int] = set(
        json.loads(pruned.read_text())["targets_after"] if pruned.exists() else ()
    )
    for path in folder.glob("recipe*.json"):
        recipe = json.loads(path.read_text())
        if frames := recipe.get("frames"):
            blocks |= {frames["phones_after"], frames["tokens_after"]}
        if ctc := recipe.get("ctc"):
            blocks.add(ctc["layer"])
    return sorted(blocks)


def describe_data(
    name: str,
    manifest: Path,
    study: LayerStudy,
    left_out: list[str],
    noise_db: float | None,
    lengths: str | None,
) -> dict[str, Any]:
    n, read = len(study.utterances), study.question.copy_text
    speakers = {u.speaker for u in study.utterances if u.speaker and not read}
    if read:
        scope = "clips, read as text: it can show how this model copies words like these"
    elif len(speakers) == 1:
        scope = "one speaker: it can show what this model does with this voice, not with others"
    elif len(speakers) < 10:
        scope = f"{len(speakers) or 'unnamed'} speakers: too few to speak of speakers in general"
    else:
        scope = f"{len(speakers)} speakers, resampled whole: it speaks of speakers like these"
    note = f"{n} {'transcripts' if read else 'utterances'} of {scope}."
    if lengths:
        name += f", {lengths} s"
        note += f" Only clips of {lengths} s were taken."
    if noise_db is not None:
        name += f", noise at {noise_db:g} dB"
        note += (
            f" Noise of a random colour, from white to brown, was added {noise_db:g} dB below each "
            "clip, in all conditions."
        )
    return {
        "name": name,
        "n_utterances": n,
        "n_speakers": len(speakers),
        "seconds": None if read else round(sum(map(len, study.given)) / SAMPLE_RATE, 2),
        "sha256": file_sha256(manifest),
        "note": note,
        "left_out": left_out,
    }
