"""Text pretraining, from a recipe to a base model that transformers loads."""

import pytest
import yaml
from transformers import LlamaForCausalLM

from melprobe import train
from melprobe.errors import UsageError
from tests.tiny import WORDS


def test_text_is_learnt_without_audio(tmp_path):
    sentences = tmp_path / "s.txt"
    lines = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:3]]
    sentences.write_text("\n".join(lines))
    recipe = {
        "task": "text",
        "out": str(tmp_path / "run"),
        "steps": 3,
        "sentences": [str(sentences)],
        "vocabulary": 300,
        "layers": 2,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "feed_forward": 32,
        "batch_tokens": 128,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    train.main([str(tmp_path / "r.yaml")])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "best")
    assert model.config.num_hidden_layers == 2
    sentences.write_text("\n".join(lines[:200]))
    with pytest.raises(UsageError, match="sentences: 200 different ones"):
        train.main([str(tmp_path / "r.yaml"), "--out", str(tmp_path / "few")])
    with pytest.raises(UsageError, match="width 32 must be a multiple of twice heads, 5"):
        train.main([str(tmp_path / "r.yaml"), "--heads", "5"])
