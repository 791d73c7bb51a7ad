"""Calls of tools in an answer: <tool_call>{"name", "arguments"}</tool_call>, as Qwen, SmolLM3 and Hermes write them.

What is no such call stays text.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

CALL = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|$)", re.DOTALL)


def split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """(the text without its calls, the calls in OpenAI's form)"""
    calls: list[dict[str, Any]] = []

    def taken(match: re.Match[str]) -> str:
        try:
            call = json.loads(match[1])
        except ValueError:
            return match[0]
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return match[0]
        arguments = call.get("arguments", {})
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        calls.append(
            {"index": len(calls), "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        )
        return ""

    return CALL.sub(taken, text), calls
