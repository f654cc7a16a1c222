"""The text task: a small decoder pretrained on sentences and on copying them.

Copying (`BOS text <|answer|> text EOS`) is what transcribing will ask for once patches stand where
the text stood, so the decoder arrives with the circuit in place, as a large one would.
"""

import copy
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from melprobe.corpus.sentences import read_sentences, word_sequences
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.model.chat import ANSWER
from melprobe.training.processes import Mean, Share, answer_loss
from melprobe.training.recipe import TextRecipe

BOS, EOS = "<|bos|>", "<|eos|>"
_DEV_SENTENCES = 256


class TextTask:
    """A Llama-shaped decoder with its own tokenizer."""

    def __init__(self, recipe: TextRecipe):
        self.recipe = recipe
        files = [name for name in recipe.sentences if name != "words"]
        sentences = [plain_text(s) for name in files for s in read_sentences(name)]
        random.Random(recipe.seed).shuffle(sentences)
        if len(sentences) <= _DEV_SENTENCES:
            raise UsageError(
                f"sentences: {len(sentences)} different ones; {_DEV_SENTENCES} are for dev, and "
                "training needs more"
            )
        self.dev = sentences[:_DEV_SENTENCES]
        # In order of length, so that neighbours make a batch without padding.
        self.train = sorted(sentences[_DEV_SENTENCES:], key=len)
        sequences = word_sequences(random.Random(recipe.seed), 1, 6)
        words = [next(sequences) for _ in range(20_000)] if "words" in recipe.sentences else []
        self.words = sorted(words, key=len)
        self.tokenizer = train_tokenizer(self.train + self.words, recipe.vocabulary)
        torch.manual_seed(recipe.seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=recipe.width,
                intermediate_size=recipe.feed_forward,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                num_key_value_heads=recipe.kv_heads,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                use_cache=False,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        self.heads = nn.Module()  # none

    def batches(self, start: int, share: Share) -> Iterable[tuple[int, dict[str, Tensor]]]:
        for step in range(start, self.recipe.steps):
            examples = self._examples(random.Random(f"{self.recipe.seed} {step}"))
            batch = self._batch([examples[i] for i in share.places(len(examples))])
            if share.idle(len(examples)):
                batch["idle"] = torch.tensor(True)
            yield step, batch

    def losses(
        self, model: Any, batch: dict[str, Tensor], step: int, mean: Mean
    ) -> dict[str, Tensor]:
        return {"train_loss": answer_loss(model, batch, mean)}

    def evaluate(self, step: int) -> dict[str, float]:
        """Loss per token on unseen sentences, plain and copied."""
        plain = self._loss([self._example(s, copy=False) for s in self.dev])
        copied = self._loss([self._example(s, copy=True) for s in self.dev])
        return {"dev_loss": plain + copied, "dev_plain": plain, "dev_copied": copied}

    def tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def save(self, folder: Path, tensors: dict[str, Tensor], log: list[dict[str, Any]]) -> None:
        kept = LlamaForCausalLM(copy.deepcopy(self.model.config))
        kept.load_state_dict(tensors)
        kept.config.use_cache = True
        kept.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "recipe.json").write_text(self.recipe.model_dump_json(indent=2) + "\n")
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))

    def _examples(self, rng: random.Random) -> list[list[tuple[int, bool]]]:
        """A full batch of like length: (token, does its loss count?) pairs."""
        copy = rng.random() < self.recipe.copy_share
        pool = self.words if copy and self.words and rng.random() < 0.5 else self.train
        place, room, examples = rng.randrange(len(pool)), self.recipe.batch_tokens, []
        while room > 0:
            examples.append(self._example(pool[place], copy=copy))
            room -= len(examples[-1])
            place = (place + 1) % len(pool)
        return examples

    def _example(self, sentence: str, *, copy: bool) -> list[tuple[int, bool]]:
        tokens = self.tokenizer(sentence, add_special_tokens=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        said = [(token, True) for token in (*tokens, eos)]
        if not copy:
            return [(bos, False), *said]
        answer = self.tokenizer.convert_tokens_to_ids(ANSWER)
        return [(token, False) for token in (bos, *tokens, answer)] + said

    def _batch(self, examples: list[list[tuple[int, bool]]]) -> dict[str, Tensor]:
        width = max(map(len, examples))
        ids = torch.full((len(examples), width), self.tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(examples):
            tokens = torch.tensor([token for token, _ in example])
            ids[row, : len(example)] = tokens
            labels[row, : len(example)] = tokens.where(torch.tensor([c for _, c in example]), -100)
        mask = (ids != self.tokenizer.pad_token_id).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @torch.no_grad()
    def _loss(self, examples: list[list[tuple[int, bool]]]) -> float:
        batch = self._batch(examples)
        return self.model(**{k: v.to(self.model.device) for k, v in batch.items()}).loss.item()


def train_tokenizer(sentences: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` entries, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, ANSWER, "<|pad|>"]
    tokenizer.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token="<|pad|>"
    )
