"""What a behaviour is, and how much of it a model shows: log-odds, rates, and the damage done to neutral text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.blend import Blend
from ..adapters.demonstrations import check_positions, encode_demonstrations
from ..backends.torch_hooks import tokens_needed
from ..errors import UserError
from ..models import Model
from ..prompts import PromptSet, encode, opener_ids
from .batch_tasks import gathered
from .graders import find, grade
from .statistics import Interval, mcnemar, mean_interval, rate

LOGIT_BUDGET = 1 << 26  # logits held at once, in numbers: 256 MB of float32


@dataclass(frozen=True)
class Behaviour:
    """Something that a model does or does not do, and how to tell.

    Arguments: `openers`, beginnings of an answer that shows it; `grader` and `grader_args`, see `evaluate.graders`;
    `score_name`, what a rate of passing is called. Raises UserError for no openers, an unknown grader or argument.

    >>> Behaviour("refusal", ("sorry",), "refusal").score_name
    'rate'
    """

    name: str
    openers: tuple[str, ...]
    grader: str
    grader_args: Mapping[str, Any] = field(default_factory=dict)
    score_name: str = "rate"

    def __post_init__(self) -> None:
        if not self.openers or not all(self.openers):
            raise UserError(f"behaviour {self.name!r} needs openers, how its answers begin; got {self.openers}")
        find(self.grader, self.grader_args)


@dataclass(frozen=True, eq=False)
class Measured:
    """One arm: the answers to n prompts, which of them passed, and the log-odds of the behaviour on each."""

    name: str
    answers: tuple[str, ...]
    passed: tuple[bool, ...]
    log_odds: Float[Tensor, " n"]
    seconds: float

    def __repr__(self) -> str:
        return f"Measured({self.name!r}, {len(self.passed)} prompts, rate {self.rate}, log-odds {self.mean_log_odds})"

    @property
    def rate(self) -> Interval:
        """The share that passed, with Wilson's interval."""
        return rate(self.passed)

    @property
    def mean_log_odds(self) -> Interval:
        """The mean log-odds, with Student's t interval."""
        return mean_interval(self.log_odds)

    def as_dict(self, base: Measured | None = None) -> dict[str, Any]:
        """The arm as metrics.json keeps it; with `base`, the p-value of the paired comparison of their rates."""
        return {
            "rate": self.rate.as_dict(),
            "log_odds": self.mean_log_odds.as_dict(),
            "n": len(self.passed),
            "mcnemar_vs_base": None if base is None else mcnemar(self.passed, base.passed),
        }


