"""A chat as the token ids that a model reads: its own template, and contents that can be nothing but text.

A template's control tokens begin and end messages. Written inside of a message, by a person or by a page that was
found, they would begin another one; here they are cut into pieces before they are tokenised, so they are read as the
characters that they are.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from neuroweave.text.tokens import start_tokens

Message = dict[str, Any]  # role, content, and what a template may want besides
PLAIN_ROLES = {"system": "", "user": "User: ", "assistant": "Assistant: "}
# Where a model without a template has begun to write for others.
PLAIN_STOPS = ("\nUser:", "\nSystem:", "<source ", "</source ")
SPEAKER = re.compile(r"^(?=[ \t]*(?:system|user|assistant|tool)[ \t]*:)", re.IGNORECASE | re.MULTILINE)
MARK = "\ue000{}:{}\ue001"  # private use, and a word that nobody can guess


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def takes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template does anything with tools."""
    template = getattr(tokenizer, "chat_template", None)
    return "tools" in (template if isinstance(template, str) else str(template or ""))


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None
) -> list[int]:
    """The chat, up to where the assistant answers. Without a template: "User: ...", "Assistant: ...", line by line.

    Raises ValueError for a chat that the template refuses.
    """
    if not has_template(tokenizer):
        return plain_chat(tokenizer, messages)
    control = control_pattern(tokenizer)
    if control is not None:
        messages = [
            {key: value if key == "content" else defused(value, control) for key, value in message.items()}
            for message in messages
        ]
        tools = defused(tools, control)
    texts = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    if control is None or not any(control.search(text) for text in texts):
        return list(filled_in(tokenizer, messages, tools, tokenize=True))
    mark = MARK.format(secrets.token_hex(8), "{}")  # stands for a content while the template is filled in
    marked = [
        {**message, "content": mark.format(number)} if isinstance(message.get("content"), str) else message
        for number, message in enumerate(messages)
    ]
    ids: list[int] = []
    for place, piece in enumerate(re.split(mark.format(r"(\d+)"), filled_in(tokenizer, marked, tools, tokenize=False))):
        ids += as_text(tokenizer, messages[int(piece)]["content"]) if place % 2 else as_template(tokenizer, piece)
    return ids


def filled_in(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any, *, tokenize: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=True, tokenize=tokenize, return_dict=False
        )
    except Exception as error:  # a template is somebody's program
        reason = str(error) or type(error).__name__
        raise ValueError(f"the model's chat template refuses this chat ({reason})") from error


def defused(value: Any, control: re.Pattern[str]) -> Any:
    """What a template may print as it likes, with a word joiner in each control token: its rest may begin another."""
    if isinstance(value, str):
        while control.search(value):
            value = control.sub(lambda match: f"{match[0][0]}\u2060{match[0][1:]}", value)
        return value
    if isinstance(value, dict):
        return {defused(key, control): defused(each, control) for key, each in value.items()}
    return [defused(each, control) for each in value] if isinstance(value, list | tuple) else value


def plain_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    lines = [
        PLAIN_ROLES.get(each["role"], f"{each['role'].capitalize()}: ") + SPEAKER.sub(r"> \g<0>", each["content"])
        for each in messages
    ]
    start = list(start_tokens(tokenizer))
    return start + as_text(tokenizer, "\n".join([*lines, PLAIN_ROLES["assistant"].strip()]))


def as_template(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text of which no part is taken for a control token."""
    control, pieces, place = control_pattern(tokenizer), [], 0
    while control and (match := control.search(text, place)):
        pieces += [text[place : match.start()], match[0][0]]
        place = match.start() + 1  # its rest may be the start of another one
    pieces = [piece for piece in (*pieces, text[place:]) if piece]
    if not pieces:
        return []
    return [id for ids in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] for id in ids]


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What the tokenizer takes for an added token wherever it stands, be it marked as special or not."""
    return pattern_of(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def pattern_of(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str] | None:
    """`size`: of the vocabulary, which may grow."""
    words = [str(token) for token in tokenizer.get_added_vocab() if len(str(token)) > 1 and str(token).strip()]
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True)))) if words else None
