"""What a language model predicts, token by token: losses, divergence and agreement, a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import UserError
from ..memory import batches_that_fit
from ..models import Model
from ..prompts import Prompt, PromptSet
from ..rendering import Encoded, encode_spans, pad, render
from ..sites import text_config
from .statistics import Interval, mean_interval

LOGIT_BUDGET = 1 << 24  # logits held at once in float32, in numbers: 64 MB
HELD_BUDGET = 1 << 29  # bytes of the states of several arms that are held at once
STATE_BUDGET = 1 << 27  # logits of a family whose head stands alone not, all arms together


@dataclass(frozen=True, eq=False)
class Sequences:
    """Encoded prompts of two tokens or more; `left_out` counts those that were shorter.

    starts: the first token of each that is predicted (the first of an answer, say); 1 unless given.
    """

    ids: tuple[tuple[int, ...], ...]
    left_out: int = 0
    starts: tuple[int, ...] = ()
    origin: tuple[tuple[Encoded, Prompt, str], ...] = ()
    """of each sequence: its tokens with their characters, the prompt, and its rendered text"""

    def __post_init__(self) -> None:
        if not self.starts:
            object.__setattr__(self, "starts", (1,) * len(self.ids))
        assert all(1 <= start < len(row) for start, row in zip(self.starts, self.ids, strict=True))

    @classmethod
    def of(cls, model: Model, prompts: Any, max_length: int | None = None) -> Sequences:
        """Reads and encodes prompts, cut to `max_length` tokens (the model's context unless given).

        A plain text begins with the BOS of a model that has one, also where its tokenizer adds none (GPT-2): documents
        did in training, and what is predicted without it is another thing.
        """
        if max_length is not None and max_length < 2:
            raise UserError(f"max_length={max_length}: a sequence needs at least 2 tokens to predict one")
        limit = min(max_length or model.max_length, model.max_length)
        prompts = PromptSet.load(prompts)
        texts = render(prompts, model.tokenizer)
        bos = model.tokenizer.bos_token_id
        encoded = [_begun(e, bos) for e in encode_spans(prompts, model.tokenizer, rendered=texts)]
        rows = [(e, p, text) for e, p, text in zip(encoded, prompts, texts, strict=True) if len(e.ids[:limit]) > 1]
        if not rows:
            raise UserError("none of the sequences has two tokens; give longer texts")
        return cls(tuple(tuple(e.ids[:limit]) for e, _, _ in rows), len(prompts) - len(rows), origin=tuple(rows))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> Float[Tensor, " n"]:
        """How many tokens each sequence predicts."""
        found = [len(row) - start for start, row in zip(self.starts, self.ids, strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    def batches(self, size: int) -> Iterator[list[int]]:
        """Indices of sequences of like length, longest first."""
        if size < 1:
            raise UserError(f"batch_size must be at least 1; got {size}")
        order = sorted(range(len(self)), key=lambda i: (-len(self.ids[i]), i))
        yield from (order[i : i + size] for i in range(0, len(order), size))


def _begun(one: Encoded, bos: int | None) -> Encoded:
    if bos is None or one.frame is not None or one.ids[0] == bos:
        return one
    return replace(one, ids=[bos, *one.ids], spans=[(0, 0), *one.spans])


@dataclass(frozen=True, eq=False)
class Scores:
    """Sums over the predicted tokens of each sequence, float64 [n]: loss (nats), KL(plain || this), top-1 agreements."""

    loss: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    agree: Float[Tensor, " n"]


Run = Callable[[Tensor, Tensor, list[int]], AbstractContextManager[Any]]


def score(model: Model, sequences: Sequences, arms: Mapping[str, Run], *, batch_size: int = 16) -> dict[str, Scores]:
    """The sums of each arm on the same batches, beside the plain model's under the name `untouched`.

    An arm is called with (ids [b, t], mask [b, t], indices of the sequences) and gives a context in which the model
    runs. Batches are padded on the right. The logits are made a few tokens at a time, so that no [b, t, v] of float32
    is ever held, and arms are taken some at a time, so that neither are the states of hundreds of them; a family whose
    head cannot be told apart from its model is run in smaller batches instead.
    """
    if "untouched" in arms:
        raise UserError("an arm may not be called 'untouched': that is the plain model; choose another name")
    head = Head.of(model)
    out = {name: torch.zeros(len(sequences), 3, dtype=torch.float64) for name in ("untouched", *arms)}
    with torch.inference_mode():
        for batch in batches_that_fit(sequences.batches(batch_size), "sequences"):
            with batch as rows:
                widest = len(sequences.ids[rows[0]])
                size = len(rows) if head.alone else max(1, STATE_BUDGET // (widest * head.vocabulary * (len(arms) + 1)))
                for start in range(0, len(rows), size):
                    for name, sums in _scored(model, head, sequences, arms, rows[start : start + size]):
                        out[name][rows[start : start + size]] = sums
    return {name: Scores(*sums.unbind(1)) for name, sums in out.items()}


def _scored(
    model: Model, head: Head, sequences: Sequences, arms: Mapping[str, Run], part: list[int]
) -> Iterator[tuple[str, Float[Tensor, "b 3"]]]:
    """The sums of each arm on a batch, the plain model's with every group of arms that is held at once."""
    ids, mask = pad([sequences.ids[i] for i in part], model.pad_id, "right")
    starts = torch.tensor([sequences.starts[i] for i in part])
    counted = mask.bool() & (torch.arange(ids.shape[1]) >= starts[:, None])
    plain = head.states(ids, mask)
    group = max(1, HELD_BUDGET // plain.nbytes)
    names = list(arms)
    for first in range(0, max(1, len(names)), group):
        states = {"untouched": plain}
        for name in names[first : first + group]:
            with arms[name](ids, mask, part):
                states[name] = head.states(ids, mask)
        yield from _sums(head, states, ids, counted).items()


def _sums(head: Head, states: Mapping[str, Tensor], ids: Tensor, counted: Bool[Tensor, "b t"]) -> dict[str, Tensor]:
    """Per arm [b, 3]: loss, KL and agreements, summed over the predictions of the tokens that count."""
    row, column = counted[:, 1:].nonzero(as_tuple=True)  # the state at column predicts the token at column + 1
    targets = ids[row, column + 1]
    out = {name: torch.zeros(len(ids), 3, dtype=torch.float64) for name in states}
    step = max(1, LOGIT_BUDGET // head.vocabulary)
    for start in range(0, len(row), step):
        r, c = row[start : start + step], column[start : start + step]
        plain: Tensor | None = None
        for name, hidden in states.items():
            at = hidden[r.to(hidden.device), c.to(hidden.device)]
            q = head.logits(at).float().log_softmax(-1)
            if plain is None:
                plain = q
            target = targets[start : start + step, None].to(q.device)
            loss = -q.gather(1, target)[:, 0].double()
            # the sum over the vocabulary in float64: where both are close, float32 would leave rounding of either sign
            kl = (plain.double().exp() * (plain.double() - q.double())).sum(-1)
            agree = (q.argmax(-1) == plain.argmax(-1)).double()
            out[name].index_add_(0, r, torch.stack([loss, kl, agree], 1).cpu())
    return out


@dataclass(frozen=True, eq=False)
class Head:
    """The last step of a model, from states to logits, on its own where that can be proved to be the same.

    alone: states are the decoder's output [b, t, d] and `logits` turns rows of them into logits; otherwise states are
    the model's logits themselves.
    """

    model: Model
    alone: bool
    scale: float = 1.0
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        return int(text_config(self.model.module).vocab_size)

    def states(self, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"]) -> Float[Tensor, "b t _w"]:
        if not self.alone:
            return self.model.logits(ids, mask)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        options = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        out = self.model.backend.call(self.model, "decoder", options)  # nnsight edits the passes that it runs itself
        return out[0] if isinstance(out, tuple) else out.last_hidden_state

    def logits(self, states: Float[Tensor, "n _w"]) -> Float[Tensor, "n v"]:
        if not self.alone:
            return states
        head = self.model.module.get_output_embeddings()
        found = head(states.to(head.weight.device)) * self.scale
        return found if self.cap is None else self.cap * torch.tanh(found / self.cap)

    @classmethod
    def of(cls, model: Model) -> Head:
        """The head alone (scaled and capped as the config says) where it gives the model's own logits; else not alone."""
        config = text_config(model.module)
        if getattr(model.module, "get_output_embeddings", lambda: None)() is None or model.decoder is model.module:
            return cls(model, False)
        scale = float(getattr(config, "logit_scale", None) or 1 / float(getattr(config, "logits_scaling", None) or 1))
        found = cls(model, True, scale, getattr(config, "final_logit_softcapping", None))
        ids = torch.arange(3, 11)[None] % found.vocabulary
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            states = found.states(ids, mask)
            if states.shape[-1] != model.module.get_output_embeddings().weight.shape[-1]:
                return cls(model, False)
            mine, theirs = found.logits(states[0]).float(), model.logits(ids, mask)[0].float()
        same = torch.allclose(mine, theirs.to(mine.device), atol=1e-3 * float(theirs.abs().max()), rtol=0)
        return found if same else cls(model, False)


def ratio_interval(sums: Sequence[float] | Tensor, counts: Sequence[float] | Tensor) -> Interval:
    """sum(sums) / sum(counts) with Student's interval over sequences, linearised: each is sums - ratio * counts off.

    >>> ratio_interval([2.0, 4.0], [1.0, 2.0]).value
    2.0
    """
    s, n = torch.as_tensor(sums).double(), torch.as_tensor(counts).double()
    ratio = s.sum() / n.sum()
    return mean_interval(ratio + (s - ratio * n) / n.mean())
