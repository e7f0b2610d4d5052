"""What a lens reads of one prompt, layer by layer and token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences
from workbench.models import Model
from workbench.prompts import PromptSet
from workbench.sites import Site

from .lens import Lens, lens_sites, site_word
from .lens_scores import divergence, expected
from .unembedding import Unembedding

if TYPE_CHECKING:
    import pandas as pd

    from workbench.adapters.adapter import Adapter
    from workbench.adapters.blend import Blend

HELD = 1 << 26
"""numbers of final log-probabilities that are kept from one layer to the next; beyond, they are made again"""
ANSWERS = ("final", "next")


@dataclass(frozen=True, eq=False)
class LensTable:
    """What a lens reads at l sites of t tokens of a prompt; numbers are float32 on the CPU, in nats where they are logs.

    `answers` are the tokens that ranks and probabilities are of: at each position the model's own final choice, the token
    that follows in the prompt (-1 at its end, where nothing does), or those of another table.
    """

    model: str
    lens: str
    """logit, tuned or jacobian"""
    adapter: str
    """its name; empty of the plain model"""
    sites: tuple[Site, ...]
    positions: Int[Tensor, " t"]
    """places in the prompt, from 0"""
    ids: Int[Tensor, " t"]
    answers: Int[Tensor, " t"]
    answer_kind: str
    """final, next or given"""
    entropy: Float[Tensor, "l t"]
    """of the lens's distribution over the next token"""
    kl: Float[Tensor, "l t"]
    """KL(final || lens): what is lost by taking the lens's distribution for the model's own"""
    answer_probability: Float[Tensor, "l t"]
    """NaN where there is no answer"""
    answer_rank: Float[Tensor, "l t"]
    """1 where no token is likelier than the answer; NaN where there is none"""
    top_ids: Int[Tensor, "l t k"]
    """the likeliest tokens, likeliest first"""
    top_probabilities: Float[Tensor, "l t k"]
    texts: dict[int, str]
    """of every token that is named above"""

    def __repr__(self) -> str:
        of = f" + {self.adapter!r}" if self.adapter else ""
        return f"LensTable({self.lens} lens of {self.model}{of}: {len(self.sites)} sites x {len(self.ids)} tokens)"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> list[str]:
        """The texts of the prompt's tokens, [t]."""
        return [self.texts[i] for i in self.ids.tolist()]

    def frame(self) -> pd.DataFrame:
        """One line per site and token: site, layer (a word), position, token, entropy, kl, answer, answer_probability,
        answer_rank, top and top_probability."""
        import pandas as pd

        layers, count = len(self.sites), len(self.ids)
        answers = [self.texts[i] if i >= 0 else "" for i in self.answers.tolist()]
        columns = {
            "site": [str(site) for site in self.sites for _ in range(count)],
            "layer": [site_word(site) for site in self.sites for _ in range(count)],
            "position": self.positions.tolist() * layers, "token": self.tokens * layers,
            "entropy": self.entropy.flatten().numpy(), "kl": self.kl.flatten().numpy(), "answer": answers * layers,
            "answer_probability": self.answer_probability.flatten().numpy(),
            "answer_rank": self.answer_rank.flatten().numpy(),
            "top": [self.texts[i] for i in self.top_ids[..., 0].flatten().tolist()],
            "top_probability": self.top_probabilities[..., 0].flatten().numpy(),
        }  # fmt: skip
        return pd.DataFrame(columns)

    def top(self, site: Site | str | int, position: int) -> pd.DataFrame:
        """The likeliest next tokens at one cell: token, id, probability; UserError for a cell that is not there.

        position: in the prompt, from 0; negative ones count from the table's end.
        """
        import pandas as pd

        i, j = self._cell(site, position)
        ids = self.top_ids[i, j].tolist()
        return pd.DataFrame({"token": [self.texts[one] for one in ids], "id": ids,
                             "probability": self.top_probabilities[i, j].numpy()})  # fmt: skip

    def _cell(self, site: Site | str | int, position: int) -> tuple[int, int]:
        asked, known = Site.parse(site), self.positions.tolist()
        if asked not in self.sites:
            raise UserError(f"this table has no {asked}; it has {', '.join(map(str, self.sites))}")
        if position < 0 and -position <= len(known):
            return self.sites.index(asked), len(known) + position
        if position not in known:
            raise UserError(f"this table has no token at position {position}; it has {known[0]} to {known[-1]}")
        return self.sites.index(asked), known.index(position)

    def _repr_html_(self) -> str:
        from .lens_html import table_html

        return table_html(self)


