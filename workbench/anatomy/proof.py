"""The proof of a model's sites: what is read adds up, what is written is read back and changes what comes after."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from ..sites import Site
from .anatomy import INNER, probe_ids

if TYPE_CHECKING:
    from ..models import Model

log = logging.getLogger("workbench")
States = dict[Site, Tensor]


def prove(model: Model, layers: Sequence[int] | None = None) -> None:
    """Proves the sites of a model in a few passes of 16 tokens.

    Every layer: block outputs chain; of the points inside a block, what is written is read back, resid_post becomes what
    it must, and mlp_out follows from mlp_act alone. At `layers` (first, middle and last unless given): what is written
    to resid_post is read back and changes the logits. Raises UserError naming a resid_pre or resid_post that fails; any
    other point that fails is noted in `model.anatomy` and refused from then on.
    """
    chosen = sorted({0, model.n_layers // 2, model.n_layers - 1}) if layers is None else list(layers)
    ids = probe_ids(model.module)
    mask = torch.ones_like(ids)
    every = [Site(l, point) for l in range(model.n_layers) for point in model.anatomy[l].points]
    with torch.inference_mode():
        with model.read(every) as seen:
            before = model.logits(ids, mask)
        for l in range(model.n_layers):
            _prove_read(model, seen, l, tuple(ids.shape))
        for l in chosen:
            _prove_write(model, Site(l), seen[Site(l)], before, ids, mask)
        # resid_mid is written by way of attn_out, and mlp_out hides what mlp_act does: two passes
        # the second gives the MLP another input, by resid_mid or else by resid_pre, and the same mlp_act
        by_pre = [Site(l, "resid_pre") for l in range(model.n_layers) if "resid_mid" not in model.anatomy[l].points]
        others = {site: _changed(seen[site]) for site in by_pre}
        same = {site: h for site, h in seen.items() if site.point == "mlp_act"}
        inner = {site: _changed(h) for site, h in seen.items() if site.point in INNER}
        _prove_inside(model, seen, {s: h for s, h in inner.items() if s.point in ("attn_out", "mlp_out")}, ids, mask)
        _prove_inside(
            model, seen, {s: h for s, h in inner.items() if s.point == "resid_mid"} | others | same, ids, mask
        )
    for point, why in model.missing.items():
        log.info("%s (%s) has no %s at some layers: %s", model.name, model.family, point, why)


def _prove_read(model: Model, seen: States, layer: int, shape: tuple[int, ...]) -> None:
    site, wanted = Site(layer), (*shape, model.width)
    h = seen.get(site)
    if h is None or tuple(h.shape) != wanted:
        got = "nothing" if h is None else f"a tensor of shape {tuple(h.shape)}"
        raise UserError(f"{model.name}: {site} gave {got}, not {list(wanted)}; pass blocks=... with the path of the "
                        "ModuleList that holds the blocks")  # fmt: skip
    if layer + 1 < model.n_layers:
        after = seen[Site(layer + 1, "resid_pre")]
        if not torch.allclose(h.float(), after.to(h.device).float(), atol=1e-3, rtol=1e-3):
            raise UserError(f"{model.name}: the output of block {layer} is not the input of the next; this family is not "
                            "supported: pass blocks=... if its blocks lie elsewhere")  # fmt: skip


def _changed(h: Tensor) -> Tensor:
    """Other states of the same size."""
    return h + h.float().std().to(h.dtype) * torch.linspace(-1, 1, h.shape[-1], dtype=h.dtype, device=h.device)


def _prove_write(model: Model, site: Site, h: Tensor, before: Tensor, ids: Tensor, mask: Tensor) -> None:
    written = _changed(h)
    with model.edit({site: lambda *_: written}), model.read([site]) as seen:
        after = model.logits(ids, mask)
    if not torch.equal(seen[site], written):
        raise UserError(f"{model.name}: what was written to {site} was not read back; this family is not supported")
    if torch.allclose(before.float(), after.float(), atol=1e-6):
        raise UserError(f"{model.name}: writing to {site} did not change the logits; this family is not supported")


def _prove_inside(model: Model, plain: States, written: States, ids: Tensor, mask: Tensor) -> None:
    """Writes in all blocks in one pass, in which each is given a state of its own, that of the plain pass unless `written`
    has another: so what is written in one does not reach the next. What fails is noted in `model.anatomy`."""
    layers = [l for l in range(model.n_layers) if model.anatomy[l].attn and "attn_out" in model.anatomy[l].points]
    every = [Site(l, p) for l in layers for p in model.anatomy[l].points]
    given = {Site(l, "resid_pre"): plain[Site(l, "resid_pre")] for l in layers}
    given.update({site: h for site, h in written.items() if site in set(every)})
    if not layers:
        return
    with model.edit({site: lambda *_, new=new: new for site, new in given.items()}), model.read(every) as seen:
        model.run(ids, mask)
    for l in layers:
        for reason in _faults(l, [site for site in given if site.layer == l], plain, given, seen):
            model.anatomy[l] = model.anatomy[l].without(INNER, reason)


def _faults(layer: int, sites: Sequence[Site], plain: States, written: States, seen: States) -> Iterator[str]:
    """What is wrong with a block in which `written` was written and `seen` read."""
    pre, attn, mlp = (seen[Site(layer, point)] for point in ("resid_pre", "attn_out", "mlp_out"))
    for site in sites:
        if not _close(seen[site], written[site], plain[site], *([pre] if site.point != "mlp_act" else [])):
            yield f"what is written to {site.point} is not read back"
        if site.point == "mlp_act" and "mlp_out" not in {other.point for other in sites}:
            old = plain[Site(layer, "mlp_out")]  # the same mlp_act must give it, whatever else goes into the block
            if not _close(mlp, old, old.abs().amax(-1, keepdim=True).expand_as(old)):
                yield "what is written to mlp_act does not make mlp_out"
    if not _close(pre.to(mlp.device) + attn.to(mlp.device) + mlp, seen[Site(layer)], pre, attn, mlp):
        yield f"what is written to {' and '.join(site.point for site in sites)} does not reach the block's output"


def _close(x: Tensor, y: Tensor, *sizes: Tensor) -> bool:
    """Whether two states are equal up to the rounding of a few sums of states of those sizes."""
    a, b = x.cpu().double(), y.cpu().double()
    size = sum((other.cpu().double().abs() for other in sizes), a.abs() + b.abs())
    return bool(((a - b).abs() <= 4 * torch.finfo(y.dtype).eps * size).all())
