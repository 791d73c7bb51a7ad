"""What clients of the server send: OpenAI's requests, the part of them that means something here.

https://platform.openai.com/docs/api-reference. A field that would change the answer and that is not done here is
refused; bookkeeping fields are taken and ignored. `top_k`, `min_p` and `repetition_penalty` are extensions, as in vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_STOPS = 16
MOST_CHOICES = 8
MOST_SALT = 256
LEAST_TEMPERATURE = 1e-4
ROLES = ("system", "developer", "user", "assistant", "tool")


def encodable(text: str) -> str:
    """JSON can write down half of a character, which no tokenizer knows."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"no text: {text[error.start]!a} is half of a character") from None
    return text


Text = Annotated[str, AfterValidator(encodable)]


class Shared(BaseModel):
    """What chats and completions have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    presence_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[str, float] = Field(default_factory=dict)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: list[Text] = Field(default_factory=list, max_length=MOST_STOPS)
    seed: int | None = None
    cache_salt: str = Field("", max_length=MOST_SALT)
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("stop", mode="before")
    @classmethod
    def listed(cls, value: Any) -> Any:
        value = [] if value is None else [value] if isinstance(value, str) else value
        if isinstance(value, list) and "" in value:
            raise ValueError("an empty stop string stops everything; leave it out")
        return value

    @field_validator("logit_bias", "n", "frequency_penalty", "presence_penalty", "stream", "cache_salt", mode="before")
    @classmethod
    def null_is_default(cls, value: Any, info: Any) -> Any:
        if value is None:
            return cls.model_fields[info.field_name].get_default(call_default_factory=True)
        return value

    @field_validator("temperature")
    @classmethod
    def of_float32(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"{value} is too little to divide by; 0 takes the likeliest token")
        return value

    @field_validator("logit_bias")
    @classmethod
    def of_tokens(cls, value: dict[str, float]) -> dict[str, float]:
        for token, bias in value.items():
            if not token.isascii() or not token.isdigit() or not -100 <= bias <= 100:
                raise ValueError(f"{token!r}: {bias}; token numbers and biases from -100 to 100 are expected")
        return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatMessage(BaseModel):
    """`content`: a text, or parts that are all texts."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: Text | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None

    @field_validator("content", mode="before")
    @classmethod
    def joined(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError("only parts of type text can be read; images and sounds cannot")
        return "".join(part["text"] for part in value)

    @model_validator(mode="after")
    def says_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs a content")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates know messages."""
        role = "system" if self.role == "developer" else self.role
        found: dict[str, Any] = {"role": role, "content": self.content or ""}
        for name in ("name", "tool_calls", "tool_call_id"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found


class WebSearchOptions(BaseModel):
    """`search_context_size`: half, all or twice of the passages that the server reads by itself."""

    model_config = ConfigDict(extra="forbid")
    search_context_size: Literal["low", "medium", "high"] = "medium"

    def passages(self, usual: int) -> int:
        return {"low": max(1, usual // 2), "medium": usual, "high": 2 * usual}[self.search_context_size]


class ChatRequest(Shared):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    web_search_options: WebSearchOptions | None = None

    @field_validator("response_format")
    @classmethod
    def of_text(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type") != "text":
            raise ValueError(f"type {value.get('type')!r} cannot be guaranteed here; only text can")
        return value

    @model_validator(mode="after")
    def fits(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Shared):
    prompt: Text | list[Text] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    suffix: Any = None
    best_of: int | None = None

    @model_validator(mode="after")
    def fits(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of other than n is not done here; leave it out")
        if self.suffix is not None:
            raise ValueError("suffix is not done here; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 makes sense with echo: true alone")
        if not self.prompt:
            raise ValueError("the prompt is empty; a model needs something to continue")
        return self

    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[list-item,return-value]
