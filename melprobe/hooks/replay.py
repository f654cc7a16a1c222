"""One batch heard once and replayed under many interventions, each for a fraction of its price.

What a layer study asks of every variant is the likelihood of the references and the greedy answer.
Four things make it cheap, and in exact arithmetic none changes what comes out:

- *Prefix reuse*: below its first changed block a variant is the intact model, so those blocks, and
  an audio front of ours, hand out what they computed then.
- *Two answers in one pass*: the reference and the intact model's own answer both follow the same
  prompt, whose positions dominate; the draft does not see the reference before it.
- *Decoding by verification*: the intact answer is the draft. If the variant's most likely tokens
  are the draft's, that is its answer too; only behind the first other token it has to decode.
  Decoding step by step rounds otherwise than one wide pass does, so a token that the wide pass
  prefers to the draft's even in the intact model makes no difference.
- *Decoding together*: what is left to decode of many variants goes into one batch, in which each
  cut sees its own variant's rows alone.

Shapes: B clips, S = P + R + G positions (prompts padded on the left, references, drafts), D width,
V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, DynamicCache, PreTrainedModel

from melprobe.errors import UsageError
from melprobe.hooks.anatomy import anatomy
from melprobe.hooks.cuts import hide_keys, residuals, turn
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.positions import Kind, kinds_are, position_kinds, rows_of, selected
from melprobe.model.exit import check_reached
from melprobe.model.inference import greedy_ids, logits_at, score_tokens
from melprobe.model.prompts import Given, Prompts

_NOTHING = -100
"""Stands where a shorter answer has no token."""
_KV = ("keys", "values")
_IN_CACHE = 2**19
"""numbers: over a large vocabulary that is four times as fast as all rows at once"""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a model, cut or not, makes of a batch."""

    nll: Tensor
    """(B,) of the references in nat, summed over each one's tokens, end token included."""
    tokens: Tensor
    """(B,) how many those are."""
    kl: Tensor
    """(B,) KL(intact ‖ this) of the next token in nat, summed over the same tokens."""
    answers: list[list[int]]
    """Token ids of the greedy answers, end token included where there is one."""
    seconds: float
    """Wall time; of the intact run, that of plain decoding. None of what was decoded together."""


class Variant(NamedTuple):
    """One way to cut a model."""

    cut: Callable[[], AbstractContextManager[Any]]
    """Begins the cut; called anew for every `with`."""
    reuse: int = 0
    """How many blocks, from the bottom, give what they gave in the intact run."""
    by_position: bool = True
    """Whether all its hooks go by a `PositionTracker`, so that it can be kept to some rows."""


class _Open(NamedTuple):
    """Answers of one variant that have not come to their end."""

    variant: Variant
    rows: Tensor
    """(N,) which clips"""
    answers: list[list[int]]
    """of these rows, written on in place"""
    cache: DynamicCache
    """of these rows"""

    def bytes(self) -> int:
        return sum(2 * layer.keys.nbytes for layer in self.cache.layers)