def lens_table(
    model: Model,
    prompt: Any,
    lens: Lens | None = None,
    *,
    adapter: Adapter | Blend | None = None,
    last: int | None = None,
    top: int = 5,
    answers: str | Int[Tensor, " t"] = "final",
    chat: bool | None = None,
    allow_mismatch: bool = False,
    unembedding: Unembedding | None = None,
) -> LensTable:
    """Reads one prompt through a lens, with an adapter or without.

    Two passes: the first for the model's own predictions, the second for what every layer says, a few tokens at a time,
    so that no [layer, token, vocabulary] is ever held.

    Args:
        prompt: a text, a chat (a list of messages) or a Prompt.
        lens: the logit lens unless given.
        adapter: acts on the positions that it names, as in a generation.
        last: the last so many tokens alone.
        top: how many of the likeliest tokens are kept of each cell.
        answers: what ranks and probabilities are of: `final`, the model's own likeliest next token at each position, `next`,
            the token that follows; or the ids of another table (`table.answers`), so that the two can be compared.
        chat: whether a string is a user's turn, put through the chat template (as `PromptSet.load` has it).
        allow_mismatch: take a lens or an adapter of another model.
        unembedding: that of the model, where it is at hand.

    Raises:
        UserError: a prompt of one token or of more than the model reads, a lens or an adapter of another model.

    >>> lens_table(load("bundled:donor"), "the toy of the queen").frame()    # doctest: +SKIP
    """
    lens = lens or Lens()
    lens.check(model, allow_mismatch)
    if top < 1 or (last is not None and last < 1):
        raise UserError(f"top={top} and last={last} must be at least 1")
    ids = torch.tensor(_encoded(model, prompt, chat))
    unembed = unembedding or Unembedding.of(model)
    first = max(0, len(ids) - last) if last is not None else 0
    sites, kept = lens_sites(model), ids[first:]
    run = partial(_run, model, ids, adapter, allow_mismatch)
    with torch.inference_mode():
        with run([sites[-1]], lambda site, h: h[0, first:].clone()) as found:
            final = found[sites[-1]]
        reader = _Reader(lens, unembed, final, min(top, unembed.vocabulary))
        reader.answers, kind = _answers(answers, reader, kept)
        with run(sites, lambda site, h: reader.read(site, h[0, first:])):
            pass
    columns = {name: torch.stack([reader.found[site][name] for site in sites]) for name in reader.found[sites[0]]}
    named = {*kept.tolist(), *reader.answers.tolist(), *columns["top_ids"].flatten().tolist()} - {-1}
    texts = {i: token_text(model.tokenizer, i) for i in named}
    name = "" if adapter is None else (getattr(adapter, "name", "") or "adapter")
    return LensTable(model.name, lens.kind, name, tuple(sites), torch.arange(first, len(ids)), kept, reader.answers, kind,
                     texts=texts, **columns)  # fmt: skip


def token_text(tokenizer: Any, token: int) -> str:
    """What a token of the vocabulary writes, its leading space included; its number in brackets where it writes nothing."""
    text = str(tokenizer.decode([token]))
    piece = tokenizer.convert_ids_to_tokens(token)
    if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
        text = f" {text}"  # SentencePiece leaves the space of a text's first token out
    return text or (piece if isinstance(piece, str) and piece else f"<{token}>")


