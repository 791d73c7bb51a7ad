"""`neuroweave tokenizer`: train a tokenizer, or add tokens to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import counted, json_option, note, overwrite_option, print_json, progress

if TYPE_CHECKING:
    from neuroweave.training.sources import Source

MODELS = ("bpe", "unigram")
NORMALIZATIONS = ("identity", "nfkc")
STARTS = ("mean", "pieces")


@click.group("tokenizer", help="Train a tokenizer, or add tokens to a model.")
def command() -> None:
    pass


@command.command(
    "train",
    help="""Train a tokenizer on text and write it in every form: for sentencepiece, tokenizers and transformers.

    \b
    neuroweave tokenizer train --data TEXT --vocab-size 8192 --output DIR --chat-template chatml
    neuroweave tokenizer train --data rows.parquet --field story --vocab-size 32000 --model unigram --output DIR

    The vocabulary always has <unk>, <s>, </s>, <pad>, the 256 bytes and ASCII. Both forms are compared on thousands of
    texts before anything is written.""",
)
@click.option("--data", metavar="TEXT", multiple=True, required=True, help="A file, folder or pattern; repeatable.")
@click.option("--field", help="The column of text, for .jsonl and .parquet.  [default: text]")
@click.option("--chat", type=click.Choice(["synth", "messages"]), help="Rows are chats: SYNTH's, or lists of messages.")
@click.option("--vocab-size", type=click.IntRange(min=1), required=True, help="Tokens in all.")
@click.option("--output", "out", metavar="DIR", type=click.Path(path_type=Path), required=True)
@click.option("--model", type=click.Choice(MODELS), default="bpe", show_default=True)
@click.option(
    "--normalization", type=click.Choice(NORMALIZATIONS), default="identity", show_default=True,
    help="nfkc: each character in its plain form, fullwidth letters, ligatures, kinds of space.",
)  # fmt: skip
@click.option("--special", metavar="TOKEN", multiple=True, help="A token that decoding can skip; repeatable.")
@click.option("--token", "tokens", metavar="TOKEN", multiple=True, help="A token found whole, and kept; repeatable.")
@click.option("--chat-template", metavar="chatml|FILE|none", default="none", show_default=True)
@click.option("--sample", metavar="SIZE", default="100MB", show_default=True, help="Of more text, use this much.")
@overwrite_option
@json_option
def train(
    data: tuple[str, ...], field: str | None, chat: str | None, vocab_size: int, out: Path, model: str,
    normalization: str, special: tuple[str, ...], tokens: tuple[str, ...], chat_template: str, sample: str,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from neuroweave.checkpoint.writer import parse_size
    from neuroweave.training.tokenizer import train_tokenizer

    sources = [make_source(path, field, chat) for path in data]
    with progress("read") as follow:
        done = 0

        def read(count: int) -> None:
            nonlocal done
            done += count
            follow(done, done)

        made = train_tokenizer(
            out, sources, vocab_size=vocab_size, model=model, normalization=normalization, special=special,
            tokens=tokens, chat_template=None if chat_template == "none" else chat_template,
            sample_bytes=parse_size(sample), overwrite=overwrite, progress=read,
        )  # fmt: skip
    if as_json:
        print_json(made.as_dict())
        return
    click.echo(
        f"{out}: {model}, {made.vocab_size:,} tokens, {made.bytes_per_token:.2f} bytes a token on its own text "
        f"({counted(made.documents, 'document')}, {made.read / 1e6:.1f} MB); both forms agree on {made.checked:,} texts"
    )
    if made.used < made.read:
        note(f"{made.used / 1e6:.1f} MB of the text, drawn evenly, were used: --sample SIZE takes more")


@command.command(
    "add",
    help="""Write OUT: the checkpoint MODEL, whose tokenizer has more tokens.

    \b
    neuroweave tokenizer add MODEL OUT --token "<think>" --token "</think>"

    Rows that no token uses are taken first; then embedding and head grow. Nothing else changes.""",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--token", "tokens", metavar="TOKEN", multiple=True, required=True, help="A new token; repeatable.")
@click.option("--special", is_flag=True, help="They are special: decoding can skip them.")
@click.option(
    "--start", type=click.Choice(STARTS), default="mean", show_default=True,
    help="Their rows: the mean of all rows, or of the pieces that each was cut into.",
)  # fmt: skip
@overwrite_option
@json_option
def add(
    model: Path, out: Path, tokens: tuple[str, ...], special: bool, start: str, overwrite: bool, as_json: bool
) -> None:
    from neuroweave.training.vocabulary import add_tokens

    added = add_tokens(model, out, tokens, special=special, start=start, overwrite=overwrite)  # type: ignore[arg-type]
    if as_json:
        print_json(added.as_dict())
        return
    named = ", ".join(f"{token} {number}" for token, number in added.tokens.items())
    grown = f"{added.rows_before:,} to {added.rows:,} rows" if added.rows > added.rows_before else "rows were free"
    click.echo(f"{out}: {counted(len(added.tokens), 'token')} added ({named}); {grown}")
    if added.left_out:
        note(f"did not come along, because it fits the old weights: {', '.join(added.left_out)}")
    for line in added.notes:
        note(line)


def make_source(path: str, field: str | None, chat: str | None) -> Source:
    """A source of text from the options. Raises ValueError in one line for options that do not go together."""
    from pydantic import ValidationError

    from neuroweave.training.sources import Source

    try:
        chosen: Any = chat  # pydantic checks it
        return Source(path=path, field=field, chat=chosen)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
