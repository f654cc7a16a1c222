"""A layer-skip study by us and by others: the same model, clips, dtype and process.

Each contestant has the batch size that is fastest for it on the first blocks. The others' features
are made before the clock starts, ours are not. Times are worth something only if the transcripts
agree: where two differ, the gap between the two best tokens at that place is held against the noise
of batching.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import torch

from melprobe.bench.contestants import PACKAGES, RIVALS, Contestant, Found, Study, ours
from melprobe.bench.peak import held_mb
from melprobe.errors import UsageError
from melprobe.listener import Listener
from melprobe.model.config import token_ids_only

BATCH_SIZES = (10, 30)
TRIAL_BLOCKS = 2


@torch.no_grad()
def bench_sweep(
    study: Study, rivals: Sequence[str], tell: Callable[[str], None]
) -> dict[str, object]:
    """Seconds of each contestant, ratios, and whether all say the same.

    `identical` is None where no transcripts were compared. UsageError for a rival that is not
    installed.

    tell: hears one line for each contestant that is done.
    """
    for name in rivals:
        package = PACKAGES.get(name)
        if package and not find_spec(package):
            how = f"pip install {package.replace('_', '-')}"
            raise UsageError(f"--rivals {name}: `{how}`, or leave it out")
    with _only_token_ids(study.listener):
        seconds, sizes, found = {}, {}, {}
        contestants = {"ours": ours, **{name: RIVALS[name] for name in rivals}}
        for name, contestant in contestants.items():
            size = _best_size(study, contestant)
            start = time.perf_counter()
            found[name] = contestant(study, study.batches(size))
            _wait(study)
            seconds[name], sizes[name] = time.perf_counter() - start, size
            if name == "ours":
                peak = _peak_mb(study)
            tell(f"{name}: {seconds[name]:.1f} s in batches of {size}")
        parts = _parts(study, sizes["ours"], seconds["ours"]) if study.max_new_tokens else {}
        differing: list[tuple[str, int, int]] = [
            (name, *key)
            for name in rivals
            for key, answer in found["ours"].answers.items()
            if study.max_new_tokens and found[name].answers[key] != answer
        ]
        gaps = [_gap(study, found["ours"], found[name], *place) for name, *place in differing]
        noise = _batch_noise(study) if differing else 0.0
    nll_error = max(
        (
            abs(found[name].nll[key] - nll)
            for name in rivals
            for key, nll in found["ours"].nll.items()
        ),
        default=0.0,
    )
    return {
        "seconds": round(seconds["ours"], 2),
        **{f"ratio_{name}": round(seconds[name] / seconds["ours"], 2) for name in rivals},
        **parts,
        "identical": not differing if rivals and study.max_new_tokens else None,
        "differing_rows": len(differing),
        "largest_gap": round(max(gaps, default=0.0), 4),
        "batch_noise": round(noise, 4),
        "differences_are_noise": max(gaps, default=0.0) <= noise,
        "max_nll_error": round(nll_error, 5),
        "rows": len(found["ours"].nll),
        "batch_sizes": sizes,
        "peak_mb": peak,
        "dtype": str(study.listener.model.dtype).removeprefix("torch."),
        "device": _device(study),
        "threads": torch.get_num_threads(),
    }


def _best_size(study: Study, contestant: Contestant) -> int:
    """The fastest batch size on a few blocks, which also warms everything up."""
    trial = replace(study, layers=study.layers[:TRIAL_BLOCKS])
    times = {}
    for size in sorted({min(size, len(study.waves)) for size in BATCH_SIZES}):
        contestant(trial, trial.batches(size)[:1])  # the first call of a shape costs more
        start = time.perf_counter()
        contestant(trial, trial.batches(size))
        _wait(study)
        times[size] = time.perf_counter() - start
    return min(times, key=lambda size: times[size])


def _parts(study: Study, size: int, whole: float) -> dict[str, float]:
    """What verification alone brings: the time without prefix reuse, over the time with it."""
    start = time.perf_counter()
    ours(study, study.batches(size), reuse=False)
    _wait(study)
    return {"ratio_without_reuse": round((time.perf_counter() - start) / whole, 2)}


def _gap(study: Study, one: Found, other: Found, layer: int, clip: int) -> float:
    """Between the two best next tokens where two transcripts part, in logits."""
    a, b = (found.answers[layer, clip] for found in (one, other))
    same = next(
        (i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]),
        min(len(a), len(b)),
    )
    _, prompts = study.inputs([clip])
    agreed = torch.tensor([a[:same]], dtype=torch.long, device=prompts["input_ids"].device)
    ids = torch.cat([prompts["input_ids"], agreed], 1)
    inputs = dict(prompts) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with study.listener.skip({layer}):
        best = study.listener.model(**inputs, logits_to_keep=1).logits[0, -1].float().topk(2).values
    return (best[0] - best[1]).item()


def _batch_noise(study: Study) -> float:
    """How far a clip's logits move when others are scored beside it."""
    batch = study.batches(min(max(BATCH_SIZES), len(study.waves)))[0]
    together = study.listener.model(**study.inputs(batch)[0]).logits.float()
    alone = [study.listener.model(**study.inputs([clip])[0]).logits.float() for clip in batch]
    return (together - torch.cat(alone)).abs().max().item()


@contextmanager
def _only_token_ids(listener: Listener) -> Iterator[None]:
    """`generate` as our own greedy decoding has it: without a base's penalties and sampling."""
    kept = listener.model.generation_config
    listener.model.generation_config = token_ids_only(kept)
    try:
        yield
    finally:
        listener.model.generation_config = kept


def _wait(study: Study) -> None:
    if study.listener.model.device.type == "cuda":
        torch.cuda.synchronize()


def _peak_mb(study: Study) -> int:
    """Until now: on a GPU what torch held at most, else the whole process, loading included."""
    if study.listener.model.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e6)
    return held_mb()


def _device(study: Study) -> str:
    device = study.listener.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
