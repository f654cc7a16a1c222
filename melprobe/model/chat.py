"""How a tokenizer's chat template asks a model, and how a plain language model is asked to copy."""

import re
from typing import Any

from jinja2 import TemplateError

from melprobe.errors import UsageError
from melprobe.model.prompts import TextPrompts

COPY = "Repeat this text word for word, and write nothing else.\n"
"""What the user says before a text, where the tokenizer has a chat template.

One line break: tokenizers like GPT-2's make one token of two where they end a piece, and two
tokens before a word, so that the last text would stand behind other tokens than the examples.
"""
EXAMPLES = ("please wait a moment", "where are you going")
"""Texts with their copies stand before the one that is asked for: a small model that is only told

to copy often chats.
"""
ANSWER = "<|answer|>"
"""Stands between a text and its copy in what bases trained here have read."""


def tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt's text; Mistral's tokenizer doesn't read its markup as tokens."""
    ids: list[Any] = []
    for piece in re.split(r"(<[^<>\s]+>|\[/?[A-Z_]+\])", text):
        token = tokenizer.convert_tokens_to_ids(piece) if piece else None
        known = piece[:1] in "<[" and token not in (None, tokenizer.unk_token_id)
        ids += [token] if known else tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def chat(tokenizer: Any, *said: Any) -> str:
    """A chat of user and assistant in turn, up to where the assistant's answer is to begin."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(said)]
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=len(said) % 2 == 1
    )


def text_prompts(tokenizer: Any) -> TextPrompts:
    """How a plain language model is asked to copy."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not getattr(tokenizer, "chat_template", None):
        return _by_example(tokenizer)
    shown = [said for text in EXAMPLES for said in (COPY + text, text)]
    try:
        text = chat(tokenizer, *shown, COPY + "WORDS")
    except TemplateError as error:
        raise UsageError(f"the model's chat template refuses to ask for a copy ({error})") from None
    if text.count("WORDS") != 1:
        raise UsageError(
            f"the model's chat template gives what the user says {text.count('WORDS')} times"
        )
    before, after = (tokens(tokenizer, part) for part in text.split("WORDS"))
    end = chat(tokenizer, COPY, "ANSWER").partition("ANSWER")[2].lstrip()
    ends = tokens(tokenizer, end)
    return TextPrompts(tokenizer, (before, after), ends[0] if ends else tokenizer.eos_token_id)


def _by_example(tokenizer: Any) -> TextPrompts:
    """Without a chat."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if ANSWER in tokenizer.get_vocab():
        after = [tokenizer.convert_tokens_to_ids(ANSWER)]
        return TextPrompts(tokenizer, (bos, after), tokenizer.eos_token_id)
    shown = "".join(f"Text:\n{text}\nCopy:\n{text}\n\n" for text in EXAMPLES)
    before, after, end = (
        tokenizer(words, add_special_tokens=False)["input_ids"]
        for words in (f"{shown}Text:\n", "\nCopy:\n", "\n")
    )
    # The end of a line ends the copy; some tokenizers put a space in front of it or have none.
    (end_id,) = end[-1:] or [tokenizer.eos_token_id]
    return TextPrompts(tokenizer, ([*bos, *before], after), end_id)
