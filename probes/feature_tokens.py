"""What a feature is about, told by the tokens that it fires on hardest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.store import Store

from .dictionaries import Dictionary, check_features

if TYPE_CHECKING:
    import pandas as pd

CELLS = 1 << 22  # rows x features encoded at once
NAMED = 3  # different tokens in a name


@dataclass(frozen=True, eq=False)
class FeatureTokens:
    """The rows on which each of f features is largest, largest first; features that fire less have row -1 and value 0."""

    features: Int[Tensor, " f"]
    rows: Int[Tensor, "f n"]
    values: Float[Tensor, "f n"]
    texts: tuple[tuple[str, ...], ...]
    """per feature, the texts of those rows, as many as it fires on"""
    rate: Float[Tensor, " f"]
    """the share of all rows on which each fires"""

    def __repr__(self) -> str:
        return f"FeatureTokens({len(self.features)} features, {self.rows.shape[1]} tokens each)"

    @property
    def names(self) -> tuple[str, ...]:
        """A name per feature: its first different tokens; `(silent)` where it never fires."""
        found = []
        for texts in self.texts:
            parts = list(dict.fromkeys(text.strip() or repr(text) for text in texts))[:NAMED]
            found.append(" | ".join(parts) or "(silent)")
        return tuple(found)

    def frame(self) -> pd.DataFrame:
        """One line per feature, indexed by its number: name, rate, largest activation, and its tokens."""
        import pandas as pd

        columns = {"name": self.names, "rate": self.rate.numpy(), "largest": self.values[:, 0].numpy(),
                   "tokens": [list(texts) for texts in self.texts]}  # fmt: skip
        return pd.DataFrame(columns, index=pd.Index(self.features.numpy(), name="feature"))


def top_tokens(
    dictionary: Dictionary,
    rows: Store | Float[Tensor, "m d"] | Iterable[Float[Tensor, "_b d"]],
    n: int = 10,
    *,
    texts: Sequence[str] | None = None,
    features: Sequence[int] | Int[Tensor, " f"] | None = None,
    device: torch.device | str | None = None,
) -> FeatureTokens:
    """The n tokens on which each feature fires hardest, in one pass over the rows.

    Args:
        dictionary: its `site` says which rows of a store are read.
        rows: a store that holds that site; or rows, or batches of rows, with the text of each row in `texts`.
        n: tokens per feature.
        features: those wanted; all unless given.
        device: where to encode; the dictionary's unless given.

    Raises UserError for a store without the dictionary's site, texts that do not pair with the rows, or another width.

    >>> axes = Dictionary(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), "relu")
    >>> top_tokens(axes, torch.tensor([[1.0, 0.0], [3.0, -1.0]]), 1, texts=["one", "three"]).names
    ('three', '(silent)')
    """
    if n < 1:
        raise UserError(f"n must be at least 1 token per feature; got {n}")
    if isinstance(rows, Store) and dictionary.site is None:
        raise UserError("this dictionary does not say its site; give the rows of the site and their texts")
    if not isinstance(rows, Store) and texts is None:
        raise UserError("rows without a store need texts, one per row")
    index = torch.arange(dictionary.n_features) if features is None else check_features(features, dictionary.n_features)
    step = max(1, CELLS // dictionary.n_features)
    placed = dictionary if device is None else dictionary.to(device)
    best, fired, count = _largest(placed, _batches(rows, dictionary, step), index, n, step)
    if isinstance(rows, Store):
        texts = rows.rows(["text"])["text"].tolist()
    assert texts is not None
    if len(texts) != count:
        raise UserError(f"texts must name each row; got {len(texts)} texts for {count} rows")
    values, where = best.values.cpu(), best.rows.cpu()
    where = where.masked_fill(values <= 0, -1)
    listed = tuple(tuple(str(texts[r]) for r in line if r >= 0) for line in where.tolist())
    return FeatureTokens(index, where, values.clamp_min(0), listed, fired.cpu() / max(count, 1))


@dataclass
class _Best:
    values: Tensor  # [f, n]
    rows: Tensor  # [f, n]


def _batches(rows: Store | Tensor | Iterable[Tensor], dictionary: Dictionary, step: int) -> Iterable[Tensor]:
    if isinstance(rows, Store):
        assert dictionary.site is not None
        return rows.iter_batches(dictionary.site, step, dtype=torch.float32)
    return rows.split(step) if isinstance(rows, Tensor) else rows


def _largest(
    dictionary: Dictionary, batches: Iterable[Tensor], index: Tensor, n: int, step: int
) -> tuple[_Best, Tensor, int]:
    whole = dictionary.kind == "topk"
    reader = dictionary if whole else dictionary.select(index)
    where = reader.W_enc.device
    best = _Best(torch.zeros(len(index), n, device=where), torch.full((len(index), n), -1, device=where))
    fired, count = torch.zeros(len(index), dtype=torch.float64, device=where), 0
    for batch in batches:
        for part in batch.split(step):
            acts = reader.encode(part.to(where))
            acts = acts[:, index.to(where)] if whole else acts
            fired += (acts > 0).sum(0)
            top = acts.float().topk(min(n, len(acts)), dim=0)
            values = torch.cat([best.values, top.values.T], 1)
            rows = torch.cat([best.rows, top.indices.T + count], 1)
            # stable: of equal activations in different batches the earlier row stays
            order = values.argsort(dim=1, descending=True, stable=True)[:, :n]
            best = _Best(values.gather(1, order), rows.gather(1, order))
            count += len(part)
    return best, fired, count
