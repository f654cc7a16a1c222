"""The Mel-LLM as a model and its processor: padding, patches, attention, decoding, batches."""

import copy

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, MistralConfig, Phi3Config, Qwen3Config

from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.listener import Listener
from melprobe.model.config import MelLLMConfig
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.model.processor import MelLLMFeatureExtractor, MelLLMProcessor
from melprobe.training.text import train_tokenizer
from tests.tiny import WORDS, tiny_listener, waves

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


def test_a_clip_longer_than_the_decoder_is_refused_by_name_and_length():
    lm = tiny_listener(frames_per_patch=1)  # 512 positions
    clips = waves(1.0, 5.2)
    for listen in (lm.transcribe, lambda waves: lm.score(waves, TEXTS)):
        with pytest.raises(UsageError, match=r"clip 2 of 2 .*\(5\.2 s\) takes 5\d\d .* has 512"):
            listen(clips)
    assert len(lm.transcribe(waves(1.0, 4.9), 4)) == 2


def test_what_runs_past_the_last_position_while_decoding_is_refused():
    lm = tiny_listener(frames_per_patch=1)
    inputs = lm.processor(waves(5.0))
    room = 512 - inputs["input_ids"].shape[1]
    lm.model.generate(**inputs, do_sample=False, min_new_tokens=room, max_new_tokens=room)
    with pytest.raises(UsageError, match="takes 513 positions"):
        lm.model.generate(**inputs, do_sample=False, min_new_tokens=room + 2, max_length=600)


def test_transcripts_are_greedy_whatever_the_generation_config_says():
    lm, clips = tiny_listener(), waves(1.0, 0.6)
    plain = lm.transcribe(clips, 12)
    habits = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "do_sample": True}
    lm.model.generation_config.update(**habits, top_k=50, num_beams=3, min_new_tokens=12)
    assert lm.transcribe(clips, 12) == plain
    assert lm.model.generation_config.num_beams == 3


def test_loss_is_the_mean_over_the_answer_tokens():
    lm = tiny_listener()
    batch = lm.processor(waves(1.0, 0.6), TEXTS)
    scores = lm.score(waves(1.0, 0.6), TEXTS)
    assert lm.model(**batch).loss.item() == pytest.approx(
        (scores.nll.sum() / scores.tokens.sum()).item()
    )
    labels = batch.pop("labels")
    full = lm.model(**batch).logits.log_softmax(-1)[:, :-1][labels[:, 1:] != -100]
    assert torch.allclose(full, scores.log_probs, atol=1e-5)


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


def test_what_is_no_mono_wave_is_named_and_no_waves_are_no_transcripts():
    lm, (clip,) = tiny_listener(), waves(0.8)
    assert lm.transcribe([]) == []
    with pytest.raises(ValueError, match=r"a wave of shape \(12800, 2\): give one channel"):
        lm.transcribe([np.stack([clip, clip], 1)])
    with pytest.raises(ValueError, match="NaN or infinite"):
        lm.transcribe([np.where(clip > 0, np.nan, clip)])


def test_a_single_wave_is_a_batch_of_one():
    processor, (clip,) = tiny_listener().processor, waves(0.8)
    for text, texts in ((None, None), ("please hold", ["please hold"])):
        batch = processor([clip], texts, return_tensors="pt")
        for wave in (clip, torch.from_numpy(clip)):
            alone = processor(wave, text)
            assert all(torch.equal(batch[key], alone[key]) for key in batch)
    with pytest.raises(ValueError, match="return_tensors='np': there are torch tensors only"):
        processor(clip, return_tensors="np")


def test_a_batch_is_decoded_without_special_tokens():
    processor = tiny_listener().processor
    end = processor.tokenizer.eos_token
    ids = [processor.answer_ids("please hold"), [processor.audio_token_id]]
    assert processor.batch_decode(ids) == ["please hold", ""]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["please hold", ""]
    assert processor.decode(ids[0], skip_special_tokens=False) == f"please hold{end}"


def test_a_bases_own_extra_tokens_survive():
    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    processor = MelLLMProcessor(MelLLMFeatureExtractor(), tokenizer)
    assert "<|call|>" in tokenizer.all_special_tokens
    special = [processor.audio_token_id, tokenizer.convert_tokens_to_ids("<|call|>")]
    assert processor.decode(special) == ""


def test_plain_text_keeps_letters_however_their_accents_are_written():
    assert plain_text("Cafe\u0301, ZU\u0308RICH!") == plain_text("Café, Zürich") == "café zürich"


def test_a_tokenizer_without_bos_and_padding_uses_its_end_token():
    tokenizer = copy.deepcopy(tiny_listener().processor.tokenizer)
    tokenizer.bos_token = tokenizer.pad_token = None
    batch = MelLLMProcessor(MelLLMFeatureExtractor(), tokenizer)(waves(0.8, 0.4), TEXTS)
    assert (batch["input_ids"][:, 0] == tokenizer.eos_token_id).all()
    padding = ~batch["attention_mask"].bool()
    assert padding.any() and (batch["input_ids"][padding] == tokenizer.eos_token_id).all()
    assert (batch["labels"][padding] == -100).all()


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
