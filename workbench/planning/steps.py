"""The steps of a profile and of a transport: what each does, holds and leaves, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import UserError
from ..maps import counts
from ..maps.grouped import plan_passes
from ..maps.ridge import ALPHAS
from ..profile.plan import BLOCK_BYTES, BLOCK_ROWS
from ..profile.sums import moments_bytes
from ..sites import Site
from ..transport.pairs import moment_sets, site_pairs
from ..transport.sums import SHARE
from ..work import ModelShape, Work, forward, store_bytes
from ..work.room import pass_bytes
from ..work.shape import ITEMSIZE
from .plan import Step
from .texts import Counted

CHUNK = 4096
"""rows of one product of the sums: how often these are read and written"""


def store_step(
    name: str, shape: ModelShape, counted: Counted, sites: Sequence[Site], *, dtype: str, store_dtype: str = "float32",
    batch_tokens: int = 8192,
) -> Step:  # fmt: skip
    """A profile that is kept: a forward pass to the last site, and its rows on the disk."""
    kept = store_bytes(shape, sites, counted.rows, store_dtype)
    block = min(kept, store_bytes(shape, sites, BLOCK_ROWS, store_dtype), BLOCK_BYTES)
    read = _read(shape, counted, sites, batch_tokens, dtype)
    return Step(
        name, f"{shape.name} at {len(sites)} sites, stored in {store_dtype}", read + Work(disk=kept), counted.texts.tokens,
        counted.rows, pass_bytes(shape, batch_tokens, dtype=dtype) + block, 2 * block,
    )  # fmt: skip


def moments_step(
    name: str, shape: ModelShape, counted: Counted, sites: Sequence[Site], *, dtype: str,
    pairs: Sequence[tuple[Site, Site]] | None = None, folds: int = 1, products: str = "float32", batch_tokens: int = 8192,
    device: str = "cpu",
) -> Step:  # fmt: skip
    """A profile of which sums and products alone are kept: of all pairs of sites, or of those given."""
    widths = {str(s): shape.width_of(s) for s in sites}
    named = None if pairs is None else [(str(a), str(b)) for a, b in pairs]
    held = moments_bytes(widths, named, folds)
    order = list(widths)
    indices = None if named is None else [(order.index(a), order.index(b)) for a, b in named]
    summed = _summed(counted.rows, list(widths.values()), indices, held / folds / 8, products, device)
    read = _read(shape, counted, sites, batch_tokens, dtype)
    block = min(store_bytes(shape, sites, min(counted.rows, BLOCK_ROWS), dtype), BLOCK_BYTES)
    n = len(sites) * (len(sites) - 1) // 2 if pairs is None else len(pairs)
    return Step(
        name, f"{shape.name}: sums of {len(sites)} sites and {n} pairs, {folds} fold{'s' if folds > 1 else ''}",
        read + summed + Work(disk=held), counted.texts.tokens, counted.rows,
        pass_bytes(shape, batch_tokens, dtype=dtype) + 2 * block + held, held / folds,
    )  # fmt: skip


def transport_steps(
    shape: ModelShape, counted: Counted, sites: Sequence[Site], *, dtype: str, memory: float, folds: int = 5,
    shards: int = 10, holdout: float = 0.25, alpha: str = "cv", bos: bool = True, batch_tokens: int = 8192,
    device: str = "cpu",
) -> tuple[list[Step], list[str]]:  # fmt: skip
    """The sums of a transport between all pairs of sites, in as many passes as memory asks for, and its fits; what is wrong.

    memory: bytes of the device, of which `transport.sums.SHARE` of what the model leaves is for moments. The shuffled
    control has sums and a fit of its own, and rows with BOS a second fit; causal figures and features come after these.
    """
    widths = {str(s): shape.width_of(s) for s in sites}
    pairs = site_pairs(sites)
    if not pairs:
        raise UserError("a transport goes from one site to a later one; plan with two sites at least")
    named = [(str(a), str(b)) for a, b in pairs]
    room, said = SHARE * (memory - shape.bytes(dtype)), list[str]()
    try:
        passes = plan_passes(widths, named, int(room), copies=2 * moment_sets(folds, shards, first=bos))
    except UserError as err:
        passes = [[pair] for pair in named]
        said.append(f"transport: {err}")
    return grid_steps(shape, counted, passes, widths, dtype=dtype, folds=folds, shards=shards, alpha=alpha, bos=bos,
                      batch_tokens=batch_tokens, device=device), said  # fmt: skip


def grid_steps(
    shape: ModelShape, counted: Counted, passes: Sequence[Sequence[tuple[str, str]]], widths: Mapping[str, int], *, dtype: str,
    folds: int = 5, shards: int = 10, alpha: str = "cv", bos: bool = True, batch_tokens: int = 8192, device: str = "cpu",
) -> list[Step]:  # fmt: skip
    """The sums and the fits of a transport whose pairs of sites are divided into passes. widths: of each site."""
    read, summed, held, by_last = Work(), Work(), 0.0, dict[int, Work]()
    for some in passes:
        names = sorted({name for pair in some for name in pair})
        sources = sorted({a for a, _ in some})
        blocks = [*names, *(f"{a}@" for a in sources)]
        index = {name: i for i, name in enumerate(blocks)}
        wanted = [(index[a], index[b]) for a, b in some] + [(index[f"{a}@"], index[b]) for a, b in some]
        sized = [widths[name.removesuffix("@")] for name in blocks]
        numbers = sum(sized[a] * sized[b] for a, b in wanted) + sum(d * d for d in sized)
        summed += _summed(counted.rows, sized, wanted, numbers, "float32", device)
        held = max(held, 8.0 * moment_sets(folds, shards, first=bos) * numbers)
        sites = [Site.parse(name) for name in names]
        last = max(site.layer for site in sites)
        if last not in by_last:
            by_last[last] = _read(shape, counted, sites, batch_tokens, dtype)
        read += by_last[last]
    pairs = [pair for some in passes for pair in some]
    fits = _grid_flops(widths, pairs, folds if alpha == "cv" else 0, shards, device) * (1 + bos)
    many = f"{len(passes)} pass{'es' if len(passes) > 1 else ''}"
    return [
        Step("sums", f"{shape.name}: {len(pairs)} pairs of {len(widths)} sites, {many}", read + summed,
             len(passes) * counted.texts.tokens, counted.rows, pass_bytes(shape, batch_tokens, dtype=dtype) + held, 0.0),
        Step("fits", f"ridge, baselines and control, {folds} folds and {shards} shards", Work({"float64": fits}),
             device=held, spread=False),
    ]  # fmt: skip


def _read(shape: ModelShape, counted: Counted, sites: Sequence[Site], batch_tokens: int, dtype: str) -> Work:
    last = max(site.layer for site in sites)
    return forward(shape, counted.texts, stop_after=last, batch_tokens=batch_tokens, dtype=dtype)


def _summed(
    rows: float,
    widths: Sequence[int],
    pairs: Sequence[tuple[int, int]] | None,
    numbers: float,
    products: str,
    device: str,
) -> Work:
    """The products of rows, and the float64 sums that each chunk of them is added to: 24 bytes a number, read and written."""
    moved = ITEMSIZE[products] * rows * sum(widths) + 24.0 * numbers * max(1.0, rows / CHUNK)
    return Work({products: counts.moments_flops(rows, widths, pairs, device)}, moved=moved)


def _grid_flops(
    widths: Mapping[str, int], pairs: Sequence[tuple[str, str]], folds: int, shards: int, device: str
) -> float:
    """Ridge and its control from every source, an orthogonal map of each pair, and the scores of all on every shard."""
    total = 0.0
    for source in dict.fromkeys(a for a, _ in pairs):
        d, targets = widths[source], [widths[b] for a, b in pairs if a == source]
        total += 2 * counts.ridge_flops(d, targets, alphas=len(ALPHAS), folds=folds, device=device)
        for e in targets:
            scored = counts.product_flops(d, d, e) + counts.product_flops(d, e, e)
            total += counts.svd_flops(d, e) + counts.product_flops(d, min(d, e), e) + 3 * shards * scored
    return total + sum(counts.eigh_flops(widths[b]) for b in {b for _, b in pairs})
