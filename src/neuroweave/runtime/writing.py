"""A loaded model that continues text through transformers' `generate`, and its text as it comes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from neuroweave.checkpoint.loading import load_model, load_tokenizer
from neuroweave.runtime.prefix_cache import PrefixCache
from neuroweave.text.sample import encode

LONGEST = 8192  # tokens of a chat that are kept for a model that does not say how many it takes
REPLACEMENT = "\ufffd"  # of bytes that are not a character yet


class StopWriting(Exception):  # noqa: N818  (not an error)
    """Raised by a `show` that has seen enough."""


class Stream(BaseStreamer):
    """Gives `show` each piece of text as soon as its characters are whole, and notes when tokens came.

    The pieces are, put together, the text that the new tokens have after the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], object]) -> None:
        self.tokenizer = tokenizer
        self.show = show
        self.started = time.perf_counter()
        self.arrivals: list[tuple[float, int]] = []  # seconds, tokens that came together
        self.pieces: list[str] = []
        self.written: list[int] = []
        self.begun = False  # whether the prompt has come
        self.tokens: list[int] = []  # of the last piece, and those after it
        self.shown = 0  # tokens of the last piece

    def put(self, value: Tensor) -> None:
        tokens = value.flatten().tolist()
        if not self.begun:
            self.begun = True
            self.started = time.perf_counter()
            self.tokens = self._last_with_text(tokens)
            self.shown = len(self.tokens)
            return
        self.arrivals.append((time.perf_counter(), len(tokens)))
        self.written += tokens
        self.tokens += tokens
        self._flow(last=False)

    def end(self) -> None:
        self._flow(last=True)

    def _flow(self, *, last: bool) -> None:
        """Decoders of the Llama 2 kind strip a space from the start of what they are given, so what comes is decoded
        together with the tokens before it that have text."""
        before, text = self._decoded(self.tokens[: self.shown]), self._decoded(self.tokens)
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not last):
            return
        self.tokens, self.shown = self.tokens[self.shown :], len(self.tokens) - self.shown
        self.pieces.append(text[len(before) :])
        self.show(self.pieces[-1])

    def _last_with_text(self, tokens: list[int]) -> list[int]:
        """The shortest end of `tokens` that has text."""
        ends = (tokens[first:] for first in range(len(tokens) - 1, -1, -1))
        return next((end for end in ends if self._decoded(end)), [])

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Continuation:
    """What was written, why it ended (`end of text` or `length`), and when its tokens came."""

    token_ids: list[int]
    text: str
    stopped: str
    prefill_seconds: float
    decode_seconds: float
    decoded_tokens: int  # those after the first arrival, which the decode seconds are for


