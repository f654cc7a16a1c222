"""Who takes part in the sweep benchmark: our replay, plain hooks, nnsight and TransformerLens.

Each gives, for every block skipped alone at speech positions, the likelihood of every reference and
every greedy transcript. None knows that it is timed.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature

from melprobe.corpus.text import plain_text
from melprobe.hooks.replay import Variant
from melprobe.listener import Listener
from melprobe.model.inference import score_tokens


class Found(NamedTuple):
    """Results by (block, clip)."""

    nll: dict[tuple[int, int], float]
    answers: dict[tuple[int, int], list[int]]


@dataclass(frozen=True)
class Study:
    """What is to be found out."""

    listener: Listener
    waves: Sequence[np.ndarray]
    texts: Sequence[str]
    layers: Sequence[int]
    max_new_tokens: int
    """0 for likelihoods alone"""
    features: dict[tuple[int, ...], tuple[BatchFeature, BatchFeature]] = field(default_factory=dict)
    """What `inputs` has made, by batch."""

    def batches(self, size: int) -> list[list[int]]:
        """Clips of like length together."""
        order = np.argsort([len(wave) for wave in self.waves], kind="stable").tolist()
        return [order[i : i + size] for i in range(0, len(order), size)]

    def inputs(self, batch: Sequence[int]) -> tuple[BatchFeature, BatchFeature]:
        """Prompts with references and prompts alone, of these clips."""
        if (key := tuple(batch)) not in self.features:
            lm = self.listener
            waves = [self.waves[i] for i in batch]
            texts = [plain_text(self.texts[i]) for i in batch]
            pair = (lm.processor(waves, texts), lm.processor(waves))
            self.features[key] = tuple(part.to(lm.model.device) for part in pair)  # type: ignore[assignment]
        return self.features[key]

    def speech(self, inputs: BatchFeature) -> Tensor:
        """(B, S, 1) bool."""
        return (inputs["input_ids"] == self.listener.processor.speech.audio_token_id)[..., None]

    def ended(self, ids: Sequence[int]) -> list[int]:
        """Up to the first end token."""
        end = self.listener.processor.tokenizer.eos_token_id
        return list(ids[: ids.index(end)]) if end in ids else list(ids)


Contestant = Callable[[Study, Sequence[Sequence[int]]], Found]
"""Runs a study in these batches."""


def ours(study: Study, batches: Sequence[Sequence[int]], *, reuse: bool = True) -> Found:
    """By replay; `reuse=False` runs all blocks of every variant, and only verifies."""
    found, lm = Found({}, {}), study.listener
    for batch in batches:
        replay = lm.replay(
            [study.waves[i] for i in batch], [study.texts[i] for i in batch], study.max_new_tokens
        )
        variants = [
            Variant(partial(lm.skip, {layer}), layer + 1 if reuse else 0) for layer in study.layers
        ]
        for layer, heard in zip(study.layers, replay.hear_each(variants), strict=True):
            for clip, nll, answer in zip(batch, heard.nll, heard.answers, strict=True):
                found.nll[layer, clip] = nll.item()
                found.answers[layer, clip] = study.ended(answer)
    return found


def _by_forward_passes(
    study: Study,
    batches: Sequence[Sequence[int]],
    run: Callable[[int, BatchFeature, dict[str, Any]], Tensor],
) -> Found:
    """`run(layer, inputs, options)` gives logits (N, V), or with `max_new_tokens` among the options
    the generated ids."""
    found, options = Found({}, {}), {"do_sample": False, "max_new_tokens": study.max_new_tokens}
    for layer in study.layers:
        for batch in batches:
            labelled, prompts = study.inputs(batch)
            targets = F.pad(labelled["labels"][:, 1:], (0, 1), value=-100)
            nll = score_tokens(run(layer, labelled, {}), targets).nll
            found.nll.update({(layer, clip): x.item() for clip, x in zip(batch, nll, strict=True)})
            if study.max_new_tokens:
                ids = run(layer, prompts, options)[:, prompts["input_ids"].shape[1] :]
                for clip, row in zip(batch, ids.tolist(), strict=True):
                    found.answers[layer, clip] = study.ended(row)
    return found


def hooks(study: Study, batches: Sequence[Sequence[int]]) -> Found:
    """Plain transformers, with a hook on the block."""
    model = study.listener.model

    def run(layer: int, inputs: BatchFeature, options: dict[str, Any]) -> Tensor:
        with study.listener.skip({layer}):
            return model.generate(**inputs, **options) if options else model(**inputs).logits

    return _by_forward_passes(study, batches, run)


def nnsight(study: Study, batches: Sequence[Sequence[int]]) -> Found:
    """Traces around `forward` and `generate`; speech stands in the first step alone."""
    import nnsight as package

    model = study.listener.model
    traced = package.NNsight(model)

    def run(layer: int, inputs: BatchFeature, options: dict[str, Any]) -> Tensor:
        speech = study.speech(inputs)
        call = {"fn": model.generate, **options} if options else {}
        with traced.trace(**inputs, **call) as tracer:
            block = traced.language_model.model.layers[layer]
            before = block.input
            block.output = torch.where(speech, before, block.output)
            result = tracer.result.save()
        return result if options else result.logits

    return _by_forward_passes(study, batches, run)


def transformer_lens(study: Study, batches: Sequence[Sequence[int]]) -> Found:
    """The bridge's hook points around a copy, since it rewires what it wraps."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    other = copy.deepcopy(study.listener.model)
    bridge = build_bridge_from_module(
        other.language_model,
        type(other.language_model).__name__,
        hf_config=other.language_model.config,
    )

    def run(layer: int, inputs: BatchFeature, options: dict[str, Any]) -> Tensor:
        speech, seen = study.speech(inputs), {}

        def remember(residual: Tensor, hook: Any) -> None:
            seen["before"] = residual.clone()

        def put_back(residual: Tensor, hook: Any) -> Tensor:
            if residual.shape[1] != speech.shape[1]:
                return residual  # a decoding step
            return torch.where(speech, seen["before"], residual)

        points = [(f"blocks.{layer}.hook_in", remember), (f"blocks.{layer}.hook_out", put_back)]
        with bridge.hooks(fwd_hooks=points):
            return other.generate(**inputs, **options) if options else other(**inputs).logits

    return _by_forward_passes(study, batches, run)


PACKAGES = {"nnsight": "nnsight", "transformerlens": "transformer_lens"}
RIVALS: dict[str, Contestant] = {
    "hf": hooks,
    "nnsight": nnsight,
    "transformerlens": transformer_lens,
}
