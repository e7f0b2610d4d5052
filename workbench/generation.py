"""Answers of a model: how their tokens are chosen, and one after another, in batches, or as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import UserError
from .memory import parts_that_fit
from .progress import progress
from .prompts import PromptSet, encode, pad
from .replicas import batch_seed, run_batches

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.blend import Blend
    from .models import Model


@dataclass(frozen=True)
class Decoding:
    """How the tokens of an answer are chosen; `Model.generate(prompts, **decoding.options)`.

    Greedy, unless `sample` or one of `temperature`, `top_p`, `top_k` is given: then a token is drawn, from all of the
    model's distribution unless these say otherwise (never by the defaults of a checkpoint). With `beams` over 1 the
    answer is searched for. Raises UserError for what is out of range.

    >>> Decoding(top_p=0.9).options["do_sample"], Decoding().options
    (True, {'max_new_tokens': 64, 'seed': 0})
    """

    max_new_tokens: int = 64
    sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be positive; leave it out for the likeliest token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is out of range: it is a probability, over 0 and up to 1")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} is out of range: so many tokens are drawn from, at least 1")
        if self.beams < 1:
            raise UserError(f"beams {self.beams} is out of range: at least 1 is needed")

    @property
    def sampled(self) -> bool:
        return self.sample or any(x is not None for x in (self.temperature, self.top_p, self.top_k))

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `Model.generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        if self.beams > 1:
            options["num_beams"] = self.beams
        if self.sampled:
            options |= {
                "do_sample": True,
                "temperature": 1.0 if self.temperature is None else self.temperature,
                "top_p": 1.0 if self.top_p is None else self.top_p,
                "top_k": self.top_k or 0,
            }
        return options


def generate(
    model: Model,
    prompts: Any,
    *,
    max_new_tokens: int,
    batch_size: int,
    adapters: Sequence[Adapter | Blend | None],
    seed: int,
    desc: str,
    on_text: Callable[[str], None] | None,
    **options: Any,
) -> list[list[str]]:
    """The answers under each adapter; see `Model.generate`."""
    from .adapters.demonstrations import check_positions

    _check(model, max_new_tokens, batch_size, on_text is not None, options)
    prompts = PromptSet.load(prompts)
    encoded = encode(prompts, model.tokenizer, max_length=model.max_length - max_new_tokens)
    for adapter in adapters:
        check_positions(adapter, prompts, encoded)
    given = {"pad_token_id": model.pad_id, "eos_token_id": model.end_ids or None, "do_sample": False,
             "max_new_tokens": max_new_tokens, **options}  # fmt: skip
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i])) if on_text is None else list(range(len(encoded)))
    size = batch_size if on_text is None else 1
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    pieces = [(k, ([encoded[i] for i in rows], batch_seed(seed, number)))
              for k in range(len(adapters)) for number, rows in enumerate(batches)]  # fmt: skip
    answers = [[""] * len(encoded) for _ in adapters]
    with (
        progress(total=len(encoded) * len(adapters), desc=desc, unit="prompt")
        if on_text is None
        else nullcontext() as bar
    ):
        for i, texts in _answered(model, pieces, adapters, given, on_text):
            rows = batches[i % len(batches)]
            for row, text in zip(rows, texts, strict=True):
                answers[i // len(batches)][row] = text
            if bar is not None:  # none beside text that comes word by word
                bar.update(len(rows))
    return answers


def _answered(
    model: Model, pieces: list[Any], adapters: Sequence[Adapter | Blend | None], options: dict[str, Any],
    on_text: Callable[[str], None] | None,
) -> Iterator[tuple[int, list[str]]]:  # fmt: skip
    if on_text is None:
        return run_batches(model, "workbench.generation:answer_batch", pieces, adapters, options=options)
    # word by word: here, whoever runs what is waited for
    return ((i, answer_batch(model, data, adapters[k], options, on_text)) for i, (k, data) in enumerate(pieces))


def answer_batch(
    model: Model,
    batch: tuple[list[list[int]], int],
    adapter: Adapter | Blend | None,
    options: dict[str, Any],
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """The answers to one batch. batch: the ids of its prompts and the seed of what is drawn in it."""
    from transformers import GenerationConfig

    encoded, seed = batch
    config = GenerationConfig(**options)
    numbered = list(enumerate(encoded))

    def run(part: Sequence[tuple[int, list[int]]]) -> list[str]:
        if config.do_sample:  # what draws nothing leaves the generator to whoever draws meanwhile
            torch.manual_seed(batch_seed(seed, part[0][0]))  # of a whole batch its own
        ids, mask = pad([ids for _, ids in part], model.pad_id, "left")
        call = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "generation_config": config}
        if on_text is not None:
            call["streamer"] = _streamer(model.tokenizer, on_text)
        edited = nullcontext() if adapter is None else adapter.on(model, prompt_lengths=mask.sum(1))
        with torch.inference_mode(), edited:
            out = model.backend.call(model, "generate", call)
        texts = model.tokenizer.batch_decode(out[:, ids.shape[1] :].cpu(), skip_special_tokens=True)
        return texts[:: len(texts) // len(part)]  # several samples a prompt: the first is kept

    return [text for texts in parts_that_fit(numbered, run) for text in texts]


def check_room(model: Model, prompt: Any, max_new_tokens: int) -> int:
    """How many tokens a prompt takes; UserError where `generate` would cut it to leave room for an answer so long."""
    n = len(encode(PromptSet.load([prompt]), model.tokenizer)[0])
    if n > model.max_length - max_new_tokens:
        raise UserError(f"this prompt takes {n} tokens and {model.name} reads {model.max_length}, an answer of "
                        f"{max_new_tokens} included; give a shorter one, or fewer new tokens")  # fmt: skip
    return n


def _check(model: Model, max_new_tokens: int, batch_size: int, streamed: bool, options: dict[str, Any]) -> None:
    if not 0 < max_new_tokens < model.max_length - 1:
        raise UserError(f"max_new_tokens {max_new_tokens} is out of range: {model.name} reads {model.max_length} tokens "
                        "in all, and the prompt needs some")  # fmt: skip
    if batch_size < 1 or not 0 < options.get("temperature", 1.0) < float("inf"):
        raise UserError(f"batch_size {batch_size} and temperature {options.get('temperature', 1.0)} must be positive")
    if streamed and (options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1):
        raise UserError("an answer that is searched for with beams, or one of several, is not known before its end; leave "
                        "streaming or beams out")  # fmt: skip


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """Hands each finished word of an answer on, special tokens left out."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
