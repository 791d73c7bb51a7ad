"""Names of a tokenizer's special tokens, and its chat template."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from neuroweave.training.tokenizer_forms import SPACE

UNKNOWN, START, END, PADDING = "<unk>", "<s>", "</s>", "<pad>"  # tokens 0 to 3
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")


def check_names(names: Sequence[str], *, normalization: str = "identity") -> None:
    """Raise ValueError for token names that text could not hold, or could be read in two ways beside others."""
    for name in names:
        if normalization != "identity" and unicodedata.normalize("NFKC", name) != name:
            raise ValueError(f"token {name!r}: the normalisation changes this name; choose another")
        if problem := _bad_name(name):
            raise ValueError(f"token {name!r}: {problem}; choose another name, such as <|{name.strip('<|> ')}|>")
    everything = [START, END, PADDING, *names]
    for name in names:
        if everything.count(name) > 1:
            hint = "it is always there" if name in (START, END, PADDING) else "it is named twice"
            raise ValueError(f"token {name!r}: {hint}; leave it out")
    for name in everything:
        for other in everything:
            ends = any(name.endswith(other[:count]) for count in range(1, len(other)))
            if ends or (name != other and other in name):
                raise ValueError(f"tokens {name!r} and {other!r} can overlap in a text; choose other names")


def _bad_name(name: str) -> str | None:
    if len(name) < 2 or len(name.encode("utf-8", "replace")) > 100:
        return "a name has 2 characters or more, and no more than 100 bytes"
    if name == UNKNOWN or _BYTE_NAME.fullmatch(name):
        return "sentencepiece has this name for something else"
    if SPACE in name or any(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        return "a name has no spaces, control characters or surrogates"
    return None


def read_template(chosen: str | Path | None) -> str | None:
    """The chat template: ChatML for "chatml", else the content of the file. Raises ValueError for one that fails."""
    if chosen is None or chosen == "chatml":
        return None if chosen is None else CHATML
    if not Path(chosen).is_file():
        raise ValueError(f"{chosen}: no such file; a chat template is chatml, none, or a file with a Jinja template")
    template = Path(chosen).read_text(encoding="utf-8")
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        rendered = render_jinja_template([chat], chat_template=template, bos_token=START, eos_token=END)[0][0]
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"{chosen}: the chat template does not work ({error})") from error
    if "question" not in rendered or "answer" not in rendered:
        raise ValueError(f"{chosen}: the chat template leaves out what was said; is it the right file?")
    return template