@dataclass(frozen=True, eq=False)
class Writer:
    """A model that continues text, its tokenizer, and the arguments of `generate` for a model that drafts.

    `notice`: what a person should know of how it runs. `prefixes`: what it has read of earlier texts.
    """

    source: str
    model: Any
    tokenizer: Any
    how: str
    drafting: dict[str, Any]
    notice: str = ""
    prefixes: Any = None  # a `PrefixCache`

    @classmethod
    def load(cls, source: str, *, assistant: str | None = None, dtype: str = "auto", device: str = "auto") -> Writer:
        """Raises ValueError for a device that is not there and for what is no causal language model."""
        check_device(device)
        model, tokenizer, how = load_causal(source, dtype, device)
        drafting: dict[str, Any] = {}
        if assistant is not None:
            drafting["assistant_model"], own, _ = load_causal(assistant, dtype, device)
            sizes = {each.config.get_text_config().vocab_size for each in (model, drafting["assistant_model"])}
            if len(sizes) > 1:  # transformers wants the tokenizers then, and refuses them else
                drafting |= {"tokenizer": tokenizer, "assistant_tokenizer": own}
        return cls(source, model, tokenizer, how, drafting)

    def remembering(self) -> Writer:
        """The same, which does not read again what it has read of a chat."""
        tokens = self.positions() or LONGEST
        return self if self.drafting else replace(self, prefixes=PrefixCache(self.model, tokens=tokens))

    def encode(self, text: str, *, chat: bool | None = None, system: str | None = None) -> tuple[list[int], bool]:
        """Token ids of the prompt, and whether they went through the chat template; None: if there is one.

        Raises ValueError for a chat without a template, or one that the template refuses.
        """
        template = getattr(self.tokenizer, "chat_template", None)
        if chat and not template:
            raise ValueError(f"{self.source}: its tokenizer has no chat template; leave --chat out")
        if not (template if chat is None else chat):
            if system is not None:
                raise ValueError("--system is a part of a chat, and this prompt is continued as raw text; leave it out")
            return self._encode_raw(text), False
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise ValueError(f"{self.source}: its chat template refuses this chat ({error})") from error
        return list(ids), True

    def _encode_raw(self, text: str) -> list[int]:
        ids = encode(self.tokenizer, text, special=True)
        end = self.tokenizer.eos_token_id
        if ids and ids[-1] == end and encode(self.tokenizer, text)[-1:] != [end]:
            ids.pop()  # of a tokenizer that ends its texts: a model writes nothing after that
        return ids

    def room(self, ids: Sequence[int], new_tokens: int) -> int:
        """How many of `new_tokens` the model has positions for. Raises ValueError where it has none, and for tokens
        that are not the model's."""
        if not ids:
            raise ValueError(f"the prompt holds no token for {self.source}; give it one with text in it")
        rows = self.model.config.get_text_config().vocab_size
        if strange := [id for id in (min(ids), max(ids)) if not 0 <= id < rows]:
            raise ValueError(f"the prompt has token {strange[0]}, which is not one of the {rows:,} of {self.source}")
        longest = self.positions()
        if longest is None:
            return new_tokens
        if len(ids) >= longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and {self.source} has {longest} positions, of which a new token "
                "needs one; shorten the prompt"
            )
        return min(new_tokens, longest - len(ids))

    def positions(self) -> int | None:
        """How long a text may be; None: the model does not say."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest >= 1 else None

    def prompt_room(self, new_tokens: int) -> int:
        """How many tokens a prompt may have, so that `new_tokens`, or half the context, fit behind it."""
        positions = self.positions()
        return 1 << 30 if positions is None else max(positions - new_tokens, positions // 2)

    def parameters(self) -> int:
        """How many numbers the model has, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def settings(self, chosen: dict[str, Any], new_tokens: int, *, chat: bool) -> GenerationConfig:
        """The checkpoint's own generation config with what was chosen. A chat ends at the tokenizer's end token too."""
        config = copy.deepcopy(self.model.generation_config)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = [end for end in ends if end is not None]
        if (chat or not ends) and self.tokenizer.eos_token_id not in (None, *ends):
            ends.append(self.tokenizer.eos_token_id)
        pad = config.pad_token_id
        config.update(
            **chosen,
            max_new_tokens=new_tokens,
            num_beams=1,  # beams cannot be streamed
            num_return_sequences=1,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if pad is None and ends else pad,
        )
        return config

    def write(
        self, ids: Sequence[int], config: GenerationConfig, *, seed: int, show: Callable[[str], object]
    ) -> Continuation:
        """Continue `ids`. Sampling starts from `seed`. Raises ValueError when memory or numbers run out, and what
        `show` raises."""
        prompt = torch.tensor([list(ids)], device=self.model.device)
        stream = Stream(self.tokenizer, show)
        set_seed(seed)
        known: dict[str, Any] = {}
        own = (config.cache_implementation, self.model.generation_config.cache_implementation) != (None, None)
        if self.prefixes is not None and not (self.prefixes.why_none or own or config.prompt_lookup_num_tokens):
            known["past_key_values"] = self.prefixes.begin(ids)[1]
            config = copy.deepcopy(config)
            config.use_cache = True  # or all of the text is read into the cache at each token
        try:
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                streamer=stream,
                **self.drafting,
                **known,
            )
        except StopWriting:
            self._keep([*ids, *stream.written], **known)
            raise
        except torch.OutOfMemoryError as error:
            if known:
                self.prefixes.clear()
            raise ValueError(f"{self.source}: out of memory ({error}); shorten the prompt or give --dtype") from error
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise ValueError(
                f"{self.source}: its logits are not numbers, so no token can be drawn; give --dtype float32, or look "
                "at the weights with neuroweave verify"
            ) from error
        self._keep(output[0].tolist(), **known)
        return self._describe(output[0, len(ids) :].tolist(), config, stream)

    def _keep(self, text: list[int], past_key_values: Any = None) -> None:
        """The last token of a text was not read."""
        if past_key_values is not None and past_key_values.get_seq_length() == len(text) - 1:
            assert self.prefixes is not None
            self.prefixes.put(text[:-1], past_key_values)

    def _describe(self, token_ids: list[int], config: GenerationConfig, stream: Stream) -> Continuation:
        first, last = stream.arrivals[0], stream.arrivals[-1]
        return Continuation(
            token_ids=token_ids,
            text="".join(stream.pieces),
            stopped="end of text" if token_ids[-1] in (config.eos_token_id or []) else "length",
            prefill_seconds=first[0] - stream.started,
            decode_seconds=last[0] - first[0],
            decoded_tokens=len(token_ids) - first[1],
        )


# ------------------------------------------------------------------------------------------------------------ loading


def load_causal(source: str, dtype: str, device: str) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """(model, tokenizer, how it was loaded). Raises ValueError for a model that does not continue text."""
    tokenizer = load_tokenizer(source)
    config = AutoConfig.from_pretrained(source)
    of_hub = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    kind = f"{source}: {config.model_type} is"
    if config.is_encoder_decoder:
        raise ValueError(f"{kind} an encoder-decoder, which answers a text but does not continue it; give a decoder")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not of_hub:
        raise ValueError(f"{kind} not a kind of model that continues text (an encoder?); give a causal language model")
    model, how = load_model(source, dtype=dtype, device=device)
    # BERT and its kin have causal heads too, which mean nothing while the model reads both ways.
    if getattr(config, "is_decoder", None) is False and reads_ahead(model):
        raise ValueError(f"{kind} an encoder here: it reads what comes after a token; give a causal language model")
    return model, tokenizer, how


@torch.no_grad()
def reads_ahead(model: Any) -> bool:
    """Whether tokens change the logits of one before them."""
    first, second = model(torch.tensor([[3, *[4] * 7], [3, *[5] * 7]], device=model.device)).logits[:, 0].float()
    return bool((first - second).abs().max() > 1e-4 * first.abs().max())


def check_device(name: str) -> None:
    """Raise ValueError unless torch can hold a tensor on the device `name`."""
    if name == "auto":
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not to be had here ({reason}); give auto or cpu") from error
