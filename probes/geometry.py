"""The geometry of what blocks write, and whether they need one another's: costs in nats per token, with intervals.

Of each write the part along the residual stream and the rest, and what taking either away costs; runs of blocks that all read
the same state, or one that is a block old, against their length and their place. See `workbench.evaluate.write_parts` and
`workbench.evaluate.block_runs` for what is done to the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.block_runs import KINDS, blocks_run
from workbench.evaluate.causal import choose
from workbench.evaluate.scoring import Run, Scores, Sequences, ratio_interval, score
from workbench.evaluate.statistics import Interval
from workbench.evaluate.write_parts import PARTS, SIZES, WRITES, check_writes, without_part, write_sizes
from workbench.models import Model

if TYPE_CHECKING:
    import pandas as pd

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""of runs, in a model of more than eight blocks"""
PartArm = tuple[int, str, str]
"""layer, write, part"""
RunArm = tuple[str, int, int]
"""kind, first block, length"""


@dataclass(frozen=True, eq=False)
class WriteGeometry:
    """What `write_geometry` found, as sums over the tokens of each of n sequences."""

    model: str
    n_layers: int
    plain: Scores = field(repr=False)
    parts: Mapping[PartArm, Scores] = field(repr=False)
    runs: Mapping[RunArm, Scores] = field(repr=False)
    sizes: Mapping[tuple[int, str, str], Tensor] = field(repr=False)
    predicted: Float[Tensor, " n"] = field(repr=False)
    """tokens that each sequence predicts"""
    positions: str = "all"
    notes: tuple[str, ...] = ()

    def cost(self, layer: int, write: str, part: str) -> Interval:
        """The rise of the loss, nats per token, without a part of a write; paired over sequences."""
        return self._rise(self._of(self.parts, (layer, write, part)))

    def difference(self, layer: int, write: str = "block", a: str = "orthogonal", b: str = "parallel") -> Interval:
        """What taking part a away costs more than taking part b."""
        first, second = (self._of(self.parts, (layer, write, part)) for part in (a, b))
        return ratio_interval(first.loss - second.loss, self.predicted)

    def run_cost(self, kind: str, start: int, length: int) -> Interval:
        """The rise of the loss where blocks start to start + length - 1 run as `kind` says."""
        return self._rise(self._of(self.runs, (kind, start, length)))

    def length_cost(self, kind: str, length: int) -> Interval:
        """The same, its mean over all places of a run of that length."""
        return ratio_interval(self._mean_rise(kind, length), self.predicted)

    def growth(self, kind: str, length: int) -> Interval | None:
        """What runs of `length` blocks cost more than the next shorter ones that were measured and begin at the same blocks,
        paired, mean over these; None for the shortest."""
        shorter = [n for n in self.lengths(kind) if n < length]
        starts = {start for k, start, n in self.runs if (k, n) == (kind, length)}
        if not shorter or not starts:
            return None
        more = [self.runs[kind, s, length].loss - self.runs[kind, s, shorter[-1]].loss for s in sorted(starts)]
        return ratio_interval(torch.stack(more).mean(0), self.predicted)

    def lengths(self, kind: str) -> list[int]:
        """The lengths of runs that were measured."""
        return sorted({n for k, _, n in self.runs if k == kind})

    def _mean_rise(self, kind: str, length: int) -> Tensor:
        found = [one.loss - self.plain.loss for (k, _, n), one in self.runs.items() if (k, n) == (kind, length)]
        if not found:
            raise UserError(f"no run {kind!r:.20} of {length} blocks was measured; there are {self.lengths(kind)}")
        return torch.stack(found).mean(0)

    def _rise(self, found: Scores) -> Interval:
        return ratio_interval(found.loss - self.plain.loss, self.predicted)

    def _of(self, arms: Mapping[Any, Scores], key: Any) -> Scores:
        if key not in arms:
            raise UserError(f"{key} was not measured; there are {len(arms)}, such as {next(iter(arms), None)}")
        return arms[key]

    def size_frame(self) -> pd.DataFrame:
        """One line per layer and write: size |f| / |x|, cosine of f and x, share of the parallel part in |f|^2; mean over
        tokens, with intervals. The first token of a sequence is left out."""
        import pandas as pd

        counts = self.predicted
        lines = []
        for layer in range(self.n_layers):
            for write in WRITES[:2]:
                line: dict[str, Any] = {"layer": layer, "write": write}
                for key in SIZES:
                    line |= _spread(key, ratio_interval(self.sizes[layer, write, key], counts))
                lines.append(line)
        return pd.DataFrame(lines)

    def cost_frame(self) -> pd.DataFrame:
        """One line per layer, write and part: delta (nats per token) and kl, with intervals, and agreement of the top token."""
        import pandas as pd

        names = ("layer", "write", "part")
        return pd.DataFrame(
            [dict(zip(names, key, strict=True)) | self._line(found) for key, found in self.parts.items()]
        )

    def run_frame(self) -> pd.DataFrame:
        """One line per run: kind, start, length, and the same figures."""
        import pandas as pd

        names = ("kind", "start", "length")
        return pd.DataFrame(
            [dict(zip(names, key, strict=True)) | self._line(found) for key, found in self.runs.items()]
        )

    def length_frame(self) -> pd.DataFrame:
        """One line per kind and length of run: places, delta (mean over places), and `growth`."""
        import pandas as pd

        lines = []
        for kind in KINDS:
            for n in self.lengths(kind):
                places = sum((k, length) == (kind, n) for k, _, length in self.runs)
                line = {"kind": kind, "length": n, "places": places} | _spread("delta", self.length_cost(kind, n))
                grown = self.growth(kind, n)
                lines.append(line | _spread("growth", grown or Interval(float("nan"), float("nan"), float("nan"))))
        return pd.DataFrame(lines)

    def _line(self, found: Scores) -> dict[str, float]:
        agree = ratio_interval(found.agree, self.predicted)
        return _spread("delta", self._rise(found)) | _spread("kl", ratio_interval(found.kl, self.predicted)) | {
            "agreement": agree.value}  # fmt: skip

    def __repr__(self) -> str:
        tokens = int(self.predicted.sum())
        return (
            f"WriteGeometry({self.model}, {self.n_layers} blocks, {tokens:,} tokens of {len(self.predicted)} sequences)"
        )

    def _repr_html_(self) -> str:
        from html import escape

        tables = [
            t.to_html(index=False, float_format="{:.4f}".format) for t in (self.cost_frame(), self.length_frame())
        ]
        return f"<p>{escape(repr(self))}; rise of the loss in nats per token</p>" + "".join(tables)


