"""The arithmetic of training steps, counted from a model's weights and what goes through them.

2 flop per weight and position forward, 2 backward for what enters it, 2 more for weights that learn
(Kaplan et al. 2020, arXiv 2001.08361, less what frozen weights save). Attention's own work is left
out: at these lengths a few per cent. So is that of convolutions at rates above the decoder's.
"""

from collections.abc import Mapping
from typing import Any


def training_flop(model: Any, counts: Mapping[str, float]) -> float:
    """Of steps with so many positions, patches, answer tokens and mel frames.

    What the encoder's weights get passes no gradient on unless they learn.
    """
    lookup, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    encoder = [p for name, p in model.named_parameters() if _in_encoder(name)]
    encoder_learns = any(p.requires_grad for p in encoder)
    total = (4 + 2 * output.requires_grad) * output.numel() * counts["answers"]
    for name, p in model.named_parameters():
        if p.dim() < 2 or p is lookup or p is output or name.endswith("embed_positions.weight"):
            continue
        per_weight = 4 + 2 * p.requires_grad
        if _in_encoder(name):
            positions = counts["frames"] / 2
            per_weight = per_weight if encoder_learns else 2
        elif name.startswith("audio_front."):
            positions = counts["patches"]
        else:
            positions = counts["positions"]
        total += per_weight * p.numel() * positions
    return total


def _in_encoder(name: str) -> bool:
    return name.startswith("audio_front.encoder.")
