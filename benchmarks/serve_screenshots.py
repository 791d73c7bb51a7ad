"""The pictures of the server's page in the docs, taken of a real model, its original, and a search in two notes.

    neuroweave patch SMOLLM2 PATCHED --recipe silu-tanh-mlp
    python benchmarks/serve_screenshots.py PATCHED SMOLLM2 [--out docs/images]

Needs Chromium (Debian package `chromium`). What the models say and the figures beside it are theirs, of this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from neuroweave.chat.grounding import Grounding
from neuroweave.chat.search import provider_of
from neuroweave.cli.serve import loaded
from neuroweave.runtime.model_thread import ModelThread

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chromium import Chromium  # noqa: E402
from serving import running  # noqa: E402

NOTES = {
    "moon.md": "# Tides and the Moon\n\n"
    "Tides are caused by the gravity of the Moon and the Sun. The Moon pulls on the water of the oceans and makes it "
    "rise on the side that faces it, and on the opposite side. As the Earth turns, each coast passes through two high "
    "tides a day. Where Sun and Moon pull in one line the tides are highest and are called spring tides.\n",
    "coast.md": "# On the coast\n\n"
    "The tides of the sea come twice a day: high tide and low tide. Fishermen know them by heart; what is left on the "
    "sand between them is the food of gulls, crabs and people.\n",
}
CHAT = "What causes the tides of the sea?"
COMPARE = "Why is the sky blue?"
READY = "!document.querySelector('[name=send]').disabled && !document.querySelector('[name=send]').hidden"


def ask(browser: Chromium, text: str, *, new_tokens: int) -> None:
    browser.wait(READY)
    browser.evaluate(f"document.querySelector('[name=max_tokens]').value = {new_tokens}")
    browser.evaluate("document.querySelector('#message').focus()")
    browser.write(text)
    browser.press("Enter")
    browser.wait(f"{READY} && document.querySelector('main section:not([hidden]) .turn:last-child .actions')")


def take(browser: Chromium, address: str, out: Path, chat: str, compare: str) -> None:
    browser.open(f"{address}/", width=1100, height=760)
    browser.wait(READY)
    browser.click("#searching")
    ask(browser, chat, new_tokens=74)
    browser.evaluate("document.activeElement.blur()")
    browser.screenshot(out / "chat.png")
    print(json.dumps(browser.evaluate("document.querySelector('.reply').innerText"), ensure_ascii=False))
    browser.open(f"{address}/", width=1100, height=860)
    browser.wait(READY)
    browser.click("nav a[href='#compare']")
    browser.wait("!document.querySelector('#compare').hidden")
    ask(browser, compare, new_tokens=56)
    browser.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    browser.screenshot(out / "chat_compare.png")
    print(json.dumps(browser.evaluate("document.querySelector('.columns').innerText"), ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("original")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--chat", default=CHAT, help="what is asked with a search in the notes")
    parser.add_argument("--compare", default=COMPARE, help="what both are asked")
    given = parser.parse_args()
    thread = ModelThread()
    served = [
        loaded(source, None, role, slots=8, kept_tokens=8192, dtype="auto", device="cpu", thread=thread)
        for source, role in ((given.model, "model"), (given.original, "original"))
    ]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as profile:
        notes = Path(folder) / "notes"
        notes.mkdir()
        for name, text in NOTES.items():
            (notes / name).write_text(text, encoding="utf-8")
        grounding = Grounding(provider_of(f"local:{notes}"), 2)
        with running(served, grounding=grounding) as server, Chromium(Path(profile)) as browser:
            take(browser, server.address, given.out, given.chat, given.compare)


if __name__ == "__main__":
    main()
