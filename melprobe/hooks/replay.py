"""One batch heard once and replayed under many interventions, each for a fraction of its price.

What a layer study asks of every variant is the likelihood of the references and the greedy answer.
Three things make it cheap, and in exact arithmetic none changes what comes out:

- *Prefix reuse*: below its first changed block a variant is the intact model, so those blocks hand
  out what they computed then.
- *Two answers in one pass*: the reference and the intact model's own answer both follow the same
  prompt, whose positions dominate; the draft does not see the reference before it.
- *Decoding by verification*: the intact answer is the draft. If the variant's most likely tokens
  are the draft's, that is its answer too; only behind the first other token it has to decode.
  Decoding step by step rounds otherwise than one wide pass does, so a token that the wide pass
  prefers to the draft's even in the intact model makes no difference.

Shapes: B clips, S = P + R + G positions (prompts padded on the left, references, drafts), D width,
V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, DynamicCache

from melprobe.errors import UsageError
from melprobe.hooks.cuts import hide_keys, residuals, turn
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.positions import Kind, kinds_are, position_kinds, selected
from melprobe.model.inference import AnswerScores, greedy_ids, score_tokens
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.model.processor import MelLLMProcessor

_NOTHING = -100
"""Stands where a shorter answer has no token."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a model, cut or not, makes of a batch."""

    scores: AnswerScores
    """Of the references."""
    answers: list[list[int]]
    """Token ids of the greedy answers, end token included where there is one."""
    seconds: float
    """Wall time; of the intact run, that of plain decoding."""


