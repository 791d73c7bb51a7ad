"""What a person typed, as an expression for SQLite's full-text search that cannot fail to parse."""

from __future__ import annotations

import re

WORDS = 64  # of a question that are looked up
WORD_CHARACTERS = 100
JOINT = "\u200b"  # set between ideographs: they are words by themselves, and no spaces part them
IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f\U00020000-\U0003ffff]")
WORD = re.compile(r"\w+(?:[.:+#/-]+\w+)*[+#]*")
# Words that say how something is asked rather than what.
STOP = """
    a about all also am an and any anyone anything are as at be because been before being but by can could did do
    does doing done don each else etc ever every few for from get gets getting give given gives go goes got had has have
    having he her here hers him his how i if in into is isn it its itself just let like ll made make makes many may me
    might mine more most much must my no nor not of off on one only or other our ours out over own please rather s same
    shall she should so some someone something such t than that the their theirs them then there these they thing
    things this those though to too unless until up us use used uses using ve very want wants was way we well were what
    when where whether which while who whom whose why will with without would yes yet you your yours
"""
STOP_WORDS = frozenset(STOP.split())


def spaced(text: str) -> str:
    """The text with a mark behind each ideograph, which the index takes for a space; `unspaced` takes them out."""
    return IDEOGRAPH.sub(lambda match: match[0] + JOINT, text)


def unspaced(text: str) -> str:
    return text.replace(JOINT, "")


def query_words(query: str) -> list[str]:
    """The words of a question that say what it is about, each once; if it has none but stop words, those."""
    found = dict.fromkeys(match[0][:WORD_CHARACTERS].casefold() for match in WORD.finditer(query))
    words = [word for word in found if word not in STOP_WORDS] or list(found)
    return words[:WORDS]


def match_expression(query: str) -> str:
    """Any of the question's words, quoted. `os.path` counts as a whole and in its parts, a run of ideographs as its
    pairs. Empty where the question has no word."""
    terms: dict[str, None] = {}
    for word in query_words(query):
        parts = [part for part in re.split(r"[^\w]+|_", word) if part]
        if len(parts) > 1:
            terms[" ".join(map(spaced, parts))] = None
        for part in parts:
            if len(parts) == 1 or part not in STOP_WORDS:
                terms.update(dict.fromkeys(units(part)))
    return " OR ".join(f'"{term}"' for term in terms)


def units(part: str) -> list[str]:
    """What one word is looked up as: itself, or each two neighbours of its ideographs."""
    found: list[str] = []
    for run in re.findall(f"(?:{IDEOGRAPH.pattern})+|(?:(?!{IDEOGRAPH.pattern}).)+", part):
        if IDEOGRAPH.match(run):
            found += [spaced(run[at : at + 2]) for at in range(max(1, len(run) - 1))]
        else:
            found.append(run)
    return found
