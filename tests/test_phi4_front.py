"""Phi-4-multimodal as a start, against transformers' own: tiny, of random weights, both layouts."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    Phi3ForCausalLM,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
)

from melprobe.errors import UsageError
from melprobe.model import checkpoint
from melprobe.model.adapter import adapter_state, merge_lora, read_adapter
from melprobe.model.ancestry import Ancestor, read_ancestors
from melprobe.model.encoder import EncoderStart, encoder_ears
from melprobe.model.phi4 import HUB_ID, SPEECH_LORA, TRANSCRIBE
from melprobe.model.processor import AUDIO_TOKEN
from melprobe.training.loop import fit
from melprobe.training.recipe import Lora, Model
from melprobe.training.speech import SpeechTask
from melprobe.training.start import take_over
from melprobe.wheels import file_sha256
from tests.test_starts import recipe
from tests.tiny import TEXTS, split_clips, tiny_config, tiny_listener, waves

LAYOUTS = ("phi4_multimodal", "phi4mm")
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
LORA = {"rank": 4, "alpha": 12.0, "targets": TARGETS}
AUDIO = {"hidden_size": 16, "intermediate_size": 24, "num_blocks": 2, "num_attention_heads": 2}
AUDIO |= {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 4}
AUDIO |= {"bias_max_distance": 300}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 302}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3, "sliding_window": 262144}
TEXT |= {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072}
ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG = {"type": "longrope", "short_factor": [1.0, 1.3], "long_factor": [1.0, 9.0]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "crop_size": 28, "image_size": 28, "image_token_id": 301}
# transformers' names to the hub's
HUB_NAMES = (
    (r"(layers\.\d+\.\w+\.(?:qkv|o|gate_up|down)_proj)\.weight", r"\1.base_layer.weight"),
    (r"\.feed_forward_(in|out)\.gate_up_proj", r".feed_forward_\1.net.0.linear"),
    (r"\.feed_forward_(in|out)\.down_proj", r".feed_forward_\1.net.2"),
    (r"(encoders\.\d+\.self_attn)\.(q|k|v)_proj", r"\1.linear_\2"),
    (r"(encoders\.\d+\.self_attn)\.o_proj", r"\1.linear_out"),
    (r"\.up_proj_for_speech", ".audio_projection.speech.0"),
    (r"\.down_proj_for_speech", ".audio_projection.speech.2"),
)


def phi4_folder(folder, layout="phi4_multimodal"):
    """A tiny Phi-4-multimodal with a speech LoRA, saved, and transformers' model of it."""
    tokenizer = tiny_listener().processor.tokenizer
    tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    torch.manual_seed(0)
    audio = {**AUDIO, "audio_token_id": tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)}
    rope = {**LONG, **ROPE, "rope_type": "longrope"}
    model = Phi4MultimodalForCausalLM(
        Phi4MultimodalConfig(**TEXT, rope_parameters=rope, audio_config=audio, vision_config=VISION)
    ).eval()
    for name, tensor in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(tensor, std=0.25)
    normalisation = model.model.embed_tokens_extend.audio_embed.encoder.encoder_embedding
    torch.nn.init.normal_(normalisation.global_mean, mean=10.0)
    torch.nn.init.uniform_(normalisation.global_invstd, 0.2, 0.4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lora = {}
    for name, tensor in model.model.layers.named_parameters():
        if name.endswith("_proj.weight"):
            for which, shape in ("A", (4, tensor.shape[1])), ("B", (tensor.shape[0], 4)):
                at = f"base_model.model.model.layers.{name.replace('weight', f'lora_{which}')}"
                lora[f"{at}.weight"] = torch.randn(shape) * 0.2
    (folder / SPEECH_LORA).parent.mkdir()
    save_file(lora, folder / SPEECH_LORA)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "layers.*(self_attn|mlp).*_proj"}
    (folder / SPEECH_LORA).with_name("adapter_config.json").write_text(json.dumps(settings))
    if layout == "phi4mm":
        _as_on_the_hub(folder, lora)
    return model