class Replay:
    """The intact run of one batch; `hear` runs it again under whatever hooks are active then."""

    @torch.no_grad()
    def __init__(
        self,
        model: MelLLMForConditionalGeneration,
        processor: MelLLMProcessor,
        waves: Sequence[np.ndarray],
        texts: Sequence[str],
        max_new_tokens: int,
    ):
        """waves: float32, mono, 16 kHz; texts: references in plain form, one for each.

        With `max_new_tokens` 0 nothing is decoded, and answers are empty.
        """
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.blocks = decoder_blocks(model)
        self.end_ids = _end_ids(model)
        prompts = processor(waves).to(model.device)
        start = time.perf_counter()
        written: list[list[int]] = [[] for _ in waves]
        if max_new_tokens:
            written = greedy_ids(model, prompts, max_new_tokens).tolist()
        seconds = time.perf_counter() - start
        drafts = [self._ended(ids) for ids in written]
        self.references = _padded([processor.answer_ids(t) for t in texts], model.device)
        self.drafts = _padded(drafts, model.device)
        self.n_prompt = prompts["input_ids"].shape[1]
        self.inputs = self._inputs(prompts, processor.tokenizer.pad_token_id)
        self.kinds = self._kinds(prompts, processor.audio_token_id)
        self._check_window()
        self.residuals: list[Tensor] = []  # h_0 to h_L
        with ExitStack() as stack:
            for block in self.blocks:
                handle = block.register_forward_hook(self._keep, with_kwargs=True)
                stack.callback(handle.remove)
            logits, self.cache = self._run()
        self.preferred = self._preferred(logits)
        self.intact = Heard(self._scores(logits), drafts, seconds)

    @torch.no_grad()
    def hear(self, reuse: int = 0) -> Heard:
        """The batch under the hooks that are active now.

        reuse: how many blocks, from the bottom, give what they gave in the intact run. Hooks on
        them still run, so that a block whose output alone is changed counts among them.
        """
        start = time.perf_counter()
        with ExitStack() as stack:
            for block, output in zip(self.blocks[:reuse], self.residuals[1:], strict=False):
                stack.enter_context(_giving(block, output))
            logits, cache = self._run()
        for layer in range(reuse):
            kept = self.cache.layers[layer]
            cache.update(kept.keys, kept.values, layer)
        answers = self._answers(logits, cache)
        return Heard(self._scores(logits), answers, time.perf_counter() - start)

    @property
    def _draft_start(self) -> int:
        return self.n_prompt + self.references.shape[1]

    def block_change(self, positions: str) -> list[tuple[Tensor, Tensor]]:
        """(B,) mean cosine and angle / π by which each block of the intact model turns the residual

        at these positions of prompt and reference; see `melprobe.hooks.cuts.turn`.
        """
        where = selected(self.kinds, positions, self.model.config.frames_per_patch)
        where[:, self._draft_start :] = False
        return [turn(*pair, where) for pair in pairwise(self.residuals)]

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, after = residuals(args, kwargs, output)
        self.residuals += [after] if self.residuals else [before, after]

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` up to and with the first end token."""
        ends = [place for place, token in enumerate(ids) if token in self.end_ids]
        return ids[: ends[0] + 1] if ends else ids

    def _check_window(self) -> None:
        """A sliding window counts columns, and the draft stands a reference behind its prompt."""
        config: Any = self.model.get_decoder().config
        window, width = getattr(config, "sliding_window", None), self.kinds.shape[1]
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        if window and window < width and "sliding_attention" in kinds:
            raise UsageError(
                f"clips with their answers take {width} positions, but this decoder's sliding "
                f"window sees {window}: take shorter clips"
            )

    def _inputs(self, prompts: BatchFeature, pad: int) -> dict[str, Tensor]:
        """Prompt, reference and draft side by side; both answers count on from the prompt."""
        present = prompts["attention_mask"].long()
        answers = torch.cat([self.references, self.drafts], 1)
        length = present.sum(1, keepdim=True)
        counts = [torch.arange(part.shape[1]) for part in (self.references, self.drafts)]
        # No audio stands in an answer, even where a model writes its placeholder.
        ids = answers.masked_fill(answers == self.model.config.audio_token_id, 0)
        ids = ids.masked_fill(answers == _NOTHING, pad)
        return {
            **prompts,
            "input_ids": torch.cat([prompts["input_ids"], ids], 1),
            "attention_mask": torch.cat([present, (answers != _NOTHING).long()], 1),
            "position_ids": torch.cat(
                [(present.cumsum(1) - 1).clamp(min=0), length + torch.cat(counts).to(length)], 1
            ),
        }

    def _kinds(self, prompts: BatchFeature, audio_token_id: int) -> Tensor:
        before = position_kinds(prompts["input_ids"], audio_token_id, prompts["attention_mask"])
        return torch.cat(
            [before, self.inputs["attention_mask"][:, self.n_prompt :] * Kind.ANSWER], 1
        )

    def _run(self) -> tuple[Tensor, DynamicCache]:
        """Logits (B, 1 + R + G, V) from the prompt's last position on, and the cache."""
        cache, width = DynamicCache(), self.kinds.shape[1]
        unread = torch.zeros(width, width, dtype=torch.bool, device=self.kinds.device)
        unread[self._draft_start :, self.n_prompt : self._draft_start] = True
        with hide_keys(self.model, unread[None, None]), kinds_are(self.kinds):
            output = self.model(
                **self.inputs,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=width - self.n_prompt + 1,
            )
        return output.logits, cache

    def _scores(self, logits: Tensor) -> AnswerScores:
        before = logits[:, : self.references.shape[1]]
        return score_tokens(before[self.references != _NOTHING], self.references)

    def _answers(self, logits: Tensor, cache: DynamicCache) -> list[list[int]]:
        """Greedy answers: the drafts where they hold, decoded from the first other token on."""
        if not self.max_new_tokens:
            return [[] for _ in self.drafts]
        chosen = self._preferred(logits)
        other = (chosen != self.drafts) & (chosen != self.preferred) & (self.drafts != _NOTHING)
        answers = [ids[ids != _NOTHING].tolist() for ids in self.drafts]
        rows = other.any(1).nonzero()[:, 0]
        for row in rows.tolist():
            place = int(other[row].int().argmax())
            answers[row] = [*answers[row][:place], int(chosen[row, place])]
        self._decode([answers[row] for row in rows.tolist()], rows, cache)
        return answers

    def _preferred(self, logits: Tensor) -> Tensor:
        """(B, G) the most likely token at each place of the draft."""
        first = self.references.shape[1] + 1
        before = [logits[:, :1], logits[:, first : first + max(0, self.drafts.shape[1] - 1)]]
        return torch.cat(before, 1)[:, : self.drafts.shape[1]].argmax(-1)

    def _decode(self, answers: list[list[int]], rows: Tensor, cache: DynamicCache) -> None:
        """Write the answers of these rows on to their ends, in place."""
        if all(map(self._done, answers)):
            return
        cache.batch_select_indices(rows)
        mask = self.inputs["attention_mask"][rows]
        drafts = torch.arange(self.drafts.shape[1], device=mask.device)
        agreed = torch.tensor([[len(answer) - 1] for answer in answers], device=mask.device)
        nothing = torch.zeros_like(self.references[rows])
        mask = torch.cat([mask[:, : self.n_prompt], nothing, (drafts < agreed).long()], 1)
        place, kinds = mask.sum(1, keepdim=True), self.kinds[rows]
        while not all(map(self._done, answers)):
            mask = F.pad(mask, (0, 1), value=1)
            kinds = F.pad(kinds, (0, 1), value=Kind.ANSWER)
            with kinds_are(kinds):
                output = self.model(
                    input_ids=torch.tensor([answer[-1:] for answer in answers]).to(mask.device),
                    attention_mask=mask,
                    position_ids=place,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            for answer, token in zip(
                answers, output.logits[:, -1].argmax(-1).tolist(), strict=True
            ):
                if not self._done(answer):
                    answer.append(token)
            place = place + 1

    def _done(self, answer: list[int]) -> bool:
        return answer[-1] in self.end_ids or len(answer) >= self.max_new_tokens


@contextmanager
def _giving(block: nn.Module, output: Tensor) -> Iterator[None]:
    """The block hands out `output` without any work; hooks on it run as ever."""
    block.forward = lambda *args, **kwargs: output  # type: ignore[method-assign]
    try:
        yield
    finally:
        del block.forward


def _padded(answers: list[list[int]], device: torch.device) -> Tensor:
    rows = [torch.tensor(answer, dtype=torch.long) for answer in answers]
    return pad_sequence(rows, batch_first=True, padding_value=_NOTHING).to(device)


def _end_ids(model: MelLLMForConditionalGeneration) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}
