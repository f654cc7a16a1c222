"""Checkpoints: saved, loaded by our own way and by transformers', refused when damaged."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, GenerationConfig, LlamaForCausalLM

from melprobe.errors import UsageError
from melprobe.model import checkpoint
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.training.recipe import Lora
from tests.tiny import tiny_config, tiny_listener, waves

TEXTS = ["please hold"]


def test_a_saved_model_loads_through_the_auto_classes(tmp_path):
    lm = tiny_listener(audio_front="conv")
    lm.model.save_pretrained(tmp_path)
    lm.processor.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    batch = lm.processor(waves(0.8), TEXTS)
    again = processor(waves(0.8), TEXTS)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert torch.equal(model(**again).logits, lm.model(**batch).logits)


@pytest.fixture
def base(tmp_path):
    lm = tiny_listener()
    folder = tmp_path / "base"
    model = LlamaForCausalLM(tiny_config().text_config)
    model.generation_config.update(repetition_penalty=5.0, eos_token_id=[1, 2], use_cache=False)
    model.save_pretrained(folder)
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
    batch = processor(waves(0.8), TEXTS)
    assert torch.equal(batch["input_ids"], processor_again(waves(0.8), TEXTS)["input_ids"])
    assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-5)


def test_an_adapter_checkpoint_loads_through_the_auto_classes(trained):
    model, processor, folder = trained
    again = AutoModelForCausalLM.from_pretrained(folder, revision="main", token=None)
    processor_again = AutoProcessor.from_pretrained(folder)
    assert isinstance(again, MelLLMForConditionalGeneration) and not again.training
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    batch, batch_again = processor(waves(0.8), TEXTS), processor_again(waves(0.8), TEXTS)
    assert all(torch.equal(batch[key], batch_again[key]) for key in batch)
    assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, MelLLMForConditionalGeneration])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_from_pretrained_honours_what_it_is_asked_for(trained, loader, dtype):
    options = {"dtype": dtype, "device_map": "cpu", "attn_implementation": "eager"}
    model = loader.from_pretrained(trained[2], **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.language_model.config._attn_implementation == "eager"
    assert model.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the best device is no CPU")
def test_the_best_device_without_a_gpu_is_the_cpu(trained):
    model = AutoModelForCausalLM.from_pretrained(trained[2], device_map="auto")
    assert model.device.type == "cpu"
    assert model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, UsageError, "no quantization_config"),
        ({"device_map": {"": "cpu"}}, UsageError, "one device or 'auto', not a dict"),
        ({"colour": "red"}, TypeError, "don't take colour"),
    ],
)
def test_from_pretrained_refuses_what_it_cannot_honour(trained, options, error, message):
    with pytest.raises(error, match=message):
        MelLLMForConditionalGeneration.from_pretrained(trained[2], **options)


@pytest.mark.parametrize("with_state", [False, True])
def test_save_pretrained_keeps_the_adapter_by_folding_it_in(trained, tmp_path, with_state):
    model, processor, _ = trained
    state = {"state_dict": model.state_dict()} if with_state else {}
    model.save_pretrained(tmp_path / "merged", **state)
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = processor(waves(0.8), TEXTS)
    assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-5)
    assert any("lora_" in name for name in model.state_dict())  # the model itself is as it was


def test_a_merged_model_is_saved_whole(trained, tmp_path):
    model, processor, folder = trained
    checkpoint.save(*checkpoint.load(folder), tmp_path / "whole", torch.float32)
    again, _ = checkpoint.load(tmp_path / "whole")
    batch = processor(waves(0.8), TEXTS)
    assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-5)


def test_an_adapter_added_the_peft_way_is_saved_the_peft_way(tmp_path):
    model = tiny_listener().model
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    again = tiny_listener().model
    again.load_adapter(str(tmp_path))
    batch = tiny_listener().processor(waves(0.8), TEXTS)
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_rotary_frequencies_stay_exact_in_bfloat16(trained, tmp_path):
    _, _, folder = trained
    whole, whole_processor = checkpoint.load(folder)
    checkpoint.save(whole, whole_processor, tmp_path / "whole")
    for place in (folder, tmp_path / "whole"):
        model, _ = checkpoint.load(place, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        exact = whole.get_decoder().rotary_emb.inv_freq
        assert torch.equal(model.get_decoder().rotary_emb.inv_freq, exact)


def test_the_bases_habits_of_decoding_are_left_behind(trained):
    model, _, folder = trained
    for each in (model, checkpoint.load_model(folder)):
        found = each.generation_config
        plain = GenerationConfig(bos_token_id=0, eos_token_id=[1, 2], pad_token_id=3)
        assert found.to_diff_dict() == plain.to_diff_dict()


def test_a_model_tuned_whole_is_saved_whole(base, tmp_path):
    extractor = tiny_listener().processor.feature_extractor
    model, processor = checkpoint.create(str(base), extractor, frames_per_patch=4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    checkpoint.save(model, processor, tmp_path / "whole", torch.float32)
    again, processor_again = checkpoint.load(tmp_path / "whole")
    batch = processor_again(waves(0.8), TEXTS)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    state = load_file(tmp_path / "whole" / "model.safetensors")
    del state["audio_front.projection.bias"]
    save_file(state, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"1 tensors missing .* audio_front.projection.bias"):
        checkpoint.load(tmp_path / "whole")


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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"trained/config\.json: missing"),
        ("config.json", "{", r"trained/config\.json: damaged"),
        ("config.json", "[]", r"trained/config\.json: damaged \(no JSON object\)"),
        ("config.json", '{"model_type": "llama"}', "a llama model, not a Mel-LLM"),
        ("melprobe.json", None, r"trained/melprobe\.json: missing"),
        ("melprobe.json", "{", r"trained/melprobe\.json: damaged"),
        ("melprobe.json", "{}", "it lacks after, before, feature_extractor, lora"),
        ("../base/config.json", None, r"base/config\.json: missing"),
    ],
)
def test_an_incomplete_folder_is_one_line_that_names_the_file(trained, file, content, message):
    path = trained[2] / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        checkpoint.load(trained[2])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", "processor_config.json", "config.json"])
def test_a_damaged_whole_model_is_one_line_that_names_the_file(base, tmp_path, file):
    extractor = tiny_listener().processor.feature_extractor
    checkpoint.save(*checkpoint.create(str(base), extractor), tmp_path / "whole")
    path = tmp_path / "whole" / file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=f"{file}: damaged") as error:
        checkpoint.load(tmp_path / "whole")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (1, 7)}, "layers 7: this model has blocks 0 to 3"),
        ({"layers": ()}, "lora.layers is empty: name some of 0 to 3"),
        ({"targets": ("q_proj", "c_attn")}, "'c_attn': .* are down_proj, gate_proj, k_proj"),
        ({"targets": ("lm_head",)}, "'lm_head': linear layers of these blocks are"),
    ],
)
def test_lora_on_what_is_not_there_is_refused(base, fields, message):
    extractor = tiny_listener().processor.feature_extractor
    with pytest.raises(UsageError, match=message):
        checkpoint.create(str(base), extractor, lora=Lora(**fields).to_peft())


def test_an_unknown_checkpoint_lists_what_there_is():
    with pytest.raises(UsageError, match="no checkpoint 'mel-maxi'; there is: "):
        checkpoint.load("mel-maxi")


def test_the_checkpoint_names_its_base(trained, base):
    config = json.loads((trained[2] / "config.json").read_text())
    assert config["base"] == str(base) and len(config["base_sha256"]) == 64
    del config["base"]  # here it is a folder, because the test named one
    assert str(base.parent) not in json.dumps(config)
