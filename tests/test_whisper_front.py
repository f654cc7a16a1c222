"""The encoder front against transformers' own encoder, alone and in a batch, trained or left."""

import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from melprobe.audio.mel import frame_count, log_mel, whisper_log_mel
from melprobe.errors import UsageError
from melprobe.model import checkpoint
from melprobe.model.adapter import adapter_state
from melprobe.model.encoder import EncoderStart
from melprobe.model.processor import MelLLMFeatureExtractor
from melprobe.training.recipe import Lora
from tests.tiny import TEXTS, tiny_config, tiny_listener, waves

SMALL = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 60}
SMALL |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
SMALL |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 100}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
EXTRACTOR = MelLLMFeatureExtractor(normalisation="none", spectrogram="whisper", f_max=8000.0)


def whisper_folder(folder):
    """A tiny Whisper of random weights, saved."""
    whisper = WhisperForConditionalGeneration(WhisperConfig(**SMALL))
    for parameter in whisper.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    whisper.save_pretrained(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a tiny base and a tiny Whisper, both of random weights."""
    place = tmp_path_factory.mktemp("twin")
    torch.manual_seed(0)
    lm = tiny_listener()
    lm.processor.tokenizer.save_pretrained(place / "base")
    lm.model.language_model.save_pretrained(place / "base")
    whisper_folder(place / "whisper")
    return place


def twin(sources, **start):
    return checkpoint.create(
        str(sources / "base"),
        EXTRACTOR,
        lora=Lora(rank=2).to_peft(),
        audio_front="whisper",
        encoder=EncoderStart(str(sources / "whisper"), **start),
    )


def test_whispers_spectrogram_is_transformers_own_frame_for_frame_with_ours():
    clips = [torch.from_numpy(wave) for wave in waves(0.7, 1.3)]
    made = whisper_log_mel(clips)
    for clip, mel in zip(clips, made, strict=True):
        n = frame_count(len(clip))
        alone = WhisperFeatureExtractor()(
            clip.numpy(), sampling_rate=16_000, return_tensors="pt", padding="do_not_pad"
        ).input_features[0]
        assert torch.allclose(mel[:n], alone.T[1 : 1 + n], atol=1e-5)
        assert len(log_mel(clip[None])[0]) == n


def test_a_click_falls_into_the_same_frame_as_in_our_spectrogram():
    clip = torch.zeros(16_000)
    clip[9_000] = 1.0
    ours, whispers = log_mel(clip[None])[0].sum(1), whisper_log_mel([clip])[0].sum(1)
    assert abs(ours.argmax() - whispers.argmax()) <= 1


def test_the_encoder_is_transformers_own_and_padding_changes_nothing(sources):
    front = twin(sources)[0].audio_front.eval()
    clips = waves(0.6, 2.02)  # the longer fills the encoder's hundred positions
    made = EXTRACTOR(clips)
    mel, lengths = made["input_features"], made["feature_attention_mask"].sum(1)
    assert lengths.tolist() == [58, 200]
    with torch.no_grad():
        patches = front(mel, lengths)
        whole = WhisperEncoder(front.encoder.config).eval()
        whole.load_state_dict(front.encoder.state_dict())
        expected = whole(mel[1:].transpose(1, 2)).last_hidden_state
        assert torch.allclose(patches[1], front.projection(expected.view(25, 64)), atol=1e-5)
        alone = front(mel[:1, :58], lengths[:1])
        assert torch.allclose(patches[0, :8], alone[0], atol=1e-5)
        mel[0, 58:] = torch.nan  # whatever stands there
        assert torch.equal(front(mel, lengths), patches)


def test_a_clip_that_the_encoder_has_no_room_for_is_one_line(sources):
    model, processor = twin(sources)
    with pytest.raises(UsageError, match=r"a clip lasts 2\.0 s, and Whisper's encoder hears 2 s"):
        model(**processor(waves(2.04), ["one"]))


@pytest.mark.parametrize(
    ("start", "saved", "learns"),
    [
        ({}, False, False),
        ({"trained": True}, True, True),
        ({"pretrained": False}, True, False),
        ({"pretrained": False, "trained": True}, True, True),
    ],
)
def test_an_encoder_that_stays_as_it_was_is_not_saved_but_found_again(
    sources, tmp_path, start, saved, learns
):
    model, processor = twin(sources, **start)
    encoder = model.audio_front.encoder
    learning = [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert bool(learning) == learns and "embed_positions.weight" not in learning
    assert any(name.startswith("audio_front.encoder.") for name in adapter_state(model)) == saved
    assert encoder.config is model.config.encoder_config  # or settings would not reach it
    original = WhisperForConditionalGeneration.from_pretrained(sources / "whisper").get_encoder()
    taken = torch.equal(encoder.conv1.weight, original.conv1.weight)
    assert taken == start.get("pretrained", True)
    checkpoint.save(model, processor, tmp_path, torch.float32)
    again, its_processor = checkpoint.load(tmp_path)
    heard = processor(waves(0.5, 0.9), TEXTS[:2])
    assert torch.equal(
        its_processor(waves(0.5, 0.9), TEXTS[:2])["input_features"], heard["input_features"]
    )
    with torch.no_grad():
        assert torch.allclose(model.eval()(**heard).logits, again(**heard).logits, atol=1e-5)


def test_another_encoders_weights_are_refused(sources, tmp_path):
    model, processor = twin(sources)
    checkpoint.save(model, processor, tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace(model.config.encoder_sha256, "0" * 64))
    with pytest.raises(
        UsageError, match=r"trained behind the encoder of a .* hash to 000000000000"
    ):
        checkpoint.load(tmp_path)


def test_the_judge_and_other_models_are_no_encoders(sources):
    with pytest.raises(UsageError, match="it is the judge"):
        checkpoint.create(str(sources / "base"), EXTRACTOR, encoder=EncoderStart("whisper-base"))
    with pytest.raises(UsageError, match="this is a llama model, not a Whisper"):
        checkpoint.create(
            str(sources / "base"), EXTRACTOR, encoder=EncoderStart(str(sources / "base"))
        )
    with pytest.raises(UsageError, match=r"no encoder 'nothing': take whisper-tiny\.en"):
        checkpoint.create(str(sources / "base"), EXTRACTOR, encoder=EncoderStart("nothing"))


def test_a_front_and_its_encoder_go_together():
    with pytest.raises(UsageError, match="encoder_config goes with whisper and phi4 alone"):
        tiny_config(audio_front="whisper")
    with pytest.raises(UsageError, match="frames_per_patch 1"):
        tiny_config(audio_front="whisper", encoder_config=SMALL, frames_per_patch=1)
