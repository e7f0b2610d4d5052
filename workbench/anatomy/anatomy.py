"""The parts of a model's blocks behind resid_mid, attn_out, mlp_out and mlp_act, found by watching one short pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..sites import POINTS, Site, text_config
from .block_sums import BlockSums, Known, Record
from .hooks import Hooks, hidden_of, state_in

if TYPE_CHECKING:
    from ..models import Model

ALWAYS = ("resid_pre", "resid_post")
"""a block's input and output, which need no anatomy"""
INNER = tuple(point for point in POINTS if point not in ALWAYS)


@dataclass(frozen=True)
class Part:
    """A module of a block: its path in the block, and what its output is multiplied by before it is added.

    flat: its states are [b*t, width]. overwritten: the block writes into its output later on.
    """

    path: str
    scale: float = 1.0
    flat: bool = False
    overwritten: bool = False


@dataclass(frozen=True)
class Anatomy:
    """The parts of one block.

    entry: a module that is given the block's input. attn, mlp: the modules whose outputs are added. down: the MLP's down
    projection; its input, `act_width` wide, is mlp_act. parallel: whether attention and MLP are given the same state; None
    where that cannot be told. missing: for each point that cannot be reached, why.
    """

    entry: str = ""
    attn: Part | None = None
    mlp: Part | None = None
    down: Part | None = None
    act_width: int = 0
    parallel: bool | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def points(self) -> tuple[str, ...]:
        """The points that can be read and edited."""
        return tuple(point for point in POINTS if point not in self.missing)

    def without(self, points: Sequence[str], reason: str) -> Anatomy:
        """The same with `points` missing as well."""
        return replace(self, missing={**dict.fromkeys(points, reason), **self.missing})

    def part(self, point: str) -> Part:
        """The module at whose output (at whose input, for mlp_act) a point is reached."""
        found = {"attn_out": self.attn, "resid_mid": self.attn, "mlp_out": self.mlp, "mlp_act": self.down}[point]
        assert found is not None, f"{point} is missing and was not refused"
        return found


def probe_ids(module: Any) -> Tensor:
    """Two rows of eight tokens, [2, 8]: two, so that states [b, t, d], [t, b, d] and [b*t, d] are told apart."""
    return torch.arange(3, 19).view(2, 8) % text_config(module).vocab_size


def resolve(model: Model) -> list[Anatomy]:
    """The anatomy of every block, from one forward pass of 16 tokens.

    Blocks may differ in kind. A second pass follows only where some blocks were made out and others not: what one block
    adds may drown in the rounding of a half-precision model, and is then taken to be as in the others if that adds up.
    """
    found = _probe(model, ())
    if len({a.attn is None for a in found}) == 2:
        found = _probe(model, _sums_of(found))
    return found


def check(model: Model, sites: Sequence[Site]) -> None:
    """Raises UserError for a site that the model does not have, with the reason."""
    for site in sites:
        Site.parse(site, model.n_layers)
        if site.point in INNER and (reason := model.anatomy[site.layer].missing.get(site.point)):
            allowed = ", ".join(model.anatomy[site.layer].points)
            raise UserError(
                f"{model.name} ({model.family}) has no {site}: {reason}; points of layer {site.layer}: {allowed}"
            )


