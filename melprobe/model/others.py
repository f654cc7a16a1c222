"""Other people's models: loaded from the hub or a folder, and asked to transcribe or to copy.

A speech LLM's own feature extractor makes what it hears; the words around come from its
tokenizer's chat template. Of its class melprobe must know both (`LISTENING`, here) and which
positions are speech (`melprobe.hooks.anatomy.KNOWN`). docs/other-models.md shows how another is
added. A plain language model of any class of transformers is given a text to copy.

Speech LLMs were tested on random weights of each class, none of it yet on trained ones.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    BatchFeature,
    PreTrainedModel,
)

from melprobe.audio.load import SAMPLE_RATE
from melprobe.errors import UsageError
from melprobe.hooks.anatomy import KNOWN, Anatomy, only_reads
from melprobe.hooks.layers import decoder_blocks
from melprobe.model.chat import chat, text_prompts, tokens
from melprobe.model.config import token_ids_only
from melprobe.model.prompts import ClipPrompts, Given, Prompts, Wave
from melprobe.wheels import file_sha256

Heard = tuple[dict[str, Any], list[int]]
"""Inputs of a model for a batch of waves, and how many positions each wave takes."""


class Listening(NamedTuple):
    """How a class of models is given audio, and asked for words."""

    hear: Callable[[Any, Sequence[Any]], Heard]
    """From its feature extractor and waves (float32, mono, 16 kHz)."""
    ask: str = "Transcribe the audio clip into text."
    """What the user says behind the audio."""
    answer: str = ""
    """What the model is made to begin its answer with."""
    wrap: tuple[str, str] = ("", "")
    """Tokens that its own processor puts right before and after the audio."""
    plain: tuple[str, str] | None = None
    """Words before and after the audio where the tokenizer has no chat template."""
    padded_to: float = 0.0
    """Seconds to a multiple of which a clip is padded, all of it speech positions."""


def _whisper_frames(extractor: Any, waves: Sequence[Any], **options: Any) -> Any:
    return extractor(
        list(waves),
        sampling_rate=SAMPLE_RATE,
        return_attention_mask=True,
        return_tensors="pt",
        **options,
    )


def _phi4_multimodal(extractor: Any, waves: Sequence[Any]) -> Heard:
    made = extractor(list(waves), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    return dict(made), made["audio_embed_sizes"].tolist()


def _gemma4_unified(extractor: Any, waves: Sequence[Any]) -> Heard:
    made = extractor(list(waves), return_tensors="pt")
    return dict(made), made["input_features_mask"].sum(1).tolist()


def _qwen2_audio(extractor: Any, waves: Sequence[Any]) -> Heard:
    longest, heard = max(map(len, waves)), extractor.n_samples
    if longest > heard:  # which it would cut off without a word
        raise UsageError(
            f"a clip lasts {longest / SAMPLE_RATE:.2f} s, and this model hears "
            f"{heard / SAMPLE_RATE:g} s: take shorter ones, such as --lengths "
            f"0-{heard / SAMPLE_RATE:g}"
        )
    made = _whisper_frames(extractor, waves)
    mask = made["attention_mask"]
    halves = (mask.sum(1) - 1) // 2 + 1
    inputs = {"input_features": made["input_features"], "feature_attention_mask": mask}
    return inputs, ((halves - 2) // 2 + 1).tolist()


def _voxtral(extractor: Any, waves: Sequence[Any]) -> Heard:
    """Each wave in windows of the extractor's length, stacked along the batch."""
    window = extractor.n_samples
    pieces, counts = [], []
    for wave in waves:
        parts = [wave[at : at + window] for at in range(0, len(wave), window)]
        pieces += parts
        counts.append(len(parts))
    made = _whisper_frames(extractor, pieces)
    positions = made["input_features"].shape[2] // 8
    return {"input_features": made["input_features"]}, [positions * n for n in counts]


