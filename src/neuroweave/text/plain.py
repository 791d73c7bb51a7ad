"""Text from elsewhere, such that it can be shown in a terminal and encoded."""

from __future__ import annotations

import re

# Control characters but tab and new line; marks that turn the direction of what follows; halves of characters.
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def without_controls(text: str) -> str:
    return UNSEEN.sub("", text)