def measure(
    model: Model,
    behaviour: Behaviour,
    prompts: PromptSet,
    adapter: Adapter | None = None,
    *,
    name: str = "",
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> Measured:
    """Greedy answers of a model (with `adapter`, where given), graded, and the log-odds on the same prompts."""
    return measure_each(model, behaviour, prompts, [(name, adapter)], max_new_tokens=max_new_tokens,
                        batch_size=batch_size)[0]  # fmt: skip


def measure_each(
    model: Model,
    behaviour: Behaviour,
    prompts: PromptSet,
    arms: Sequence[tuple[str, Adapter | None]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[Measured]:
    """`measure` of several arms, (name, adapter) each; `seconds` are an equal share of those of all."""
    began = time.perf_counter()
    names, adapters = [name for name, _ in arms], [adapter for _, adapter in arms]
    what = f"{behaviour.name}: {(names[0] or 'answers') if len(arms) == 1 else f'{len(arms)} arms'}"
    answers = model.generate_each(prompts, adapters, max_new_tokens=max_new_tokens, batch_size=batch_size, desc=what)
    passed = [grade(behaviour.grader, texts, prompts, **behaviour.grader_args) for texts in answers]
    odds = log_odds_each(model, prompts, behaviour.openers, adapters, batch_size=2 * batch_size)
    seconds = (time.perf_counter() - began) / max(1, len(arms))
    return [Measured(name, tuple(texts), tuple(verdicts), row, seconds)
            for name, texts, verdicts, row in zip(names, answers, passed, odds, strict=True)]  # fmt: skip


def log_odds(
    model: Model,
    prompts: PromptSet | Sequence[Any],
    openers: Sequence[str],
    adapter: Adapter | Blend | None = None,
    batch_size: int = 128,
) -> Float[Tensor, " n"]:
    """Log-odds of a behaviour where an answer begins: log p(S) - log(1 - p(S)), in nats, float64 [n] in prompt order.

    S is the set of first tokens of `openers`; p is the model's distribution after the last prompt token. Computed from
    the logits as logsumexp over S less logsumexp over the rest, so that p near 0 or 1 loses nothing. A first token that
    other answers share with an opener counts for the behaviour: choose openers that begin as nothing else does.

    Raises UserError where S is the whole vocabulary, or an opener has no tokens.
    """
    return log_odds_each(model, prompts, openers, [adapter], batch_size)[0]


def log_odds_each(
    model: Model,
    prompts: PromptSet | Sequence[Any],
    openers: Sequence[str],
    adapters: Sequence[Adapter | Blend | None],
    batch_size: int = 128,
) -> Float[Tensor, "k n"]:
    """`log_odds` under each of k adapters, all batches at once: what replicas share out best."""
    prompts = PromptSet.load(prompts)
    encoded = encode(prompts, model.tokenizer, max_length=model.max_length)
    for adapter in adapters:
        check_positions(adapter, prompts, encoded)
    batches = list(_by_length(encoded, batch_size))
    return gathered(model, "log_odds_batch", encoded, batches, adapters, "log-odds",
                     tokens=_first_tokens(model, prompts, openers))  # fmt: skip


def log_likelihood(
    model: Model,
    demonstrations: PromptSet | Sequence[Any],
    adapter: Adapter | Blend | None = None,
    batch_size: int = 16,
) -> Float[Tensor, " n"]:
    """log p(answer | prompt) of whole answers, in nats, float64 [n] in the order given.

    demonstrations: prompts with a `response` each. The adapter acts where it would while the model gave that answer.
    Raises UserError for one without a response, or too long for the model.
    """
    prompts = PromptSet.load(demonstrations)
    samples = encode_demonstrations(model, prompts)
    check_positions(adapter, prompts, [ids for ids, _ in samples])
    batches = list(_by_length([p + a for p, a in samples], batch_size))
    return gathered(model, "log_likelihood_batch", samples, batches, [adapter], "log-likelihood")[0]


def _first_tokens(model: Model, prompts: PromptSet, openers: Sequence[str]) -> list[int]:
    """The openers' first tokens after this kind of prompt; the template decides them, so one prompt tells for all."""
    return opener_ids(list(openers), model.tokenizer, prompts[0])


def _by_length(encoded: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices, longest first, so that a batch too large for memory fails at once."""
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1; got {batch_size}")
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))


@dataclass(frozen=True, eq=False)
class TextShift:
    """What an adapter does to plain text.

    kl: mean over texts of KL(base || edited) per continuation token, in nats, with its interval; per_text [n] holds
    the texts' own. perplexity_base, perplexity_edited: exp of the mean loss per token. n_tokens: those compared.
    """

    kl: Interval
    per_text: Float[Tensor, " n"] = field(repr=False)
    perplexity_base: float
    perplexity_edited: float
    n_tokens: int


def kl_on_text(
    model: Model,
    texts: PromptSet | Sequence[Any],
    adapter: Adapter | None = None,
    split: float = 0.5,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> TextShift:
    """How far an adapter moves a model on neutral text.

    Each text is cut after the share `split` of its tokens; the first part takes the place of the prompt, so an adapter
    for the last prompt token edits the token before the cut. Compared are the distributions of every token after it:
    KL(p || q) = sum_v p log(p / q), p of the plain model, q of the edited one. Without an adapter KL is 0 and both
    perplexities are the plain model's. Texts are cut to `max_length` tokens, at most the model's own limit. The first part
    has at least the tokens that the adapter's positions name; texts too short for that are left out.

    Raises UserError for a split outside 0 to 1, and for texts of which none is long enough.
    """
    if not 0 < split < 1:
        raise UserError(f"split must lie between 0 and 1; got {split}")
    limit = min(max_length or model.max_length, model.max_length)
    encoded = [row[:limit] for row in encode(PromptSet.load(texts), model.tokenizer)]
    needed = max((tokens_needed(term.positions) for term in adapter.split()), default=1) if adapter is not None else 1
    encoded = [row for row in encoded if len(row) > needed]
    if not encoded:
        raise UserError(
            f"none of the neutral texts has {'two' if needed == 1 else needed + 1} tokens; give longer texts"
        )
    widest = max(map(len, encoded)) * model.module.get_input_embeddings().weight.shape[0]
    size = max(1, min(batch_size, LOGIT_BUDGET // widest))
    cut = [(row, min(len(row) - 1, max(needed, round(split * len(row))))) for row in encoded]
    sums = gathered(model, "shift_batch", cut, list(_by_length(encoded, size)), [adapter], "neutral text")[0]
    kl, base, edited, tokens = sums.unbind(1)
    total = float(tokens.sum())
    per_text = kl / tokens
    before, after = (math.exp(float(loss.sum()) / total) for loss in (base, edited))
    return TextShift(mean_interval(per_text), per_text, before, after, int(total))


def shift_of_answers(
    model: Model, answers: Sequence[tuple[list[int], list[int]]], adapter: Adapter, batch_size: int = 32
) -> Float[Tensor, " n"]:
    """How far an adapter moves the distributions along given answers: mean KL per token, in nats, float64 [n].

    answers: the ids of a prompt and of its answer, as `response_ids` gives them. KL as of `kl_on_text`.
    """
    whole = [(p + a, len(p)) for p, a in answers]
    batches = list(_by_length([row for row, _ in whole], batch_size))
    sums = gathered(model, "shift_batch", whole, batches, [adapter], "answers' distributions")[0]
    return sums[:, 0] / sums[:, 3]