class _Watch:
    """Hooks that record what the modules of one block after another do, and what follows from it."""

    def __init__(self, model: Model, known: Sequence[Known]) -> None:
        self.model, self.known, self.ids = model, known, probe_ids(model.module)
        self.numbers = [v for v in text_config(model.module).to_dict().values() if isinstance(v, float) and v]
        self.found: dict[int, Anatomy] = {}
        self.records: dict[str, Record] = {}
        self.pre: Tensor | None = None

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.records.clear()
        self.pre = self._settled(state_in(args, kwargs))[0]

    def inside(self, path: str, module: nn.Module) -> Any:
        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if path in self.records:  # it runs twice, and stands for no one place
                self.records[path] = Record(path, module)
                return
            live = hidden_of(output)
            (given, flat_given), (made, flat_made) = self._settled(state_in(args, kwargs)), self._settled(live)
            self.records[path] = Record(path, module, given, made, live, flat_given, flat_made)

        return after

    def leave(self, layer: int) -> Any:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            made = hidden_of(output)
            post = self._settled(made)[0]
            if self.pre is None or post is None or self.pre.shape != post.shape:
                self.found[layer] = Anatomy().without(INNER, "its blocks do not pass on states [batch, token, width]")
            elif not bool(torch.isfinite(self.pre).all() & torch.isfinite(post).all()):
                raise UserError(f"{self.model.name}: block {layer} makes NaN or infinity of a short text; its weights are "
                                "damaged, or its dtype is too narrow: fetch it again, or load it in float32")  # fmt: skip
            else:
                sums = BlockSums(self.pre, post, torch.finfo(made.dtype).eps, list(self.records.values()), self.numbers)
                self.found[layer] = _anatomy(sums, [*self.known, *_sums_of(list(self.found.values()))])
            self.records.clear()

        return after

    def _settled(self, states: Any) -> tuple[Tensor | None, bool]:
        """A copy in float64 [b, t, width] on the CPU, and whether the states came as [b*t, width]."""
        shape = tuple(self.ids.shape)
        if not isinstance(states, Tensor) or not states.is_floating_point() or states.ndim < 2:
            return None, False
        if states.ndim == 3 and tuple(states.shape[:2]) == shape:
            return states.detach().cpu().double().clone(), False
        if states.ndim == 2 and len(states) == self.ids.numel():
            return states.detach().cpu().double().clone().view(*shape, -1), True
        return None, False


def _probe(model: Model, known: Sequence[Known]) -> list[Anatomy]:
    watch = _Watch(model, known)
    with torch.inference_mode(), Hooks(model.module) as hooks:
        for layer in range(model.n_layers):
            block = model.block(layer)
            hooks.add(block.register_forward_pre_hook(watch.enter, with_kwargs=True))
            for path, child in block.named_modules():
                if path:
                    hooks.add(child.register_forward_hook(watch.inside(path, child), with_kwargs=True))
            hooks.add(block.register_forward_hook(watch.leave(layer)))
        ids = watch.ids.to(model.device)
        model.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    silent = Anatomy().without(INNER, "its blocks did not run through their hooks")
    return [watch.found.get(layer, silent) for layer in range(model.n_layers)]


def _sums_of(found: Sequence[Anatomy]) -> list[Known]:
    """The different sums that were found, as `BlockSums.find` takes them."""
    sums = [(a.attn.path, a.mlp.path, a.attn.scale, a.mlp.scale, a.parallel) for a in found if a.attn and a.mlp]
    return list(dict.fromkeys(sums))


def _anatomy(sums: BlockSums, known: Sequence[Known]) -> Anatomy:
    found = sums.find(known)
    if found is None:
        return Anatomy().without(INNER, sums.why_not())
    entry, parallel, (down, no_down) = sums.entry(), sums.is_parallel(found), sums.down(found)
    attn, mlp = (
        Part(record.path, scale, record.flat_made, record.is_overwritten)
        for record, scale in ((found.attn, found.attn_scale), (found.mlp, found.mlp_scale))
    )
    anatomy = Anatomy(entry.path if entry else "", attn, mlp, parallel=parallel)
    if parallel:
        anatomy = anatomy.without(
            ["resid_mid"], "its blocks run attention and MLP in parallel, with no state between them"
        )
    elif parallel is None:
        anatomy = anatomy.without(["resid_mid"], "no module of its blocks is given resid_pre + attn_out")
    elif entry is None:
        anatomy = anatomy.without(["resid_mid"], "no module of its blocks is given the block's own input")
    if down is None:
        anatomy = anatomy.without(["mlp_act"], no_down)
    else:
        assert down.given is not None
        anatomy = replace(anatomy, down=Part(down.path, flat=down.flat_given), act_width=down.given.shape[-1])
    if entry is None:  # what is flat is given its shape back there
        flat = [p for p in INNER if p not in anatomy.missing and anatomy.part(p).flat]
        anatomy = anatomy.without(flat, "no module of its blocks is given the block's own input")
    return anatomy
