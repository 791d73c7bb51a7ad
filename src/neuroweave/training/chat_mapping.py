"""A row as a chat, and a chat as text: by the tokenizer's template, or plainly where it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Chat = list[Message]


def synth_chat(row: Mapping[str, Any]) -> Chat | str:
    """A row of PleIAs/SYNTH as question and answer, or the name of the field that it lacks.

    user: `query`, and on a new line `constraints` where `exercise` contains "rag"; assistant: the reasoning between
    `<think>` tags, a blank line, the answer.
    """
    for name in ("query", "synthetic_reasoning", "synthetic_answer"):
        if not isinstance(row.get(name), str):
            return name
    question = row["query"]
    if "rag" in (row.get("exercise") or ""):
        if not isinstance(row.get("constraints"), str):
            return "constraints"
        question += f"\n{row['constraints']}"
    answer = f"<think>\n{row['synthetic_reasoning']}\n</think>\n\n{row['synthetic_answer']}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def messages_chat(row: Mapping[str, Any], column: str) -> Chat | str:
    """The messages in `column`, a list of {role, content}, both texts; or the name of the field that the row lacks."""
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        return column
    chat = []
    for message in messages:
        if not isinstance(message, Mapping):
            return column
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return f"{column}: role and content"
        chat.append({"role": role, "content": content})
    return chat


def chat_text(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """`chat` in the tokenizer's template; in the plain form where it has none.

    Raises jinja2.TemplateError when the template refuses the chat, for example for roles that do not alternate.
    """
    if not tokenizer.chat_template:
        return plain_chat(chat)
    return str(tokenizer.apply_chat_template(list(chat), tokenize=False))


def plain_chat(chat: Sequence[Message]) -> str:
    """`User: ...`, a blank line, `Assistant: ...`, and so on: for tokenizers without a template."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in chat)
