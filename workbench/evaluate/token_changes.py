"""Where in a text an adapter changes what a model says next: token by token, how far and from what to what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import UserError
from ..prompts import PromptSet, encode, response_ids
from .scoring import Head

if TYPE_CHECKING:
    import pandas as pd

    from ..adapters.adapter import Adapter
    from ..adapters.blend import Blend
    from ..models import Model

LOGITS_AT_ONCE = 1 << 22
"""logits compared at once, in numbers: 32 MB of float64 for each of the two distributions"""
ROWS_SHOWN = 20


@dataclass(frozen=True, eq=False)
class Likely:
    """The k likeliest next tokens at each of t positions, by one of the two distributions, with both probabilities."""

    ids: Int[Tensor, "t k"]
    before: Float[Tensor, "t k"]
    after: Float[Tensor, "t k"]


@dataclass(frozen=True, eq=False)
class TokenChanges:
    """What an adapter does to the next-token distribution at every position of one text; made by `token_changes`.

    Row i is about the token that follows token i: the last row about what would come after the text.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """the text of each token"""
    prompt_length: int
    """how many of them are the prompt's; the others are the answer's"""
    kl: Float[Tensor, " t"]
    """KL(without || with) in nats, float64; exactly 0 where nothing changed"""
    log_prob_before: Float[Tensor, " t"]
    """of the token that follows, in nats; NaN in the last row"""
    log_prob_after: Float[Tensor, " t"]
    likely_before: Likely
    likely_after: Likely
    names: Mapping[int, str] = field(repr=False)
    """the text of every token id in here"""
    model: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def largest(self) -> int:
        """The position that changed most."""
        return int(self.kl.argmax())

    def at(self, position: int) -> pd.DataFrame:
        """The likeliest tokens before and after at one position, each once, likeliest first: token, id, before, after.

        Raises UserError for a position that the text does not have.
        """
        import pandas as pd

        if not 0 <= position < len(self):
            raise UserError(f"there is no position {position}: the text has {len(self)} tokens, counted from 0")
        rows: dict[int, dict[str, Any]] = {}
        for likely in (self.likely_after, self.likely_before):
            columns = (likely.ids[position], likely.before[position], likely.after[position])
            for token, before, after in zip(*(c.tolist() for c in columns), strict=True):
                rows[token] = {"token": self.names[token], "id": token, "before": before, "after": after}
        ordered = sorted(rows.values(), key=lambda row: (-max(row["before"], row["after"]), row["id"]))
        return pd.DataFrame(ordered, columns=["token", "id", "before", "after"])

    def frame(self) -> pd.DataFrame:
        """One line for each position: what stands there, what changed, and the likeliest next token before and after."""
        import pandas as pd

        before, after = ([self.names[i] for i in likely.ids[:, 0].tolist()]
                         for likely in (self.likely_before, self.likely_after))  # fmt: skip
        return pd.DataFrame(
            {
                "position": range(len(self)),
                "token": self.tokens,
                "part": ["prompt" if i < self.prompt_length else "answer" for i in range(len(self))],
                "kl": self.kl.tolist(),
                "next": [*self.tokens[1:], None],
                "log_prob_before": self.log_prob_before.tolist(),
                "log_prob_after": self.log_prob_after.tolist(),
                "likeliest_before": before,
                "likeliest_after": after,
            }
        )

    def _repr_html_(self) -> str:
        kept = sorted(self.kl.argsort(descending=True, stable=True)[:ROWS_SHOWN].tolist())
        shown = self.frame().iloc[kept].to_html(index=False, escape=True, float_format="{:.4g}".format)
        said = f"{len(self)} tokens of {self.model}, KL {float(self.kl.sum()):.4g} nats in all"
        more = f"; the {len(kept)} that changed most" if len(kept) < len(self) else ""
        return f"<p>{escape(said + more)}</p>{shown}"


