"""The Mel-LLM as a regular transformers model: an audio front in front of any causal LM.

It knows nothing of waves or text (the processor does), of adapters on disk (`checkpoint.py`), or
of interventions (`melprobe.hooks`).

Shapes: B batch, S sequence positions, T mel frames, M mel bins, P patches, D width, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from melprobe.audio.mel import FRAMES_PER_SECOND
from melprobe.errors import UsageError
from melprobe.model.adapter import ADAPTER, merged_state
from melprobe.model.config import MelLLMConfig
from melprobe.model.exit import check_exit, speech_leaves
from melprobe.model.front import FRONTS


class MelLLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Decoder-only language model that reads mel patches (arXiv 2606.10231)."""

    config_class = MelLLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = "past_key_values"

    def __init__(self, config: MelLLMConfig):
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.audio_front = FRONTS[config.audio_front](config)
        if config.speech_exit is not None:
            check_exit(self, config.speech_exit)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint; one that holds only adapter and front brings its base model along.

        There `dtype` is float32 unless given; see `melprobe.model.pretrained`.
        """
        if not (Path(pretrained_model_name_or_path) / ADAPTER).is_file():
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        from melprobe.model.pretrained import load_pretrained

        return load_pretrained(Path(pretrained_model_name_or_path), *args, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save all weights, with melprobe's own LoRA folded into what is written.

        An adapter that was added the PEFT way is saved alone, as transformers does it.
        """
        if hasattr(self, "lora_config") and not getattr(self, "_hf_peft_config_loaded", False):
            state = kwargs.get("state_dict")
            kwargs["state_dict"] = merged_state(self, self.state_dict() if state is None else state)
        super().save_pretrained(save_directory, **kwargs)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def embed(
        self,
        input_ids: Tensor,
        input_features: Tensor | None,
        feature_attention_mask: Tensor | None,
    ) -> Tensor:
        """Token embeddings (B, S, D) with the patches of `input_features` (B, T, M) put in place.

        Raises ValueError when a row's placeholders and patches differ in number.
        """
        is_audio = input_ids == self.config.audio_token_id
        # The placeholder may lie outside the vocabulary, so it must not reach the lookup.
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        if input_features is None:
            return embeddings
        if feature_attention_mask is None:
            feature_attention_mask = input_features.new_ones(input_features.shape[:2])
        lengths = feature_attention_mask.sum(1).long()
        patches = self.audio_front(input_features, lengths)  # (B, P, D)
        counts = -(-lengths // self.config.frames_per_patch)
        if not torch.equal(counts, is_audio.sum(1)):
            raise ValueError(
                f"placeholders per row {is_audio.sum(1).tolist()} do not match the patches that "
                f"the audio gives, {counts.tolist()} "
                f"(frames_per_patch={self.config.frames_per_patch})"
            )
        valid = torch.arange(patches.shape[1], device=patches.device) < counts[:, None]
        # Spread over several devices, front and embeddings may lie apart.
        where = is_audio[..., None].to(embeddings.device)
        return embeddings.masked_scatter(where, patches[valid].to(embeddings))

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the mean cross-entropy in nat when `labels` (B, S) are given.

        With labels (ignored where -100, token t stands at position t), logits are computed only
        where a label follows and come as (N, V), rows in reading order: over a large vocabulary
        that saves a fifth of a training step. Without labels they are (B, S, V), or the last
        `logits_to_keep` positions, or where it is True, a mask (B, S): (N, V) in reading order.
        """
        if labels is not None and use_cache is None:
            use_cache = False
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, input_features, feature_attention_mask)
        rows, width, _ = inputs_embeds.shape
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check_room(rows, past + width, position_ids, attention_mask, feature_attention_mask)
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        leaving: AbstractContextManager[None] = nullcontext()
        if self.config.speech_exit is not None and (not past or input_features is not None):
            leaving = self._speech_exit(input_ids, attention_mask, int(past), kwargs)
        if self.config.audio_attention == "bidirectional" and input_features is not None:
            attention_mask = self._audio_span_mask(
                input_ids, inputs_embeds, attention_mask, past_key_values, position_ids
            )
        with leaving:
            outputs = self.get_decoder()(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        hidden, loss = outputs.last_hidden_state, None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            labelled = targets != -100
            logits = self.get_output_embeddings()(hidden[labelled])
            loss = F.cross_entropy(logits.float(), targets[labelled])
        else:
            if isinstance(logits_to_keep, int):
                hidden = hidden[:, -logits_to_keep:]
            else:
                mask = logits_to_keep.dtype == torch.bool
                hidden = hidden[logits_to_keep] if mask else hidden[:, logits_to_keep]
            # As one list of rows: a slice leaves gaps between them (for a single clip they count as
            # contiguous all the same), and then torch would copy the output weights for every row,
            # which took four fifths of the time of a pass that keeps the answer alone.
            flat = hidden.flatten(0, -2)
            logits = self.get_output_embeddings()(flat).unflatten(0, hidden.shape[:-1])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_room(
        self,
        rows: int,
        width: int,
        position_ids: Tensor | None,
        attention_mask: Any,
        feature_attention_mask: Tensor | None,
    ) -> None:
        """Past its last position a decoder still answers, but garbage: UsageError instead."""
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is None or width <= limit:
            return
        taken = [width] * rows
        if position_ids is not None:
            taken = (position_ids.amax(1) + 1).expand(rows).tolist()
        elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            taken = attention_mask.sum(1).tolist()
        for row, used in enumerate(taken):
            if used > limit:
                seconds = ""
                if feature_attention_mask is not None:
                    seconds = f" ({feature_attention_mask[row].sum() / FRAMES_PER_SECOND:.1f} s)"
                raise UsageError(
                    f"clip {row + 1} of {rows} in the batch{seconds} takes {used} positions with "
                    f"its text, and the decoder has {limit}: cut the clip"
                )

    def _speech_exit(
        self, input_ids: Tensor | None, attention_mask: Any, past: int, asked: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """What makes speech leave the decoder in the coming pass, where the pass has any."""
        if input_ids is None:
            raise ValueError("speech_exit finds the patches in input_ids")
        for name in ("output_hidden_states", "output_attentions"):
            if asked.get(name, getattr(self.get_decoder().config, name, False)):
                raise UsageError(
                    f"{name}: above block {self.config.speech_exit}, where speech leaves this "
                    "model, there is none for all positions"
                )
        speech = input_ids == self.config.audio_token_id
        if not speech.any():
            return nullcontext()
        text = ~speech
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            text &= attention_mask[:, past : past + speech.shape[1]].bool()
        return speech_leaves(self, speech, text, past)

    def _audio_span_mask(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        position_ids: Tensor | None,
    ) -> Any:
        """Causal mask in which patches of one clip also see the patches after them."""
        if input_ids is None:
            raise ValueError("bidirectional audio attention finds the patches in input_ids")
        is_audio = input_ids == self.config.audio_token_id

        def inside_audio(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return is_audio[batch, query] & is_audio[batch, key]

        return create_causal_mask(
            config=self.get_decoder().config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            or_mask_function=inside_audio,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Give the audio to the first step alone; afterwards it lives in the cache."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        past = inputs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            inputs["input_features"] = inputs["feature_attention_mask"] = None
        return inputs


AutoConfig.register("mel_llm", MelLLMConfig)
AutoModelForCausalLM.register(MelLLMConfig, MelLLMForConditionalGeneration)