def _granite_speech(extractor: Any, waves: Sequence[Any]) -> Heard:
    made = extractor([torch.as_tensor(wave) for wave in waves])
    sizes = made.pop("audio_embed_sizes")
    return dict(made), [int(n) for n in sizes]


def _qwen3_asr(extractor: Any, waves: Sequence[Any]) -> Heard:
    made = _whisper_frames(extractor, waves, padding=True)
    mask = made["attention_mask"]
    frames = mask.sum(1)
    rest = frames % 100
    for _ in range(3):  # convolutions of stride 2, over windows of a second
        rest = (rest - 1) // 2 + 1
    inputs = {"input_features": made["input_features"], "input_features_mask": mask}
    return inputs, (rest + 13 * (frames // 100)).tolist()


LISTENING: dict[str, Listening] = {
    "phi4_multimodal": Listening(
        _phi4_multimodal,
        plain=("<|user|>", "Transcribe the audio clip into text.<|end|><|assistant|>"),
    ),
    "gemma4_unified": Listening(
        _gemma4_unified,
        ask="Transcribe the following speech segment in English into English text.",
        wrap=("boa_token", "eoa_token"),
    ),
    "qwen2_audio": Listening(_qwen2_audio, ask="Generate the transcription in English:"),
    "voxtral": Listening(
        _voxtral,
        plain=("<s>[INST][BEGIN_AUDIO]", "[/INST]lang:en[TRANSCRIBE]"),
        padded_to=30.0,
    ),
    "granite_speech": Listening(
        _granite_speech, ask="can you transcribe the speech into a written format?"
    ),
    "qwen3_asr": Listening(_qwen3_asr, ask="", answer="language English<asr_text>"),
}
"""`config.model_type` to how it listens."""


class OtherProcessor(ClipPrompts):
    """A model's own feature extractor and tokenizer, with a prompt that asks for a transcript."""

    def __init__(self, extractor: Any, tokenizer: Any, listening: Listening, speech: Anatomy):
        self.feature_extractor = extractor
        self.tokenizer = tokenizer
        self.listening = listening
        self._speech = speech
        if speech.audio_token_id is None:
            raise UsageError("the model's config names no token for audio")
        self.audio_token_id = speech.audio_token_id
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.before, self.after, end = self._words()
        self._around = (tokens(tokenizer, self.before), tokens(tokenizer, self.after))
        ends = tokens(tokenizer, end)
        self._end_id = ends[0] if ends else tokenizer.eos_token_id

    @property
    def speech(self) -> Anatomy:
        return self._speech

    @property
    def end_id(self) -> int:
        return self._end_id

    def features(self, audio: Any, sampling_rate: int) -> tuple[BatchFeature, list[int]]:
        """What the class's own feature extractor makes of waves (N,), or of a single one."""
        if sampling_rate != SAMPLE_RATE:
            raise ValueError(f"audio is at {sampling_rate} Hz: give {SAMPLE_RATE} Hz")
        if isinstance(audio, Wave) and audio.ndim == 1:
            audio = [audio]
        inputs, counts = self.listening.hear(self.feature_extractor, audio)
        return BatchFeature(inputs), counts

    @property
    def around(self) -> tuple[list[int], list[int]]:
        return self._around

    def positions_of(self, given: Given) -> int:
        seconds = len(given) / SAMPLE_RATE
        if step := self.listening.padded_to:
            seconds = math.ceil(seconds / step) * step
        return math.ceil(seconds / self.speech.seconds) + 2  # windows round up

    def _words(self) -> tuple[str, str, str]:
        """Text before and after the audio, and what ends an answer."""
        asked, tokenizer = self.listening, self.tokenizer
        audio = tokenizer.convert_ids_to_tokens(self.audio_token_id)
        if audio is None:
            raise UsageError(
                f"the model's tokenizer has no token {self.audio_token_id}, its config's for audio"
            )
        opening, closing = (getattr(tokenizer, name, None) or "" for name in asked.wrap)
        if not getattr(tokenizer, "chat_template", None):
            if asked.plain is None:
                raise UsageError(
                    "the model's tokenizer has no chat template, and melprobe knows no other way "
                    "to ask it"
                )
            return asked.plain[0] + opening, closing + asked.plain[1], ""
        said = [{"type": "text", "text": asked.ask}] if asked.ask else []
        heard: Any = [{"type": "audio"}, *said]
        try:
            text = chat(tokenizer, heard)
        except (TypeError, TemplateError):  # it takes no lists, such as Phi-4's
            text = ""
        if text.count(audio) != 1:  # a template for text alone
            heard = audio + asked.ask
            text = chat(tokenizer, heard)
        if text.count(audio) != 1:
            raise UsageError(
                f"the model's chat template puts {text.count(audio)} audio tokens ({audio}) "
                "where one clip is given"
            )
        before, after = text.split(audio)
        answered = chat(tokenizer, heard, "ANSWER").partition("ANSWER")[2]
        return before + opening, closing + after + asked.answer, answered.lstrip()


def load_other(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    device_map: str | None = None,
) -> tuple[PreTrainedModel, Prompts]:
    """A speech LLM, or a plain one, by hub id or folder, in eval mode, with what asks it.

    device_map: as in transformers, in place of `device`, for a model that one device can't hold.
    Raises UsageError for a class that has no adapter, and for what isn't there.
    """
    config = read_other_config(name)
    plain = only_reads(config)
    try:
        model, found = _auto_class(config).from_pretrained(
            name, dtype=dtype, device_map=device_map, output_loading_info=True
        )
        extractor = None if plain else AutoFeatureExtractor.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"--model {name}: {' '.join(str(error).split())}") from None
    if missing := sorted(found["missing_keys"]):  # they were drawn at random
        raise UsageError(f"--model {name}: {len(missing)} tensors are missing: {missing[0]} …")
    decoder_blocks(model)  # what keeps them elsewhere can't be cut
    if device is not None and device_map is None:
        model.to(device)
    model.generation_config = token_ids_only(model.generation_config)
    processor: Prompts
    if plain:
        processor = text_prompts(tokenizer)
    else:
        kind = config.model_type
        processor = OtherProcessor(extractor, tokenizer, LISTENING[kind], KNOWN[kind](config))
    ends = model.generation_config.eos_token_id
    known = ends if isinstance(ends, list) else [ends]
    if processor.end_id not in known:  # the end of its turn ends a transcript
        found = [end for end in known if end is not None]
        model.generation_config.eos_token_id = [*found, processor.end_id]
    return model.eval(), processor


def _auto_class(config: Any) -> Any:
    return AutoModelForCausalLM if only_reads(config) else AutoModelForMultimodalLM


def read_other_config(name: str) -> Any:
    """A speech LLM's configuration, or a plain one's.

    UsageError where there is none, or no adapter for it.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--model {name}: no config can be read by that name, on the hub or on disk "
            f"({' '.join(str(error).split())})"
        ) from None
    if config.model_type == "mel_llm":
        raise UsageError(f"--model {name}: it was trained here; name it by --checkpoint")
    if config.model_type not in LISTENING and not only_reads(config):
        raise UsageError(
            f"--model {name}: {config.model_type} has no adapter; there are "
            f"{', '.join(LISTENING)}, and plain language models. docs/other-models.md shows what "
            "one needs"
        )
    return config


@cache  # asked for before a study and after it, and weights are many gigabytes
def weights_hash(name: str) -> str:
    """The hub's hash of the model's revision, or of a folder sha256 over its weights."""
    if commit := getattr(read_other_config(name), "_commit_hash", None):
        return commit
    digest = hashlib.sha256()
    for path in sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]):
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()


def weights_gb(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Parameters in billions and what they take in GB, counted without loading them."""
    config = read_other_config(name)
    with torch.device("meta"):
        model = _auto_class(config).from_config(config)
    n = sum(parameter.numel() for parameter in model.parameters())
    return n / 1e9, n * dtype.itemsize / 1e9
