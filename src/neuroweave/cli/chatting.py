"""What `chat` and `ask` share: their options, a session from them, and how sources are shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from neuroweave.checkpoint.loading import check_source
from neuroweave.cli.console import given, note, progress
from neuroweave.cli.writing_options import SEEDS, decoding, loader_of, writing_options
from neuroweave.text.plain import without_controls

if TYPE_CHECKING:
    from neuroweave.chat.grounding import Grounding
    from neuroweave.chat.session import Session, Turn
    from neuroweave.runtime.writing import Writer

SEARCHES = "local:FOLDER, searxng:URL, duckduckgo, tavily or brave"
SEARCH_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--search", metavar="WHERE", help=f"Answer from what is found there: {SEARCHES}."),
    click.option(
        "--passages",
        type=click.IntRange(1, 50),
        metavar="N",
        help="How many the model reads.  [default: 1, 3 or 6, by its size]",
    ),
    click.option(
        "--allow-host",
        "allow_hosts",
        multiple=True,
        metavar="HOST",
        help="Pages of this host of your own network may be read, such as wiki.lan or wiki.lan:8080; may be repeated.",
    ),
    click.option(
        "--proxy", metavar="URL", help="Searches and pages of the web go through it; none is taken from elsewhere."
    ),
)
OWN_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--system", metavar="TEXT", help="The system message."),
    click.option("--show-prompt", is_flag=True, help="Print what the model has read, on stderr; with --json in it."),
)


def chatting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = writing_options(function)
    for option in reversed(OWN_OPTIONS):
        function = option(function)
    return search_options(function)


def search_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(SEARCH_OPTIONS):
        function = option(function)
    return function


def open_session(
    model: str, *, search: str | None, passages: int | None, allow_hosts: tuple[str, ...], proxy: str | None,
    system: str | None, new_tokens: int, dtype: str, device: str, fast: bool, weights: str | None,
    sparse: float | None, **options: Any,
) -> Session:  # fmt: skip
    """Raises ValueError for what does not fit, a search that cannot be opened before the model is loaded."""
    load = loader_of("torch", fast=fast, weights=weights, sparse=sparse)
    chosen = decoding(**options)
    check_source(model)
    opened = open_search(search, passages, allow_hosts, proxy)
    writer = load(model, dtype=dtype, device=device)
    if writer.notice:
        note(f"{model}: {writer.notice}")
    if not getattr(writer.tokenizer, "chat_template", None):
        note(f"{model} has no chat template: it continues a plain dialogue")
    from neuroweave.chat.session import Session

    return Session(writer, opened(writer), system, chosen, new_tokens)


def open_search(
    spec: str | None, passages: int | None, allow_hosts: Sequence[str], proxy: str | None
) -> Callable[[Writer], Grounding | None]:
    """What makes a grounding for a model. A folder is indexed here, where a person can see it.

    Raises ValueError for options of a search without one, and as `provider_of` does.
    """
    if spec is None:
        if unused := given("passages", "allow_hosts", "proxy"):
            raise ValueError(f"{unused[0]} is of a search; give --search too")
        return lambda writer: None
    from neuroweave.chat.search import LocalFolder, provider_of

    provider = provider_of(spec, allow_hosts=allow_hosts, proxy=proxy)
    if isinstance(provider, LocalFolder):
        with progress("indexing", unit="file") as show:
            provider.refresh(progress=show)

    def ground(writer: Writer) -> Grounding:
        from neuroweave.chat.grounding import Grounding, passages_for

        return Grounding(provider, passages or passages_for(writer.parameters()))

    return ground


def show_in_terminal(text: str) -> None:
    """A piece of an answer; what a terminal would obey is left out."""
    click.echo(without_controls(text), nl=False)


def seed_of(seed: int | None) -> int:
    return random.randrange(SEEDS) if seed is None else seed


def sources_shown(turn: Turn) -> list[str]:
    """A line for each passage that the model read; * where the answer stands on it."""
    lines = []
    for passage in turn.passages:
        mark = "*" if passage.number in turn.cited else " "
        date = f" ({passage.date})" if passage.date else ""
        lines.append(f"{mark}[{passage.number}] {passage.title}: {passage.address}{date}")
    return lines


def tell(turn: Turn, *, show_prompt: bool) -> None:
    """What a person should know beside the answer, on stderr."""
    for line in notices_of(turn):
        note(line)
    if show_prompt:
        note(turn.prompt)


def notices_of(turn: Turn) -> Sequence[str]:
    removed = ", ".join(f"[{number}]" for number in turn.removed)
    ends = {"length": "cut at the limit of new tokens; --new-tokens sets it", "context": "cut: the context is full"}
    cut = ends.get(turn.stopped)
    taken = f"taken out, since it points to no source: {removed}" if removed else None
    return [*turn.notices, *filter(None, (taken, cut))]