def _encoded(model: Model, prompt: Any, chat: bool | None) -> list[int]:
    read = PromptSet.load([prompt] if not isinstance(prompt, PromptSet) else prompt, chat=chat)
    if len(read) != 1:
        raise UserError(f"a lens table is of one prompt; got {len(read)}")
    sequences = Sequences.of(model, read)
    whole = len(sequences.origin[0][0].ids)
    if whole > len(sequences.ids[0]):
        raise UserError(f"the prompt has {whole} tokens and {model.name} reads {model.max_length}; give a shorter one")
    return list(sequences.ids[0])


@contextmanager
def _run(
    model: Model, ids: Tensor, adapter: Adapter | Blend | None, allow_mismatch: bool, sites: Sequence[Site], take: Any
) -> Iterator[dict[Site, Tensor]]:
    """One pass over the prompt; `take` is called with the states of each site as they come."""
    row = ids[None]
    edited: AbstractContextManager[Any] = nullcontext()
    if adapter is not None:
        edited = adapter.on(model, allow_mismatch, prompt_lengths=torch.tensor([len(ids)]))
    with edited, model.read(sites, take) as found:
        model.run(row, torch.ones_like(row))
        yield found


def _answers(asked: str | Tensor, reader: _Reader, ids: Tensor) -> tuple[Tensor, str]:
    if isinstance(asked, Tensor):
        if asked.shape != ids.shape or bool((asked >= reader.unembed.vocabulary).any()):
            raise UserError(f"answers must be one id for each of {len(ids)} tokens; got shape {list(asked.shape)}")
        return asked.long(), "given"
    if asked == "next":
        return torch.cat([ids[1:], ids.new_full((1,), -1)]), "next"
    if asked != "final":
        raise UserError(f"unknown answers {asked!r}; allowed: {', '.join(ANSWERS)}, or ids")
    parts = [reader.final_of(rows).argmax(-1).cpu() for rows in reader.unembed.batches(reader.final)]
    return torch.cat(parts), "final"


class _Reader:
    """Turns the states of one site after another into a few numbers per token."""

    def __init__(self, lens: Lens, unembed: Unembedding, final: Tensor, top: int) -> None:
        self.lens, self.unembed, self.final, self.top = lens, unembed, final, top
        self.answers = torch.empty(0, dtype=torch.long)
        self.found: dict[Site, dict[str, Tensor]] = {}
        self._known: dict[int, Tensor] = {}

    def final_of(self, rows: slice) -> Float[Tensor, "n v"]:
        """The model's own log-probabilities of some rows; kept as far as the budget goes."""
        if rows.start in self._known:
            return self._known[rows.start]
        made = self.unembed.log_probabilities(self.final[rows])
        if sum(one.numel() for one in self._known.values()) + made.numel() <= HELD:
            self._known[rows.start] = made
        return made

    def read(self, site: Site, states: Float[Tensor, "t d"]) -> Tensor:
        parts = [self._summary(site, states[rows], rows) for rows in self.unembed.batches(states)]
        self.found[site] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return states.new_empty(0)

    def _summary(self, site: Site, states: Tensor, rows: slice) -> dict[str, Tensor]:
        p = self.final_of(rows)
        q = self.unembed.log_probabilities(self.lens(site, states))
        answers = self.answers[rows].to(q.device)
        none = answers < 0
        score = q.gather(1, answers.clamp_min(0)[:, None])
        rank = (q > score).sum(1).float() + 1
        best = q.topk(self.top, -1)
        found = {
            "entropy": -expected(q, q), "kl": divergence(p, q),
            "answer_probability": score[:, 0].exp().masked_fill(none, torch.nan),
            "answer_rank": rank.masked_fill(none, torch.nan),
            "top_ids": best.indices, "top_probabilities": best.values.exp(),
        }  # fmt: skip
        return {name: value.cpu() for name, value in found.items()}
