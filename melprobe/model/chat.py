"""How a tokenizer's chat template asks a model, and how a plain language model is asked to copy."""

import re
from typing import Any

from melprobe.errors import UsageError
from melprobe.model.prompts import TextPrompts

COPY = "Repeat this text word for word, and write nothing else.\n\n"
"""What the user says before the text, where the tokenizer has a chat template."""
EXAMPLES = "".join(
    f"Text:\n{text}\nCopy:\n{text}\n\n" for text in ("please wait a moment", "where are you going")
)
"""What stands before the text where there is none."""
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


def chat(tokenizer: Any, content: Any, answer: str = "") -> str:
    """What the user says, and what stands before the answer; or with the answer and its end."""
    turns = [{"role": "user", "content": content}]
    if answer:
        turns.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answer)


def text_prompts(tokenizer: Any) -> TextPrompts:
    """How a plain language model is asked to copy."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not getattr(tokenizer, "chat_template", None):
        return _by_example(tokenizer)
    text = chat(tokenizer, COPY + "WORDS")
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
    before, after, end = (
        tokenizer(words, add_special_tokens=False)["input_ids"]
        for words in (f"{EXAMPLES}Text:\n", "\nCopy:\n", "\n")
    )
    # The end of a line ends the copy; some tokenizers put a space in front of it or have none.
    (end_id,) = end[-1:] or [tokenizer.eos_token_id]
    return TextPrompts(tokenizer, ([*bos, *before], after), end_id)
