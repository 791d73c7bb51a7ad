"""`neuroweave chat`: a conversation in the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.chatting import chatting_options, open_session, seed_of, show_in_terminal, sources_shown, tell
from neuroweave.cli.console import note
from neuroweave.cli.generate import check_utf8
from neuroweave.cli.main import one_line

if TYPE_CHECKING:
    from neuroweave.chat.session import Session, Turn

HELP = "/reset forgets what was said, /sources shows the last ones, /prompt what the model read, /quit ends (or Ctrl-D)"
COMMAND = re.compile(r"/\w*(\s|$)")  # not a path


@click.command(
    "chat",
    help="""Talk with MODEL, a checkpoint folder or a hub id, patched or not.

    \b
    neuroweave chat MODEL
    neuroweave chat MODEL --search local:DOCS          # answers from your own documents, with sources
    neuroweave chat MODEL --search searxng:http://localhost:8888
    neuroweave chat MODEL --fast --weights int8

    Ctrl-C stops an answer or empties the line. Lines that are piped in are questions, one each; exits 1 if one of them
    has failed. In the chat: """
    + HELP
    + ".",
)
@click.argument("model")
@chatting_options
def command(model: str, show_prompt: bool, seed: int | None, **options: Any) -> None:
    session = open_session(model, **options)
    session.writer = session.writer.remembering()
    if session.writer.prefixes is not None and (reason := session.writer.prefixes.why_none):
        note(f"{model}: each turn reads the whole chat ({reason})")
    seed = seed_of(seed)
    if sys.stdin.isatty():
        note(f"{model}: {session.writer.how}\n{HELP}")
    last: Turn | None = None
    failed = False
    for turn, line in enumerate(lines()):
        if COMMAND.match(line):
            if line in ("/quit", "/exit"):
                break
            obey(line, session, last)
            last = None if line == "/reset" else last
            continue
        try:
            check_utf8(line, "this line")
            last = session.ask(line, seed=(seed + turn) % 2**32, show=show_in_terminal)
        except KeyboardInterrupt:
            click.echo()
            note("stopped; the question and its answer are not remembered")
            continue
        except ValueError as error:  # the chat goes on
            click.echo()
            note(f"neuroweave: {one_line(str(error))}")
            failed = True
            continue
        click.echo()
        for source in sources_shown(last):
            click.echo(source)
        tell(last, show_prompt=show_prompt)
        if not sys.stdin.isatty():
            click.echo()
    if failed and not sys.stdin.isatty():
        raise click.exceptions.Exit(1)


def lines() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D or the end of a pipe; empty lines left out."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (history and editing in `input`)
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo()
            note("Ctrl-D or /quit ends the chat")
            continue
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin: not UTF-8 text ({error.reason} at byte {error.start})") from error
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()


def obey(line: str, session: Session, last: Turn | None) -> None:
    match line:
        case "/reset":
            session.reset()
            note("all is forgotten")
        case "/sources":
            for source in sources_shown(last) if last else []:
                click.echo(source)
            if not last or not last.passages:
                note("the last answer has no sources")
        case "/prompt":
            note(last.prompt if last else "nothing was asked yet")
        case "/help":
            note(HELP)
        case _:
            note(f"{line} is no command; {HELP}")
