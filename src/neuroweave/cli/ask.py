"""`neuroweave ask`: one question, answered from what a search finds."""

from __future__ import annotations

from typing import Any

import click

from neuroweave.cli.chatting import (
    chatting_options,
    notices_of,
    open_session,
    seed_of,
    show_in_terminal,
    sources_shown,
    tell,
)
from neuroweave.cli.console import json_option, print_json
from neuroweave.cli.generate import check_utf8


@click.command(
    "ask",
    help="""Answer a QUESTION with MODEL, from what --search finds, with numbered sources.

    \b
    neuroweave ask MODEL "How do I sort a list by two keys?" --search local:DOCS
    neuroweave ask MODEL "What is new in Python 3.14?" --search duckduckgo --json

    Without --search the model answers by itself.""",
)
@click.argument("model")
@click.argument("question")
@chatting_options
@json_option
def command(model: str, question: str, as_json: bool, show_prompt: bool, seed: int | None, **options: Any) -> None:
    check_utf8(question, "the question")
    if not question.strip():
        raise ValueError("the question is empty")
    session = open_session(model, **options)
    turn = session.ask(question, seed=seed_of(seed), show=(lambda text: None) if as_json else show_in_terminal)
    if as_json:
        facts = {**turn.as_dict(), "notices": notices_of(turn)}
        print_json({"model": model, "question": question, **facts, **({"prompt": turn.prompt} if show_prompt else {})})
        return
    click.echo()
    if turn.passages:
        click.echo("\nSources")
        for line in sources_shown(turn):
            click.echo(line)
    tell(turn, show_prompt=show_prompt)
