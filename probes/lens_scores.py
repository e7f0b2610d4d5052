"""How far lenses are from the model's own predictions, layer by layer, on prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences, ratio_interval
from workbench.evaluate.statistics import Interval
from workbench.models import Model
from workbench.sites import Site

from .lens import Lens, lens_sites, site_word
from .lens_rows import BATCH_TOKENS, batches_of, iter_rows
from .unembedding import Unembedding

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class LensScores:
    """Sums over the tokens of each of n prompts, for each of m lenses and l sites; a BOS is left out."""

    model: str
    lenses: tuple[str, ...]
    sites: tuple[Site, ...]
    kl: Float[Tensor, "m l n"]
    """KL(final || lens) in nats"""
    agree: Float[Tensor, "m l n"]
    """tokens at which the lens's likeliest next token is the model's"""
    tokens: Float[Tensor, " n"]

    def __repr__(self) -> str:
        what = f"{', '.join(self.lenses)} at {len(self.sites)} sites"
        return f"LensScores({what}, {int(self.tokens.sum()):,} tokens of {len(self.tokens)} prompts)"

    def mean_kl(self, lens: str, site: Site) -> Interval:
        """Nats per token, with Student's interval over prompts."""
        i, j = self._cell(lens, site)
        return ratio_interval(self.kl[i, j], self.tokens)

    def change(self, before: str, after: str, site: Site) -> Interval:
        """KL of `after` less that of `before`, prompt by prompt: below 0 where `after` is nearer to the model."""
        (i, j), (k, _) = self._cell(before, site), self._cell(after, site)
        return ratio_interval(self.kl[k, j] - self.kl[i, j], self.tokens)

    def _cell(self, lens: str, site: Site) -> tuple[int, int]:
        if lens not in self.lenses or site not in self.sites:
            raise UserError(f"no score of {lens!r} at {site}; there are {', '.join(self.lenses)} at "
                            f"{', '.join(map(str, self.sites))}")  # fmt: skip
        return self.lenses.index(lens), self.sites.index(site)

    def frame(self) -> pd.DataFrame:
        """One line per lens and site: kl, kl_low, kl_high (nats per token), agree, agree_low, agree_high (share of tokens)."""
        import pandas as pd

        lines: list[dict[str, Any]] = []
        for i, lens in enumerate(self.lenses):
            for j, site in enumerate(self.sites):
                line: dict[str, Any] = {"lens": lens, "site": str(site), "layer": site_word(site)}
                for name, sums in (("kl", self.kl), ("agree", self.agree)):
                    found = ratio_interval(sums[i, j], self.tokens)
                    line |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
                lines.append(line | {"tokens": int(self.tokens.sum()), "prompts": len(self.tokens)})
        return pd.DataFrame(lines)

    def _repr_html_(self) -> str:
        return str(self.frame().to_html(index=False, float_format="{:.4g}".format))


def lens_scores(
    model: Model,
    prompts: Any,
    lenses: Mapping[str, Lens],
    *,
    among: Sequence[int] | None = None,
    sites: Sequence[Site] | None = None,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    unembedding: Unembedding | None = None,
) -> LensScores:
    """KL to the model's own predictions and agreement with them, of several lenses on the same tokens.

    Args:
        prompts: anything that `PromptSet.load` reads, or `Sequences`.
        lenses: by name.
        among: indices of the prompts that count; all unless given.
        sites: all that a lens looks at unless given.
        max_length: tokens of each prompt that are read; the model's context unless given.

    Raises UserError for no lens, and for a lens of another model.
    """
    if not lenses:
        raise UserError('no lens given; give such as {"logit": Lens()}')
    for lens in lenses.values():
        lens.check(model)
    sequences = prompts if isinstance(prompts, Sequences) else Sequences.of(model, prompts, max_length)
    unembed, index = unembedding or Unembedding.of(model), list(range(len(sequences)) if among is None else among)
    seen, end = list(sites or lens_sites(model)), Site(model.n_layers - 1)
    kl, agree = (torch.zeros(len(lenses), len(seen), len(sequences), dtype=torch.float64) for _ in range(2))
    tokens = torch.zeros(len(sequences), dtype=torch.float64)
    with torch.no_grad():
        for rows in iter_rows(model, sequences, sorted({*seen, end}), batches_of(sequences, index, batch_tokens)):
            tokens.index_add_(0, rows.prompt, torch.ones(len(rows.prompt), dtype=torch.float64))
            for part in unembed.batches(rows.states[end]):
                p, prompt = unembed.log_probabilities(rows.states[end][part]), rows.prompt[part]
                for i, lens in enumerate(lenses.values()):
                    for j, site in enumerate(seen):
                        q = unembed.log_probabilities(lens(site, rows.states[site][part]))
                        kl[i, j].index_add_(0, prompt, divergence(p, q).double().cpu())
                        agree[i, j].index_add_(0, prompt, (p.argmax(-1) == q.argmax(-1)).double().cpu())
    kept = tokens > 0
    return LensScores(model.name, tuple(lenses), tuple(seen), kl[..., kept], agree[..., kept], tokens[kept])


def saved_scores(lens: Lens) -> pd.DataFrame:
    """The held-out figures that a tuned lens was saved with: lens (logit, start, tuned), site, layer, kl, kl_low, kl_high.

    Empty where it has none: another kind, or not fitted here. Raises UserError where they are damaged.
    """
    import pandas as pd

    columns = ["lens", "site", "layer", "kl", "kl_low", "kl_high"]
    try:
        lines = [
            {"lens": name, "site": str(one["site"]), "layer": str(one["layer"]),
             **{f"kl{end}": float(one[f"kl_{name}{end}"]) for end in ("", "_low", "_high")}}
            for name in ("logit", "start", "tuned") for one in lens.meta.get("figures", [])
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as err:
        raise UserError(f"the figures that this lens was saved with cannot be read ({err}); fit it again") from err
    return pd.DataFrame(lines, columns=columns)


def divergence(p: Float[Tensor, "n v"], q: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(p || q) in nats of log-probabilities, never below 0.

    >>> divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()).item()   # doctest: +ELLIPSIS
    0.1438...
    """
    return (expected(p, p) - expected(p, q)).clamp_min(0)


def expected(p: Float[Tensor, "n v"], values: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """sum_v exp(p) * values; where exp(p) = 0 it counts as nothing, whatever the value."""
    weight = p.exp()
    return (weight * values.masked_fill(weight == 0, 0.0)).sum(-1)