def _as_on_the_hub(folder, lora):
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for pattern, hub in HUB_NAMES:
            name = re.sub(pattern, hub, name)
        renamed[name] = tensor
    for name, tensor in lora.items():
        inside = name.removeprefix("base_model.model.").replace(".weight", ".speech.weight")
        renamed[inside] = tensor
    save_file(renamed, folder / "model.safetensors")
    audio = {key: AUDIO[key] for key in ("num_blocks", "ext_pw_out_channel")}
    audio |= {"attention_dim": 16, "attention_heads": 2, "linear_units": 24, "chunk_size": -1}
    audio |= {"depthwise_seperable_out_channel": 16, "input_layer": "nemo_conv"}
    audio |= {"nemo_conv_settings": {"conv_channels": 4}, "input_size": 80, "time_reduction": 8}
    audio |= {"relative_attention_bias_args": {"t5_bias_max_distance": 300, "type": "t5"}}
    config = {
        **TEXT,
        **ROPE,
        "rope_scaling": LONG,
        "model_type": "phi4mm",
        "auto_map": {"AutoConfig": "configuration_phi4mm.Phi4MMConfig"},
        "audio_processor": {"config": audio, "name": "cascades"},
        "embd_layer": {"audio_embd_layer": {"downsample_rate": 1, "compression_rate": 8}},
        "full_attn_mod": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same tiny Phi-4-multimodal in both layouts, and transformers' model of it."""
    place = tmp_path_factory.mktemp("phi4")
    models = [phi4_folder(place / layout, layout) for layout in LAYOUTS]
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    return place, models[0]


def create(folder, base=None, **start):
    return checkpoint.create(
        str(base or folder),
        encoder_ears(folder, "phi4"),
        prompt=("the", "<|answer|>"),
        lora=Lora(**LORA if not base else {"rank": 2}).to_peft(),
        audio_front="phi4",
        encoder=EncoderStart(str(folder), **start),
    )


def own_embedding(model, mel, conformer=True):
    """What transformers makes of one clip's normalised frames (T, M), given its own input."""
    embed = model.model.embed_tokens_extend.audio_embed
    norm = embed.encoder.encoder_embedding
    raw = (mel / norm.global_invstd + norm.global_mean)[None]
    heard = embed.encoder(raw, None) if conformer else embed.encoder.embed(norm(raw), None)[0]
    return embed.down_proj_for_speech(F.gelu(embed.up_proj_for_speech(heard)))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seconds", [0.9, 1.37])
def test_encoder_and_speech_lora_kept_it_is_transformers_own_model(sources, layout, seconds):
    place, theirs = sources
    folder = place / layout
    model, processor = create(folder)
    settings = Model(base=str(folder), lora=Lora(**LORA, init=str(folder)))
    sha256 = file_sha256(folder / SPEECH_LORA)
    assert take_over(model, settings) == [Ancestor(str(folder), sha256, "adapter")]
    assert isinstance(model.language_model, Phi3ForCausalLM)
    clip = waves(seconds)
    inputs = processor(clip, TEXTS[:1])
    labels = inputs.pop("labels")
    heard = Phi4MultimodalFeatureExtractor()(clip, sampling_rate=16_000, return_tensors="pt")
    assert heard["audio_embed_sizes"] == (inputs["input_ids"] == processor.audio_token_id).sum()
    with_lora = Phi4MultimodalForCausalLM(theirs.config).eval()
    with_lora.load_state_dict(theirs.state_dict())
    lora = load_file(folder / SPEECH_LORA)
    with torch.no_grad():
        for name, tensor in with_lora.model.layers.named_parameters():
            at = f"base_model.model.model.layers.{name.removesuffix('.weight')}.lora_"
            if name.endswith("_proj.weight"):
                tensor += 12 / 4 * lora[f"{at}B.weight"] @ lora[f"{at}A.weight"]
        expected = with_lora(input_ids=inputs["input_ids"], **heard).logits
        deaf = theirs(input_ids=inputs["input_ids"], **heard).logits
        assert torch.allclose(model.eval()(**inputs).logits, expected, atol=1e-4)
        assert not torch.allclose(deaf, expected, atol=0.1)
        merge_lora(model)
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4)
    assert labels.shape == inputs["input_ids"].shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("conformer", [True, False])
