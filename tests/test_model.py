"""The Mel-LLM as a model: padding, patches, attention, saving and strict loading."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from melprobe.errors import UsageError
from melprobe.listener import Listener
from melprobe.model import checkpoint
from melprobe.model.config import MelLLMConfig
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.model.processor import MelLLMFeatureExtractor, MelLLMProcessor
from melprobe.training.recipe import Lora
from tests.tiny import tiny_config, tiny_listener, waves

TEXTS = ["please hold", "the new number three"]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FRONTS = [("linear", 8), ("conv", 8), ("linear", 1), ("conv", 1), ("conv", 16)]


@pytest.mark.parametrize(("front", "frames"), FRONTS)
def test_padding_changes_nothing_whatever_stands_in_it(front, frames):
    lm = tiny_listener(audio_front=front, frames_per_patch=frames)
    batch = lm.processor(waves(1.0, 0.6), TEXTS)
    plain = lm.model(**batch).logits
    batch["input_features"][~batch["feature_attention_mask"]] = torch.nan
    assert torch.equal(lm.model(**batch).logits, plain)

    embeddings = lm.model.embed(
        batch["input_ids"], batch["input_features"], batch["feature_attention_mask"]
    )
    embeddings = embeddings.masked_fill(~batch["attention_mask"].bool()[..., None], 1e4)
    poisoned = lm.model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert torch.equal(poisoned.logits, plain)


@pytest.mark.parametrize(("front", "frames"), FRONTS)
def test_a_clip_in_a_batch_equals_the_clip_alone(front, frames):
    lm = tiny_listener(audio_front=front, frames_per_patch=frames)
    clips = waves(1.0, 0.6)
    together = lm.score(clips, TEXTS)
    alone = [lm.score([clip], [text]) for clip, text in zip(clips, TEXTS, strict=True)]
    assert torch.allclose(together.nll, torch.cat([a.nll for a in alone]), rtol=1e-4)
    assert lm.transcribe(clips, 8) == [lm.transcribe([clip], 8)[0] for clip in clips]


def test_causal_patches_do_not_see_the_future_and_bidirectional_ones_do():
    clip = waves(1.0)[0]
    changed = clip.copy()
    changed[-4000:] *= -0.3
    for attention, sees in (("causal", False), ("bidirectional", True)):
        lm = tiny_listener(audio_attention=attention)
        extractor = lm.processor.feature_extractor  # statistics that the future can't change
        extractor.normalisation, extractor.mean, extractor.std = "global", [10.0] * 80, [3.0] * 80
        first = [_second_layer_input(lm, wave)[:, 1:4] for wave in (clip, changed)]
        assert torch.equal(*first) is not sees


def test_bidirectional_attention_decodes_with_a_cache_as_without():
    lm = tiny_listener(audio_attention="bidirectional")
    inputs = lm.processor(waves(1.0, 0.6))
    options = {"do_sample": False, "max_new_tokens": 8}
    cached = lm.model.generate(**inputs, **options)
    assert torch.equal(cached, lm.model.generate(**inputs, **options, use_cache=False))


def _second_layer_input(lm, wave):
    grabbed = []
    block = lm.model.get_decoder().layers[1]
    handle = block.register_forward_pre_hook(lambda module, args: grabbed.append(args[0]))
    lm.model(**lm.processor([wave]))
    handle.remove()
    return grabbed[0]


def test_too_few_placeholders_are_refused():
    lm = tiny_listener()
    batch = lm.processor(waves(1.0))
    batch["input_ids"][0, 3] = 5
    with pytest.raises(ValueError, match=r"\[12\] do not match .* \[13\]"):
        lm.model(**batch)


def test_loss_is_the_mean_over_the_answer_tokens():
    lm = tiny_listener()
    batch = lm.processor(waves(1.0, 0.6), TEXTS)
    scores = lm.score(waves(1.0, 0.6), TEXTS)
    assert lm.model(**batch).loss.item() == pytest.approx(
        (scores.nll.sum() / scores.tokens.sum()).item()
    )
    labels = batch.pop("labels")
    full = lm.model(**batch).logits[:, :-1][labels[:, 1:] != -100]
    assert torch.allclose(full, scores.logits, atol=1e-5)


def test_a_saved_model_loads_through_the_auto_classes(tmp_path):
    lm = tiny_listener(audio_front="conv")
    lm.model.save_pretrained(tmp_path)
    lm.processor.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    batch = lm.processor(waves(0.8), TEXTS[:1])
    again = processor(waves(0.8), TEXTS[:1])
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert torch.equal(model(**again).logits, lm.model(**batch).logits)


@pytest.fixture
def base(tmp_path):
    lm = tiny_listener()
    folder = tmp_path / "base"
    LlamaForCausalLM(tiny_config().text_config).save_pretrained(folder)
    lm.processor.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(base, tmp_path):
    """An adapter checkpoint with made-up LoRA weights, saved in float32."""
    extractor = tiny_listener().processor.feature_extractor
    model, processor = checkpoint.create(str(base), extractor, lora=Lora(rank=2).to_peft())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(model, processor, tmp_path / "trained", torch.float32)
    return model.eval(), processor, tmp_path / "trained"


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_checkpoint_comes_back_the_same(trained, merge):
    model, processor, folder = trained
    again, processor_again = checkpoint.load(folder, merge=merge)
    batch = processor(waves(0.8), TEXTS[:1])
    assert torch.equal(batch["input_ids"], processor_again(waves(0.8), TEXTS[:1])["input_ids"])
    assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-5)
    assert isinstance(
        MelLLMForConditionalGeneration.from_pretrained(folder), MelLLMForConditionalGeneration
    )


def test_a_model_tuned_whole_is_saved_whole(base, tmp_path):
    extractor = tiny_listener().processor.feature_extractor
    model, processor = checkpoint.create(str(base), extractor, frames_per_patch=4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    checkpoint.save(model, processor, tmp_path / "whole", torch.float32)
    again, processor_again = checkpoint.load(tmp_path / "whole")
    batch = processor_again(waves(0.8), TEXTS[:1])
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    state = load_file(tmp_path / "whole" / "model.safetensors")
    del state["audio_front.projection.bias"]
    save_file(state, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"1 tensors missing .* audio_front.projection.bias"):
        checkpoint.load(tmp_path / "whole")


@pytest.mark.parametrize(
    "text_config",
    [
        Qwen3Config(head_dim=8, **SMALL),
        MistralConfig(sliding_window=16, **SMALL),
        Gemma3TextConfig(head_dim=8, sliding_window=16, **SMALL),
        Phi3Config(**SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_any_causal_lm_will_do(text_config):
    lm = tiny_listener()
    config = MelLLMConfig(text_config=text_config, audio_token_id=lm.processor.audio_token_id)
    other = Listener(MelLLMForConditionalGeneration(config).eval(), lm.processor)
    clips = waves(1.0, 0.6)
    scores = other.score(clips, TEXTS)
    inputs, options = lm.processor(clips), {"do_sample": False, "max_new_tokens": 6}
    cached = other.model.generate(**inputs, **options)
    assert torch.equal(cached, other.model.generate(**inputs, **options, use_cache=False))
    with other.skip({0}):
        assert not torch.equal(other.score(clips, TEXTS).nll, scores.nll)
        cached = other.model.generate(**inputs, **options)
        assert torch.equal(cached, other.model.generate(**inputs, **options, use_cache=False))


def test_a_tokenizer_without_bos_and_padding_uses_its_end_token():
    tokenizer = copy.deepcopy(tiny_listener().processor.tokenizer)
    tokenizer.bos_token = tokenizer.pad_token = None
    batch = MelLLMProcessor(MelLLMFeatureExtractor(), tokenizer)(waves(0.8, 0.4), TEXTS)
    assert (batch["input_ids"][:, 0] == tokenizer.eos_token_id).all()
    padding = ~batch["attention_mask"].bool()
    assert padding.any() and (batch["input_ids"][padding] == tokenizer.eos_token_id).all()
    assert (batch["labels"][padding] == -100).all()


def test_only_front_and_adapter_are_trained_and_saved(trained):
    model = trained[0]
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    assert named == set(checkpoint.adapter_state(model))
    assert all(name.startswith("audio_front.") or "lora_" in name for name in named)


def test_another_base_is_refused(trained, base):
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config().text_config).save_pretrained(base)
    with pytest.raises(UsageError, match=r"whose weights hash to .* restore that base"):
        checkpoint.load(trained[2])


def test_a_missing_tensor_is_named(trained):
    model, _, folder = trained
    state = checkpoint.adapter_state(model)
    del state["audio_front.projection.bias"]
    with pytest.raises(UsageError, match=r"1 tensors .* audio_front.projection.bias"):
        checkpoint.load_adapter_state(model, state, str(folder))


def test_a_truncated_adapter_is_refused(trained):
    file = trained[2] / checkpoint.ADAPTER
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(trained[2])


def test_an_unknown_checkpoint_lists_what_there_is():
    with pytest.raises(UsageError, match="no checkpoint 'mel-maxi'; there is: "):
        checkpoint.load("mel-maxi")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("audio_front", "square", "linear, conv"),
        ("frames_per_patch", 3, "1, 2, 4, 8, 16"),
        ("audio_attention", "psychic", "causal, bidirectional"),
    ],
)
def test_a_wrong_choice_is_refused_when_the_config_is_made(field, value, message):
    with pytest.raises(UsageError, match=message):
        MelLLMConfig(**{field: value})


def test_the_checkpoint_names_its_base(trained, base):
    config = json.loads((trained[2] / "config.json").read_text())
    assert config["base"] == str(base) and len(config["base_sha256"]) == 64