def token_changes(model: Model, text: Any, adapter: Adapter | Blend, top: int = 10) -> TokenChanges:
    """Runs a text through a model without and with an adapter, and compares the next-token distributions.

    KL(p || q) = sum_v p log(p / q) at each position, p without and q with the adapter. The logits are made and compared a
    few positions at a time, so that no [t, v] of a large vocabulary is held in float32; a family whose head cannot be
    told apart from its model holds them in the model's own dtype.

    Args:
        text: a prompt as `PromptSet.load` reads one (a string is a user's turn), or a pair (prompt, answer) whose answer,
            without the white space around it, stands where the model's would. An adapter for the last prompt token edits
            the last token of the prompt.
        top: how many of the likeliest tokens are kept at each position.

    Raises UserError for a text that is empty or does not fit into the model's context, for `top` below 1, and for an
    adapter of another model.

    >>> changes = token_changes(model, ("Is it safe?", "No."), adapter)  # doctest: +SKIP
    >>> changes.at(changes.largest)                                        # doctest: +SKIP
    """
    if top < 1:
        raise UserError(f"top {top} is out of range: at least one token must be kept at each position")
    ids, prompt_length = _encoded(model, text)
    head = Head.of(model)
    row = torch.tensor([ids])
    mask = torch.ones_like(row)
    with torch.inference_mode():
        before = head.states(row, mask)[0]
        with adapter.on(model, prompt_lengths=[prompt_length]):
            after = head.states(row, mask)[0] if _acts(adapter) else before
        columns = _compared(head, before, after, row[0, 1:], top)
    kl, loss_before, loss_after, *rest = columns
    likely = Likely(*rest[:3]), Likely(*rest[3:])
    seen = sorted({*ids, *(i for one in likely for i in one.ids.unique().tolist())})
    names = dict(zip(seen, model.tokenizer.batch_decode([[i] for i in seen]), strict=True))
    tokens = tuple(names[i] for i in ids)
    return TokenChanges(tuple(ids), tokens, prompt_length, kl, loss_before, loss_after, *likely, names, model.name)


def _encoded(model: Model, text: Any) -> tuple[list[int], int]:
    """The token ids of a text, and how many of them are the prompt's."""
    prompt, answer = text if isinstance(text, tuple) else (text, "")
    loaded, answer = PromptSet.load([prompt])[0], str(answer).strip()
    if answer:
        asked, said = response_ids(loaded, answer, model.tokenizer, end=False)
    else:
        asked, said = encode([loaded], model.tokenizer)[0], []
    total = len(asked) + len(said)
    if total > model.max_length:
        raise UserError(f"this text takes {total} tokens and {model.name} reads {model.max_length}; give a shorter one")
    return asked + said, len(asked)


def _acts(adapter: Adapter | Blend) -> bool:
    """Whether anything is edited at all: at strength 0 nothing is, and a second pass would be the first one again."""
    from ..adapters.blend import Blend

    several = adapter.adapters if isinstance(adapter, Blend) else adapter.split()
    return any(one.strength != 0 for one in several)


def _compared(
    head: Head, before: Float[Tensor, "t _w"], after: Float[Tensor, "t _w"], following: Int[Tensor, " n"], top: int
) -> list[Tensor]:
    """On the CPU: kl [t], log-probabilities of the following token [t] twice, and twice the likeliest tokens: ids and
    both probabilities [t, k]."""
    step = max(1, LOGITS_AT_ONCE // head.vocabulary)
    next_ids = torch.cat([following, following.new_zeros(1)])  # after the last token none follows
    parts = []
    for start in range(0, len(before), step):
        rows = slice(start, start + step)
        p, q = (head.logits(states[rows]).double().log_softmax(-1) for states in (before, after))
        parts.append([x.cpu() for x in _compare(p, q.to(p.device), next_ids[rows, None].to(p.device), top)])
    columns = [torch.cat(several) for several in zip(*parts, strict=True)]
    columns[1][-1] = columns[2][-1] = torch.nan
    return columns


def _compare(p: Float[Tensor, "n v"], q: Float[Tensor, "n v"], following: Int[Tensor, "n 1"], top: int) -> list[Tensor]:
    """Of log-probabilities: see `_compared`."""
    # a token of no probability adds nothing, also where both sides say so and their difference is no number
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
    kl = terms.sum(-1).clamp(min=0)
    found = [kl, p.gather(1, following)[:, 0], q.gather(1, following)[:, 0]]
    for side in (p, q):
        ids = side.topk(min(top, side.shape[-1])).indices
        found += [ids, p.gather(1, ids).exp(), q.gather(1, ids).exp()]
    return found