def test_the_front_is_transformers_own_and_padding_changes_nothing(sources, layout, conformer):
    place, theirs = sources
    front = create(place / layout, conformer=conformer)[0].audio_front.eval()
    torch.manual_seed(1)
    # 27 to 58 frames end inside a patch; 4,100 are two windows of the encoder.
    lengths = torch.tensor([27, 58, 64, 4000, 4100])
    mel = torch.randn(5, 4100, 80)
    mel[torch.arange(4100) >= lengths[:, None]] = torch.nan  # whatever stands there
    with torch.no_grad():
        patches = front(mel, lengths)
        assert patches.shape == (5, 513, 32)
        for clip, made, n in zip(mel, patches, lengths, strict=True):
            expected = own_embedding(theirs, clip[:n], conformer)
            assert torch.allclose(made[: -(-n // 8)], expected, atol=1e-5)
            assert torch.allclose(front(clip[None, :n], n[None])[0], expected, atol=1e-5)


def test_no_gradient_is_lost_in_padding(sources):
    front = create(sources[0] / LAYOUTS[0], trained=True)[0].audio_front
    mel = torch.randn(2, 4100, 80)
    patches = front(mel, torch.tensor([30, 4100]))
    (patches[0, :4].sum() + patches[1].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in front.parameters())


def test_its_spectrogram_is_ours_by_its_own_means(sources):
    place, theirs = sources
    clip = waves(0.8)
    raw = Phi4MultimodalFeatureExtractor()(clip, sampling_rate=16_000, return_tensors="pt")
    normalise = theirs.model.embed_tokens_extend.audio_embed.encoder.encoder_embedding
    expected = normalise(raw["audio_input_features"])
    for layout in LAYOUTS:
        made = encoder_ears(place / layout, "phi4")(clip)["input_features"]
        assert torch.allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("start", "saved"),
    [
        ({}, False),
        ({"conformer": False}, False),
        ({"trained": True}, True),
        ({"conformer": False, "trained": True}, True),
        ({"pretrained": False, "trained": True}, True),
    ],
)
def test_an_encoder_that_stays_as_it_was_is_not_saved_but_found_again(
    sources, tmp_path, layout, start, saved
):
    place, theirs = sources
    model, processor = create(place / layout, **start)
    own = theirs.model.embed_tokens_extend.audio_embed
    taken = torch.equal(model.audio_front.encoder.embed.out.weight, own.encoder.embed.out.weight)
    projected = torch.equal(model.audio_front.projection[2].bias, own.down_proj_for_speech.bias)
    assert taken == projected == start.get("pretrained", True)
    learns = any(p.requires_grad for p in model.audio_front.encoder.parameters())
    assert learns == start.get("trained", False)
    kept = {n for n in adapter_state(model) if n.startswith("audio_front.encoder.")}
    assert bool(kept) == saved
    assert any("encoders." in n for n in kept) == (saved and start.get("conformer", True))
    checkpoint.save(model, processor, tmp_path, torch.float32)
    again, its_processor = checkpoint.load(tmp_path)
    heard = processor(waves(0.5, 0.9), TEXTS[:2])
    found = its_processor(waves(0.5, 0.9), TEXTS[:2])
    assert all(torch.equal(found[name], heard[name]) for name in heard)
    with torch.no_grad():
        assert torch.allclose(model.eval()(**heard).logits, again(**heard).logits, atol=1e-5)


def test_a_model_tuned_whole_is_saved_whole(sources, tmp_path):
    folder = sources[0] / "phi4mm"
    start = EncoderStart(str(folder), trained=True)
    model, processor = checkpoint.create(
        str(folder), encoder_ears(folder, "phi4"), audio_front="phi4", encoder=start
    )
    checkpoint.save(model, processor, tmp_path, torch.float32)
    heard = processor(waves(0.5), TEXTS[:1])
    with torch.no_grad():
        again = checkpoint.load(tmp_path)[0]
        assert torch.allclose(model.eval()(**heard).logits, again(**heard).logits, atol=1e-5)


def test_over_another_base_the_projection_is_drawn_anew(sources, tmp_path):
    place, theirs = sources
    lm = tiny_listener()
    lm.processor.tokenizer.save_pretrained(tmp_path)
    lm.model.language_model.save_pretrained(tmp_path)
    front = create(place / LAYOUTS[0], tmp_path)[0].audio_front
    own = theirs.model.embed_tokens_extend.audio_embed
    assert torch.equal(front.encoder.embed.out.weight, own.encoder.embed.out.weight)
    assert not front.projection[2].bias.any()


@pytest.mark.parametrize(
    ("encoder", "learns"), [({}, False), ({"conformer": False, "train": True}, True)]
)
def test_two_steps_of_training_from_there(folder, sources, tmp_path, encoder, learns):
    start = str(sources[0] / "phi4mm")
    split_clips(folder, tmp_path)
    made = recipe(folder, tmp_path, "run", steps=2, precision="bf16")
    made = made.model_copy(update={"model": Model(init=start, encoder=encoder)})
    task = SpeechTask(made)
    before = {name: t.clone() for name, t in task.model.state_dict().items()}
    fit(task, made, torch.device("cpu"))
    after = task.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(after[name].isfinite().all() for name in after)
    assert any("encoder." in name for name in moved) == learns
    assert {"audio_front.projection.0.weight", "audio_front.projection.2.bias"} <= moved
    assert all("lora_" in name or name.startswith("audio_front.") for name in moved)
    checkpoint.load(tmp_path / "run" / "last")
    assert read_adapter(tmp_path / "run" / "last").keys() == adapter_state(task.model).keys()
    sha256 = file_sha256(sources[0] / "phi4mm" / SPEECH_LORA)
    assert read_ancestors(tmp_path / "run" / "last") == [Ancestor(start, sha256, "adapter")]


def test_init_stands_for_what_is_not_given(sources):
    start = str(sources[0] / "phi4mm")
    whole = Model(init=start)
    parts = {"base": start, "front": "phi4", "encoder": {"name": start}, "prompt": TRANSCRIBE}
    assert whole == Model(**parts, lora={**LORA, "targets": sorted(TARGETS), "init": start})
    assert Model(**whole.model_dump()) == whole  # as a run's recipe.json is read
    bare = Model(init=start, encoder={"conformer": False}, lora=None, prompt=("a", "b"))
    assert (bare.encoder.name, bare.encoder.conformer) == (start, False)
    assert bare.lora is None and bare.prompt == ("a", "b")
    published = Model(init=HUB_ID)
    assert (published.base, published.front, published.lora.rank) == (HUB_ID, "phi4", 320)


def test_a_folder_that_does_not_fit_is_one_line(sources, tmp_path):
    place, _ = sources

    def damaged(name, layout=LAYOUTS[0], without=None, **fields):
        shutil.copytree(place / layout, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | fields))
        if without:
            state = load_file(tmp_path / name / "model.safetensors")
            del state[next(key for key in state if without in key)]
            save_file(state, tmp_path / name / "model.safetensors")
        return tmp_path / name

    def refused(match, folder, **start):
        with pytest.raises(UsageError, match=match) as caught:
            create(folder, **start)
        assert "\n" not in str(caught.value)

    lm = tiny_listener()
    lm.processor.tokenizer.save_pretrained(tmp_path / "base")
    lm.model.language_model.save_pretrained(tmp_path / "base")
    refused("this is a llama model, not a Phi-4-multimodal", tmp_path / "base")
    refused(
        "text decoder: 1 tensors missing.*model.layers.1",
        damaged("a", without="model.layers.1.mlp"),
    )
    refused(
        "text decoder: 1 tensors missing.*model.layers.3",
        damaged("b", without="model.layers.3.mlp.down"),
    )
    refused("text decoder: 16 tensors .*misshapen", damaged("i", intermediate_size=40))
    refused(r"encoder: 1 tensors missing.* encoders.1", damaged("c", without="encoders.1.conv.glu"))
    refused("projection: 1 tensors missing", damaged("d", without="down_proj_for_speech.weight"))
    refused("lacks the means and deviations", damaged("e", without="global_mean"))
    refused("damaged .no 'config' of", damaged("f", "phi4mm", audio_processor={}))
    chunks = {**AUDIO, "chunk_size": 18}
    refused("chunk_size 18 and downsample_rate 1", damaged("g", audio_config=chunks))
    (damaged("h") / "model.safetensors").write_text("{")
    refused("damaged .*; fetch it again", tmp_path / "h")
    with pytest.raises(UsageError, match=r"trained behind the encoder of a .* 000000000000"):
        model, processor = create(place / LAYOUTS[0])
        checkpoint.save(model, processor, tmp_path / "saved")
        config = (tmp_path / "saved" / "config.json").read_text()
        config = config.replace(
            f'"encoder_sha256": "{model.config.encoder_sha256}"',
            f'"encoder_sha256": "{"0" * 64}"',
        )
        (tmp_path / "saved" / "config.json").write_text(config)
        checkpoint.load(tmp_path / "saved")


def test_a_lora_that_does_not_fit_is_one_line(sources, tmp_path):
    folder = tmp_path / "phi4"
    shutil.copytree(sources[0] / LAYOUTS[0], folder)
    settings = (folder / SPEECH_LORA).with_name("adapter_config.json")
    written = json.loads(settings.read_text())

    def refused(match, **fields):
        lora = Lora(**{**LORA, "init": str(folder), **fields})
        model, _ = checkpoint.create(str(folder), encoder_ears(folder, "phi4"), lora=lora.to_peft())
        with pytest.raises(UsageError, match=match):
            take_over(model, Model(base=str(folder), lora=lora))

    refused("has rank 4, alpha 12 .* recipe's has rank 16, alpha 12 ", rank=16)
    refused("alpha 12 and targets .* alpha 24 and targets", alpha=24.0)
    refused("targets down_proj, gate_up_proj.*; .* targets o_proj", targets=["o_proj"])
    refused("16 tensors missing, left over", layers=[0, 1])
    settings.write_text(json.dumps(written | {"use_rslora": True}))
    refused("rank-stabilised")
    settings.write_text("{}")
    refused("damaged .'r'.")
    settings.write_text(json.dumps(written))
    save_file({"model.norm.lora_A.weight": torch.zeros(1)}, folder / SPEECH_LORA)
    refused("model.norm.lora_A.weight is no LoRA matrix")
    (folder / SPEECH_LORA).unlink()
    refused("adapter_model.safetensors: missing, and Phi-4")
    other = tmp_path / "other"
    shutil.copytree(sources[0] / LAYOUTS[1], other)
    refused("weights hash to .*; take one base", init=str(other))


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("frames_per_patch 4: Phi-4's encoder", {"frames_per_patch": 4}),
        ("normalisation: Phi-4's encoder has a spectrogram", {"normalisation": "global"}),
        ("encoder.name: say where", {"encoder": {}}),
        ("encoder.conformer: Whisper's", {"front": "whisper", "encoder": {"conformer": False}}),
        ("a linear front has no encoder", {"front": "linear"}),
    ],
)
def test_a_recipe_is_checked_before_any_work(match, fields):
    with pytest.raises(ValueError, match=match):
        Model(**{"front": "phi4", "encoder": {"name": "a/b"}, **fields})


def test_a_front_and_its_encoder_go_together():
    with pytest.raises(UsageError, match="encoder_config goes with whisper and phi4 alone"):
        tiny_config(audio_front="phi4")
    with pytest.raises(UsageError, match="encoder_config goes with whisper and phi4 alone"):
        tiny_config(audio_front="linear", encoder_config=AUDIO)
    with pytest.raises(UsageError, match=r"frames_per_patch 4: Phi-4.* 8 frames"):
        tiny_config(audio_front="phi4", encoder_config=AUDIO, frames_per_patch=4)
