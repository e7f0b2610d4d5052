"""How linear a model's blocks and the channels of its feed-forward networks are, on the states that prompts give them.

A block's output is linear in its input where a ridge map of the input predicts it on prompts that the map was not fitted on.
The shortcut makes most of a block's output its input, so that what the block writes (output less input) is scored too, which
is the figure to read; and the network alone, from the normed state that it is given. Each has a control: the same fit with
the inputs of other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences
from workbench.evaluate.statistics import Interval
from workbench.folding.calibration import Channels, Passing, calibrate, passing, text_batches
from workbench.folding.ffn import FFN
from workbench.folding.fold import ffns_of
from workbench.maps.moments import Moments
from workbench.maps.ridge import fit_ridge_targets
from workbench.maps.shard_scores import ShardScores
from workbench.models import Model
from workbench.prompts import PromptSet
from workbench.rendering import pad
from workbench.sites import Site

from .lens_rows import batches_of, split_prompts

if TYPE_CHECKING:
    import pandas as pd

SHARDS = 8
SOURCES = {"block": ("pre", "post"), "write": ("pre", "write"), "ffn": ("x", "y")}
"""what is scored: its input and its output, as blocks of the moments"""
CONTROL = "other"
"""the prefix of inputs of other tokens"""


@dataclass(frozen=True, eq=False)
class Linearity:
    """R2 of every block, weighted over its dimensions, and the channels of every network."""

    model: str
    r2: dict[str, tuple[Interval, ...]] = field(repr=False)
    """by what is scored (`block`, `write`, `ffn`): of each layer, with the jackknife over held-out shards of prompts"""
    control: dict[str, tuple[Interval, ...]] = field(repr=False)
    """the same with the inputs of other tokens"""
    channels: tuple[Channels, ...] = field(repr=False)
    gated: bool
    n_train: int
    n_held_out: int
    """rows that the maps were fitted on, and scored on; a BOS is left out of both"""

    def __repr__(self) -> str:
        kind = "gated" if self.gated else "plain"
        return f"Linearity({self.model!r}, {len(self.channels)} layers, {kind} networks, {self.n_held_out:,} held-out rows)"

    def frame(self) -> pd.DataFrame:
        """One line a layer: R2 of block, write and ffn with intervals and controls; quartiles of the channels' own R2, and
        the share of the channels' scores that their lower half has."""
        import pandas as pd

        lines = []
        for layer, found in enumerate(self.channels):
            line: dict[str, Any] = {"layer": layer}
            for what in SOURCES:
                one, other = self.r2[what][layer], self.control[what][layer]
                line |= {
                    what: one.value,
                    f"{what}_low": one.low,
                    f"{what}_high": one.high,
                    f"{what}_control": other.value,
                }
            low, middle, high = torch.quantile(found.r2, torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
            half = found.score.sort().values[: len(found.score) // 2].sum() / found.score.sum().clamp_min(1e-300)
            lines.append(line | {"channel_r2_low": low, "channel_r2": middle, "channel_r2_high": high,
                                 "lower_half_of_scores": float(half)})  # fmt: skip
        return pd.DataFrame(lines)

    def channel_frame(self) -> pd.DataFrame:
        """One line a channel: layer, channel, score, r2, variance, and slope and offset of its line (NaN where gated)."""
        import pandas as pd

        parts = []
        for layer, c in enumerate(self.channels):
            none = torch.full_like(c.score, torch.nan)
            columns = {"score": c.score, "r2": c.r2, "variance": c.variance, "slope": none if c.slope is None else c.slope,
                       "offset": none if c.offset is None else c.offset}  # fmt: skip
            table = pd.DataFrame({key: value.numpy() for key, value in columns.items()})
            table.insert(0, "channel", range(len(table)))
            table.insert(0, "layer", layer)
            parts.append(table)
        return pd.concat(parts, ignore_index=True)

    def _repr_html_(self) -> str:
        return str(self.frame().to_html(index=False, float_format="{:.4g}".format))


def linearity(
    model: Model,
    prompts: Any,
    *,
    holdout: float = 0.25,
    seed: int = 0,
    max_length: int | None = None,
    tokens: int = 4096,
) -> Linearity:
    """Scores the blocks and the channels of a language model; two passes over the prompts, and no activation is kept.

    Args:
        prompts: what `PromptSet.load` reads.
        holdout: share of the prompts that no map sees and that R2 is of; channels are scored on the others.
        tokens: of one batch, padding included.

    Raises:
        UserError: networks that cannot be folded (`find_ffns` says why), or too few prompts to hold out eight shards.

    >>> linearity(load("bundled:recipient"), "bundled:profile").frame()   # doctest: +SKIP
    """
    ffns = ffns_of(model)
    read = PromptSet.load(prompts)
    sequences = Sequences.of(model, read, max_length)
    train, held = split_prompts(read, sequences, (1 - holdout, holdout), seed)
    if len(held) < SHARDS:
        raise UserError(
            f"{read.name}: {len(held)} held-out prompts do not make {SHARDS} shards for an interval; give more"
        )
    channels = calibrate(model.module, ffns, text_batches(model, [sequences.ids[i] for i in train], tokens=tokens))
    shards = [held[i::SHARDS] for i in range(SHARDS)]
    fitted, *scored = [_moments(model, ffns, sequences, part, seed, tokens) for part in (train, *shards)]
    r2: dict[str, tuple[Interval, ...]] = {}
    control: dict[str, tuple[Interval, ...]] = {}
    for what, (source, target) in SOURCES.items():
        for made, prefix in ((r2, ""), (control, CONTROL)):
            made[what] = tuple(_score(fitted[layer], [s[layer] for s in scored], prefix + source, target)
                               for layer in range(model.n_layers))  # fmt: skip
    return Linearity(
        model.name, r2, control, channels, any(f.gated for f in ffns), fitted[0].n, sum(s[0].n for s in scored)
    )


def _score(train: Moments, shards: Sequence[Moments], source: str, target: str) -> Interval:
    fit = fit_ridge_targets([train], source, [target], alpha="gcv")[target]
    found = ShardScores.of(fit.map, shards, source, target, train=train).overall
    low, high = found.interval()
    return Interval(float(found.value[1]), float(low[1]), float(high[1]))


def _moments(model: Model, ffns: Sequence[FFN], sequences: Sequences, among: Sequence[int], seed: int,
             tokens: int) -> list[Moments]:  # fmt: skip
    """The moments of every layer over some prompts: input, output and write of the block, input and output of the network."""
    pairs = [(prefix + source, target) for source, target in SOURCES.values() for prefix in ("", CONTROL)]
    sums = [Moments(pairs=pairs, products=torch.float32) for _ in ffns]
    generator = torch.Generator().manual_seed(seed)
    bos = model.tokenizer.bos_token_id
    sites = sorted({Site(layer, point) for layer in range(model.n_layers) for point in ("resid_pre", "resid_post")})
    for batch in batches_of(sequences, among, tokens):
        ids, mask = pad([sequences.ids[i] for i in batch], model.pad_id, "right")
        kept = mask.bool()
        kept[:, 0] &= ids[:, 0] != (-1 if bos is None else bos)
        inner: dict[int, Passing] = {}
        with torch.inference_mode(), model.read(sites, lambda _, h, kept=kept: h[kept.to(h.device)]) as states:
            with passing(model.module, ffns, inner.__setitem__, [kept]):
                model.run(ids, mask)
        turn = torch.randperm(int(kept.sum()), generator=generator)
        for layer, one in inner.items():
            pre, post = states[Site(layer, "resid_pre")].float(), states[Site(layer, "resid_post")].float()
            x, y = one.x.float(), one.y.float()
            sums[layer].update({"pre": pre, "post": post, "write": post - pre, "x": x, "y": y,
                                f"{CONTROL}pre": _turned(pre, turn), f"{CONTROL}x": _turned(x, turn)})  # fmt: skip
    return [one.to("cpu") for one in sums]


def _turned(rows: Float[Tensor, "n d"], turn: Tensor) -> Float[Tensor, "n d"]:
    return rows[turn.to(rows.device)]