def write_geometry(
    model: Model, prompts: Any, *, layers: Sequence[int] | None = None, lengths: Sequence[int] | None = None,
    positions: str = "all", batch_size: int = 16, max_length: int | None = None, seed: int = 0,
) -> WriteGeometry:  # fmt: skip
    """Takes the writes of a model apart, and runs its blocks together.

    Args:
        prompts: a PromptSet or what it loads; every token but the first of each sequence is predicted.
        layers: whose writes are taken apart, one at a time; all unless given.
        lengths: of runs, each measured at every place; unless given all up to eight blocks, of more `LENGTHS`.
        positions: where parts are taken away, as of `evaluate.causal.causal_effects`: special tokens are left as they are.
        seed: of the control's directions.

    Costs a forward pass of the prompts for each arm: nine for each layer, and three for each run. Blocks that run attention and
    MLP in parallel add both to one state, along which both are taken apart. Raises UserError for a model whose blocks add to no
    residual stream (post-norm), and for layers or lengths that it does not have.

    >>> write_geometry(load("bundled:recipient"), "bundled:evaluation_text").cost_frame()  # doctest: +SKIP
    """
    check_writes(model)
    chosen = list(range(model.n_layers)) if layers is None else [layer % model.n_layers for layer in layers
                                                                  if -model.n_layers <= layer < model.n_layers]  # fmt: skip
    if not chosen or (layers is not None and len(chosen) < len(layers)):
        raise UserError(
            f"layers {list(layers or [])} are out of range: {model.name} has layers 0 to {model.n_layers - 1}"
        )
    wanted = sorted(set(_lengths(model.n_layers) if lengths is None else lengths))
    if not wanted or wanted[0] < 1 or wanted[-1] > model.n_layers:
        raise UserError(f"lengths of runs {wanted} are out of range: {model.name} has {model.n_layers} blocks")
    sequences = Sequences.of(model, prompts, max_length)
    kept = choose(model, sequences, positions)
    if not any(kept):
        raise UserError(f"positions {positions!r} name no token of these sequences; choose others")
    parts = {(l, write, part): _part_arm(model, l, write, part, kept, seed) for l in dict.fromkeys(chosen)
             for write in WRITES for part in PARTS}  # fmt: skip
    runs = {(kind, start, n): _run_arm(model, start, n, kind) for kind in KINDS for n in wanted
            for start in range(model.n_layers - n + 1)}  # fmt: skip
    arms = {_name(key): arm for some in (parts, runs) for key, arm in some.items()}
    scores = score(model, sequences, arms, batch_size=batch_size)
    left_out = f"{sequences.left_out} prompts of fewer than two tokens were left out"
    return WriteGeometry(
        model.name, model.n_layers, scores["untouched"], {key: scores[_name(key)] for key in parts},
        {key: scores[_name(key)] for key in runs}, write_sizes(model, sequences, batch_size=batch_size),
        sequences.predicted, positions, (left_out,) if sequences.left_out else (),
    )  # fmt: skip


def _lengths(n_layers: int) -> Iterator[int]:
    yield from range(1, n_layers + 1) if n_layers <= 8 else (n for n in LENGTHS if n <= n_layers)


def _name(key: tuple[Any, ...]) -> str:
    return " ".join(map(str, key))


def _part_arm(model: Model, layer: int, write: str, part: str, chosen: Sequence[Sequence[int]], seed: int) -> Run:
    def run(ids: Tensor, _mask: Tensor, rows: list[int]) -> Any:
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        for line, i in enumerate(rows):
            keep[line, list(chosen[i])] = True
        return without_part(model, layer, write, part, keep, seed=seed)

    return run


def _run_arm(model: Model, start: int, length: int, kind: str) -> Run:
    return lambda *_: blocks_run(model, start, length, kind)


def _spread(key: str, found: Interval) -> dict[str, float]:
    return {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