class Replay:
    """The intact run of one batch, and the same batch again under any number of cuts."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        processor: Prompts,
        given: Sequence[Given],
        texts: Sequence[str],
        max_new_tokens: int,
    ):
        """given: waves (float32, mono, 16 kHz) or texts to read; texts: a reference in plain form

        for each.

        With `max_new_tokens` 0 nothing is decoded, and answers are empty.
        """
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.blocks = decoder_blocks(model)
        self.speech = anatomy(model)
        check_reached(model.config, range(len(self.blocks)))
        self.end_ids = _end_ids(model)
        prompts = processor(given).to(model.device)
        start = time.perf_counter()
        written: list[list[int]] = [[] for _ in given]
        if max_new_tokens:
            written = greedy_ids(model, prompts, max_new_tokens).tolist()
        seconds = time.perf_counter() - start
        drafts = [self._ended(ids) for ids in written]
        self.references = _padded([processor.answer_ids(t) for t in texts], model.device)
        self.drafts = _padded(drafts, model.device)
        self.n_prompt = prompts["input_ids"].shape[1]
        self.inputs = self._inputs(prompts, processor.tokenizer.pad_token_id)
        self.kinds = self._kinds(prompts)
        self._check_window()
        self._find_places()
        self.residuals: list[Tensor] = []  # h_0 to h_L
        self.front: nn.Module | None = getattr(model, "audio_front", None)
        self.heard: list[Tensor] = []  # what the front makes of the clips
        with ExitStack() as stack:
            if self.front is not None:
                handle = self.front.register_forward_hook(lambda *call: self.heard.append(call[-1]))
                stack.callback(handle.remove)
            for block in self.blocks:
                handle = block.register_forward_hook(self._keep, with_kwargs=True)
                stack.callback(handle.remove)
            logits, self.cache = self._run()
        self.preferred = self._preferred(logits)
        self.scores = score_tokens(logits[self.of_references], self.references)
        """Of the intact run."""
        self.chances = self.scores.log_probs.exp()
        nll, self.entropy = self._likelihood(logits)
        kl = torch.zeros_like(self.scores.nll)
        self.intact = Heard(self._per_clip(nll), self.scores.tokens, kl, drafts, seconds)

    @torch.no_grad()
    def hear(self, reuse: int = 0) -> Heard:
        """The batch under the hooks that are active now.

        reuse: how many blocks, from the bottom, give what they gave in the intact run. Hooks on
        them still run, so that a block whose output alone is changed counts among them.
        """
        (heard,) = self.hear_each([Variant(nullcontext, reuse, by_position=False)])
        return heard

    @torch.no_grad()
    def hear_each(self, variants: Iterable[Variant], memory_mb: int = 512) -> Iterator[Heard]:
        """The batch under each variant, in order; they come some at a time.

        memory_mb: of keys and values, of what is decoded together.
        """
        waiting: list[Heard] = []
        unfinished: list[_Open] = []
        for variant in variants:
            with variant.cut():
                heard, rest = self._check(variant)
                if rest and not variant.by_position:
                    self._decode([rest])
            waiting.append(heard)
            if rest and variant.by_position:
                unfinished.append(rest)
            if sum(rest.bytes() for rest in unfinished) > memory_mb * 1e6 or not unfinished:
                self._decode(unfinished)
                yield from waiting
                waiting, unfinished = [], []
        self._decode(unfinished)
        yield from waiting

    def _check(self, variant: Variant) -> tuple[Heard, _Open | None]:
        """One pass: likelihoods, the answers as far as they are drafts, and what is left."""
        start = time.perf_counter()
        with ExitStack() as stack:
            if self.front is not None and self.heard:
                stack.enter_context(_giving(self.front, self.heard[0]))
            reused = self.blocks[: variant.reuse]
            for block, output in zip(reused, self.residuals[1:], strict=False):
                stack.enter_context(_giving(block, output))
            logits, cache = self._run()
        nll, cross = self._likelihood(logits)
        kl = (cross - self.entropy).clamp(min=0)  # below only by rounding
        answers = self._answers(logits)
        seconds = time.perf_counter() - start
        heard = Heard(self._per_clip(nll), self.scores.tokens, self._per_clip(kl), answers, seconds)
        rows = [row for row, answer in enumerate(answers) if not self._done(answer)]
        if not rows:
            return heard, None
        for layer in range(variant.reuse):
            kept = self.cache.layers[layer]
            cache.update(kept.keys, kept.values, layer)
        where = torch.tensor(rows, dtype=torch.long, device=logits.device)
        cache.batch_select_indices(where)
        return heard, _Open(variant, where, [answers[row] for row in rows], cache)

    @property
    def _draft_start(self) -> int:
        return self.n_prompt + self.references.shape[1]

    def where(self, positions: str) -> Tensor:
        """(B, S) bool: these positions."""
        return selected(self.kinds, positions, self.speech)

    def block_change(self, positions: str, span: int = 1) -> list[tuple[Tensor, Tensor]]:
        """(B,) mean cosine and angle / π by which each block of the intact model turns the residual

        at these positions of prompt and reference; see `melprobe.hooks.cuts.turn`.
        span: blocks from each one on that are taken together.
        """
        where = self.where(positions)
        where[:, self._draft_start :] = False
        pairs = zip(self.residuals, self.residuals[span:], strict=False)
        return [turn(*pair, where) for pair in pairs]

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, after = residuals(args, kwargs, output)
        self.residuals += [after] if self.residuals else [before, after]

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` up to and with the first end token."""
        ends = [place for place, token in enumerate(ids) if token in self.end_ids]
        return ids[: ends[0] + 1] if ends else ids

    def _check_window(self) -> None:
        """A sliding window counts columns, and the draft stands a reference behind its prompt.

        What is decoded behind a draft needs columns of its own.
        """
        config: Any = self.model.get_decoder().config
        window, width = getattr(config, "sliding_window", None), self.kinds.shape[1]
        width += self.max_new_tokens
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
        ids = answers
        if (audio := self.speech.audio_token_id) is not None:
            ids = ids.masked_fill(ids == audio, 0)
        ids = ids.masked_fill(answers == _NOTHING, pad)
        return {
            **prompts,
            "input_ids": torch.cat([prompts["input_ids"], ids], 1),
            "attention_mask": torch.cat([present, (answers != _NOTHING).long()], 1),
            "position_ids": torch.cat(
                [(present.cumsum(1) - 1).clamp(min=0), length + torch.cat(counts).to(length)], 1
            ),
        }

    def _kinds(self, prompts: BatchFeature) -> Tensor:
        ids, speech = prompts["input_ids"], self.speech.audio_token_id
        before = position_kinds(ids, speech, prompts["attention_mask"])
        return torch.cat(
            [before, self.inputs["attention_mask"][:, self.n_prompt :] * Kind.ANSWER], 1
        )

    def _find_places(self) -> None:
        """Where tokens of references and drafts are foretold, and which rows of logits those are.

        The first token of either is foretold by the prompt's last position.
        """
        last = self.n_prompt - 1
        by_reference = torch.arange(last, last + self.references.shape[1])
        by_draft = torch.arange(self.drafts.shape[1]) + self._draft_start - 1
        by_draft[:1] = last
        is_token = self.references != _NOTHING
        self.asked = torch.zeros_like(self.kinds, dtype=torch.bool)  # (B, S)
        self.asked[:, by_reference] |= is_token
        self.asked[:, by_draft] |= self.drafts != _NOTHING
        row = self.asked.flatten().cumsum(0).view_as(self.asked) - 1
        self.of_references = row[:, by_reference][is_token]  # (N,)
        self.of_drafts = row[:, by_draft]  # (B, G); means nothing where a draft has ended
        self.clip_of = is_token.nonzero()[:, 0]  # (N,)

    def _run(self) -> tuple[Tensor, DynamicCache]:
        """Logits (asked places, V), and the cache; it stays empty where nothing is decoded."""
        cache, width = DynamicCache(), self.kinds.shape[1]
        unread = torch.zeros(width, width, dtype=torch.bool, device=self.kinds.device)
        unread[self._draft_start :, self.n_prompt : self._draft_start] = True
        with hide_keys(self.model, unread[None, None]), kinds_are(self.kinds):
            logits = logits_at(
                self.model,
                self.asked,
                **self.inputs,
                past_key_values=cache if self.max_new_tokens else None,
                use_cache=bool(self.max_new_tokens),
            )
        return logits, cache

    def _likelihood(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) of each reference token: its NLL, and the cross-entropy from the intact model's

        next-token distribution, nat. KL is the latter less its own value on the intact run: exactly
        zero where the logits are the same.
        """
        said = self.references[self.references != _NOTHING]
        rows = len(said) if logits.is_cuda else max(1, _IN_CACHE // logits.shape[1])
        pieces = zip(
            *(x.split(rows) for x in (self.of_references, said, self.chances)), strict=True
        )
        nll, cross = [], []
        for places, tokens, chances in pieces:
            scores = logits[places].float()
            total = scores.logsumexp(-1)
            nll.append(total - scores.gather(1, tokens[:, None])[:, 0])
            cross.append(total - torch.linalg.vecdot(chances, scores))
        return torch.cat(nll), torch.cat(cross)

    def _per_clip(self, values: Tensor) -> Tensor:
        """(B,) sums of values (N,) over each clip's reference."""
        return torch.zeros_like(self.scores.nll).index_add_(0, self.clip_of, values)

    def _answers(self, logits: Tensor) -> list[list[int]]:
        """Greedy answers: the drafts where they hold, else up to and with the first other token."""
        answers = [ids[ids != _NOTHING].tolist() for ids in self.drafts]
        if not self.max_new_tokens:
            return answers
        chosen = self._preferred(logits)
        other = (chosen != self.drafts) & (chosen != self.preferred) & (self.drafts != _NOTHING)
        for row in other.any(1).nonzero()[:, 0].tolist():
            place = int(other[row].int().argmax())
            answers[row] = [*answers[row][:place], int(chosen[row, place])]
        return answers

    def _preferred(self, logits: Tensor) -> Tensor:
        """(B, G) the most likely token at each place of the draft."""
        # Not argmax: on a CPU that takes almost three times as long in bfloat16.
        return logits.max(-1).indices[self.of_drafts]

    def _decode(self, unfinished: Sequence[_Open]) -> None:
        """Write answers on to their ends, in place, each row under its own variant's cut alone."""
        answers = [answer for rest in unfinished for answer in rest.answers]
        if not answers:
            return
        rows = torch.cat([rest.rows for rest in unfinished])
        cache = _joined([rest.cache for rest in unfinished])
        owner = torch.repeat_interleave(
            torch.arange(len(unfinished)), torch.tensor([len(rest.rows) for rest in unfinished])
        ).to(rows.device)
        mask = self.inputs["attention_mask"][rows]
        drafts = torch.arange(self.drafts.shape[1], device=mask.device)
        agreed = torch.tensor([[len(answer) - 1] for answer in answers], device=mask.device)
        nothing = torch.zeros_like(self.references[rows])
        mask = torch.cat([mask[:, : self.n_prompt], nothing, (drafts < agreed).long()], 1)
        place, kinds = mask.sum(1, keepdim=True), self.kinds[rows]
        with ExitStack() as stack:
            filters = []
            for number, rest in enumerate(unfinished):
                if not rest.variant.by_position:
                    continue  # its cut is active already
                filters.append(stack.enter_context(rows_of(owner == number)))
                stack.enter_context(rest.variant.cut())
            while True:
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
                tokens = output.logits[:, -1].argmax(-1).tolist()
                for answer, token in zip(answers, tokens, strict=True):
                    answer.append(token)
                place = place + 1
                going = [i for i, answer in enumerate(answers) if not self._done(answer)]
                if not going:
                    return
                if len(going) < len(answers):
                    answers = [answers[i] for i in going]
                    kept = torch.tensor(going, device=mask.device)
                    mask, place, kinds = mask[kept], place[kept], kinds[kept]
                    cache.batch_select_indices(kept)
                    for only in filters:
                        only.rows = only.rows[kept]

    def _done(self, answer: list[int]) -> bool:
        return len(answer) >= self.max_new_tokens or answer[-1] in self.end_ids


@contextmanager
def _giving(block: nn.Module, output: Tensor) -> Iterator[None]:
    """The block hands out `output` without any work; hooks on it run as ever."""
    block.forward = lambda *args, **kwargs: output  # type: ignore[method-assign]
    try:
        yield
    finally:
        del block.forward


def _joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of all of them, in order; uses them up."""
    cache = DynamicCache()
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys, values = (torch.cat([getattr(layer, name) for layer in layers]) for name in _KV)
        cache.update(keys, values, number)
        for layer in layers:  # its rows are in the joined one now
            layer.keys = layer.values = None
    return cache


def _padded(answers: list[list[int]], device: torch.device) -> Tensor:
    rows = [torch.tensor(answer, dtype=torch.long) for answer in answers]
    return pad_sequence(rows, batch_first=True, padding_value=_NOTHING).to(device)


def _end_ids(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}
