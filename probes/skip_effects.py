"""What a layer is worth to later layers and tokens: one layer changed, and what then changes after it and in the output.

    e_s = ||y - ybar||_2 over the next-token distributions, at tokens after t_s, where layer s was skipped up to t_s

Every layer costs a pass over the prompts; several share one as copies of a batch (`workbench.evaluate.layer_changes`).
Source: arXiv:2505.13898, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.layer_changes import KINDS, STATISTICS, Copies, LayerChange, changed_copies, over_tokens
from workbench.evaluate.scoring import LOGIT_BUDGET, Head, Sequences, ratio_interval
from workbench.evaluate.statistics import Interval, mean_interval
from workbench.models import Model
from workbench.progress import progress
from workbench.rendering import pad
from workbench.sites import Site

from .lens_rows import batches_of

if TYPE_CHECKING:
    import pandas as pd

SCOPES = ("future", "all")
BATCH_TOKENS, COPIES = 8192, 8
"""tokens of one pass, all copies together; copies that share an untouched one, itself among them"""


@dataclass(frozen=True, eq=False)
class SkipEffects:
    """What changing each of s layers does, for each of n prompts; `max` and `mean` are over the tokens that count."""

    model: str
    kind: str
    """skip, local or erase; see `workbench.evaluate.layer_changes`"""
    scope: str
    """future: changed up to a token t_s drawn for each prompt (of erase, at t_s alone), measured after it; all: changed and
    measured at every token"""
    layers: tuple[int, ...]
    n_layers: int
    later: Float[Tensor, "2 s l n"] = field(repr=False)
    """relative change of what each later layer writes; NaN for the changed layer and those before it"""
    outputs: Float[Tensor, "2 s n"] = field(repr=False)
    """||y - ybar||_2 of the next-token distributions, between 0 and sqrt(2)"""
    split: Int[Tensor, " n"] = field(repr=False)
    """t_s of each prompt"""
    index: tuple[int, ...] = field(repr=False)
    """which of the prompts given these are"""
    left_out: int
    """prompts too short to have a token after t_s"""

    def __repr__(self) -> str:
        what = f"{len(self.layers)} of {self.n_layers} layers of {self.model}, {self.scope} tokens"
        return f"SkipEffects({self.kind}, {what}, {len(self.split)} prompts)"

    def output(self, layer: int, statistic: str = "max") -> Interval:
        """Mean over prompts of ||y - ybar||_2, with Student's interval."""
        return mean_interval(self.outputs[_statistic(statistic), self._place(layer)])

    def effect(self, layer: int, later: int, statistic: str = "max") -> Interval:
        """Mean over prompts of the relative change of what a later layer writes."""
        found = self.later[_statistic(statistic), self._place(layer), later]
        if bool(found.isnan().any()):
            raise UserError(f"layer {later} does not come after layer {layer}")
        return mean_interval(found)

    def halves(self, statistic: str = "max") -> Interval:
        """Mean effect on the output of the layers in the first half over that in the second, the last layer left out (it has
        nothing to act through); a ratio over prompts with its interval. Raises UserError where a half has no layer."""
        first = [i for i, l in enumerate(self.layers) if l < self.n_layers / 2]
        second = [i for i, l in enumerate(self.layers) if self.n_layers / 2 <= l < self.n_layers - 1]
        if not first or not second:
            raise UserError(
                f"layers {list(self.layers)} of {self.n_layers} do not lie in both halves (the last one left out)"
            )
        found = self.outputs[_statistic(statistic)]
        return ratio_interval(found[first].mean(0), found[second].mean(0))

    def matrix(self, statistic: str = "max") -> pd.DataFrame:
        """Mean relative change: changed layers down, later layers across; NaN where there is none."""
        import pandas as pd

        return pd.DataFrame(self.later[_statistic(statistic)].mean(-1).numpy(), index=list(self.layers))

    def frame(self) -> pd.DataFrame:
        """One line per changed layer and place it is measured at, a later layer or the `output`: max and mean, with their
        95 % intervals over prompts."""
        import pandas as pd

        lines: list[dict[str, Any]] = []
        for layer in self.layers:
            later = [l for l in range(self.n_layers) if l > layer]
            for place in [*later, "output"]:
                line: dict[str, Any] = {"kind": self.kind, "scope": self.scope, "layer": layer, "later": str(place)}
                for name in STATISTICS:
                    found = self.output(layer, name) if place == "output" else self.effect(layer, int(place), name)
                    line |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
                lines.append(line | {"prompts": len(self.split)})
        return pd.DataFrame(lines)

    def _repr_html_(self) -> str:
        return str(self.frame().to_html(index=False, float_format="{:.4g}".format))

    def _place(self, layer: int) -> int:
        if layer not in self.layers:
            raise UserError(f"layer {layer} was not changed; there are {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)


def _statistic(name: str) -> int:
    if name not in STATISTICS:
        raise UserError(f"unknown statistic {name!r} over tokens; allowed: {', '.join(STATISTICS)}")
    return STATISTICS.index(name)


def layer_effects(
    model: Model,
    prompts: Any,
    *,
    kind: str = "skip",
    scope: str = "future",
    layers: Sequence[int] | None = None,
    means: Mapping[int, Float[Tensor, " d"]] | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
) -> SkipEffects:
    """Changes one layer after the other and measures every later layer's write and the output.

    The cost is a forward pass over the prompts for each layer, and an untouched one for every seven of them. In half
    precision, what is smaller than the rounding of the residual stream is noise.

    Args:
        prompts: anything that `PromptSet.load` reads, or `Sequences`. Tokens at position 0 never count.
        kind: skip, local or erase; see `workbench.evaluate.layer_changes`.
        scope: `future` or `all`. The position t_s is drawn uniformly for each prompt, the same for all layers; erase
            changes the one token t_s, and is of `future` alone.
        layers: those to change, negative ones from the end; all unless given.
        means: of erase, the mean state after each layer, as `depth_curves(...).means` has it.
        batch_tokens: tokens of one pass, all copies together (one prompt may have more).

    Raises UserError for layers that are not there, an unknown kind or scope, and prompts that are all too short.

    >>> layer_effects(load("bundled:donor"), "bundled:profile").halves()     # doctest: +SKIP
    """
    chosen = _chosen(model, layers, kind, scope)
    sequences = prompts if isinstance(prompts, Sequences) else Sequences.of(model, prompts, max_length)
    need = 3 if scope == "future" else 2
    index = [i for i, row in enumerate(sequences.ids) if len(row) >= need]
    if not index:
        raise UserError(f"no prompt has {need} tokens, as effects on {scope} tokens need; give longer ones")
    lengths = torch.tensor([len(row) for row in sequences.ids])
    drawn = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    split = 1 + (drawn * (lengths - 2).clamp_min(1)).long()  # of 1 to length - 2
    head, changes = Head.of(model), [LayerChange(layer, kind) for layer in chosen]
    later = torch.full((2, len(chosen), model.n_layers, len(sequences)), torch.nan, dtype=torch.float64)
    outputs = torch.full((2, len(chosen), len(sequences)), torch.nan, dtype=torch.float64)
    each = min(COPIES - 1, len(changes))
    groups = [range(start, min(start + each, len(changes))) for start in range(0, len(changes), each)]
    batches = batches_of(sequences, index, max(1, batch_tokens // (1 + each)))
    with torch.inference_mode(), progress(total=len(batches) * len(groups), desc=f"{kind}, {scope} tokens") as bar:
        for batch in batches:
            ids, mask = pad([sequences.ids[i] for i in batch], model.pad_id, "right")
            at, counted = _tokens(mask.bool(), split[batch], kind, scope)
            for group in groups:
                some = [changes[j] for j in group]
                with changed_copies(model, some, at, counted, means) as copies:
                    states = head.states(copies.repeated(ids), copies.repeated(mask))
                for place, j in enumerate(group):
                    later[:, j, :, batch] = copies.later[:, place]
                    outputs[:, j, batch] = _outputs(head, states, copies, place + 1, counted)
                bar.update(1)
    return SkipEffects(model.name, kind, scope, tuple(chosen), model.n_layers, later[..., index], outputs[..., index],
                       split[index], tuple(index), len(sequences) - len(index) + sequences.left_out)  # fmt: skip


def _chosen(model: Model, layers: Sequence[int] | None, kind: str, scope: str) -> list[int]:
    if kind not in KINDS:
        raise UserError(f"unknown change of a layer {kind!r}; allowed: {', '.join(KINDS)}")
    if scope not in SCOPES:
        raise UserError(f"unknown scope {scope!r} of an effect; allowed: {', '.join(SCOPES)}")
    if kind == "erase" and scope != "future":
        raise UserError("erasing changes one token and is measured at those after it; take scope='future'")
    chosen = sorted(
        {Site.parse(l, model.n_layers).layer for l in (range(model.n_layers) if layers is None else layers)}
    )
    if not chosen:
        raise UserError("no layers to change; give at least one, or leave layers out for all")
    return chosen


def _tokens(
    real: Bool[Tensor, "b t"], split: Int[Tensor, " b"], kind: str, scope: str
) -> tuple[Bool[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """(tokens at which a layer is changed, tokens that count)."""
    place = torch.arange(real.shape[1])
    if scope == "all":
        return real, real & (place > 0)
    at = place == split[:, None] if kind == "erase" else place <= split[:, None]
    return at & real, real & (place > split[:, None])


def _outputs(
    head: Head, states: Tensor, copies: Copies, copy: int, counted: Bool[Tensor, "b t"]
) -> Float[Tensor, "2 b"]:
    """Max and mean over the counted tokens of ||softmax - softmax'||_2, a few tokens at a time."""
    parts = states.unflatten(0, (1 + len(copies.changes), -1))
    row, column = (one.to(states.device) for one in counted.nonzero(as_tuple=True))
    found = torch.zeros(counted.shape, dtype=torch.float64)
    step = max(1, LOGIT_BUDGET // head.vocabulary)
    for start in range(0, len(row), step):
        r, c = row[start : start + step], column[start : start + step]
        plain, other = (head.logits(parts[i][r, c]).float().softmax(-1) for i in (0, copy))
        found[r.cpu(), c.cpu()] = (plain - other).norm(dim=-1).double().cpu()
    return over_tokens(found, counted)
