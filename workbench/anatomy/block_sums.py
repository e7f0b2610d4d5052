"""What adds up in one pass through a block: which modules make attn_out, mlp_out and mlp_act, and in which order.

Names hint, sums decide. A module counts as a part only where adding its output, times a number, gives what the block
adds to the residual stream, to the rounding of the model's dtype, and where leaving it out does not.

    sequential: resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out
    parallel:   resid_post = resid_pre + attn_out + mlp_out
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SEEN = 0.02  # a term is seen where this share of its elements stands out of the rounding
_ATTENTION = re.compile(r"attn|attention")
_NO_ATTENTION = re.compile(r"norm|ln|layernorm|drop")


@dataclass(eq=False)
class Record:
    """What one module of a block was given and what it made, in float64 [b, t, width] on the CPU; None where it has no
    such shape. live: the output itself, to see whether it is overwritten later. flat: the states came as [b*t, width]."""

    path: str
    module: nn.Module
    given: Tensor | None = None
    made: Tensor | None = None
    live: Tensor | None = None
    flat_given: bool = False
    flat_made: bool = False

    @property
    def depth(self) -> int:
        return self.path.count(".")

    @property
    def is_attention(self) -> bool:
        return any(_ATTENTION.search(name) and not _NO_ATTENTION.search(name) for name in self.path.split("."))

    @property
    def is_projection(self) -> bool:
        """Whether it maps widths, as Linear, Conv1D and their quantised and adapted kin do."""
        kind = type(self.module).__name__.lower()
        return "linear" in kind or any(hasattr(self.module, name) for name in ("in_features", "infeatures", "nx"))

    @property
    def is_overwritten(self) -> bool:
        assert self.live is not None
        assert self.made is not None
        return not torch.equal(self.live.detach().cpu().double().reshape(self.made.shape), self.made)

    def holds(self, other: Record) -> bool:
        return other.path == self.path or other.path.startswith(self.path + ".")


@dataclass(frozen=True)
class Sum:
    """resid_post = resid_pre + attn_scale * (attn's output) + mlp_scale * (mlp's output)."""

    attn: Record
    mlp: Record
    attn_scale: float = 1.0
    mlp_scale: float = 1.0
    parallel: bool | None = None  # as in the block that it was known from


Known = tuple[str, str, float, float, bool | None]
"""a sum of another block: the paths of attention and MLP, their scales, and whether they run in parallel"""


class BlockSums:
    """One pass through a block.

    pre, post: its input and output, float64 [b, t, d] on the CPU. eps: the rounding of their dtype. records: what its
    modules did, in the order in which they ended. numbers: those of the configuration, among which scales are looked for.
    """

    def __init__(
        self, pre: Tensor, post: Tensor, eps: float, records: Sequence[Record], numbers: Sequence[float]
    ) -> None:
        self.pre, self.post, self.eps, self.numbers = pre, post, eps, numbers
        self.records = list(records)
        self.by_path = {r.path: r for r in self.records}
        self.wide = [r for r in self.records if r.made is not None and r.made.shape == pre.shape]

    def find(self, known: Sequence[Known]) -> Sum | None:
        """The parts of the block; `known` are those of other blocks, which are tried first and need not be seen here: a
        block whose terms drown in the rounding is taken for one of its kind."""
        for attn_path, mlp_path, a, m, parallel in known:
            attn, mlp = self.by_path.get(attn_path), self.by_path.get(mlp_path)
            if attn in self.wide and mlp in self.wide and attn and mlp and self._adds_up(attn, mlp, a, m, seen=False):
                return Sum(attn, mlp, a, m, parallel)
        pairs = [(attn, mlp) for attn in self._attentions() for mlp in self._others()]
        for attn, mlp in pairs:
            if self._adds_up(attn, mlp, 1.0, 1.0):
                return Sum(attn, mlp)
        for attn, mlp in pairs:
            for a, m in self._scales(attn, mlp):
                if self._adds_up(attn, mlp, a, m):
                    return Sum(attn, mlp, a, m)
        return None

    def is_parallel(self, found: Sum) -> bool | None:
        """True where the MLP was given what the attention was given, or a norm of the block's input; False where a module
        was given resid_pre + attn_out; None where neither can be seen."""
        assert found.attn.made is not None
        mid = self.pre + found.attn_scale * found.attn.made
        if not self._stands_out(mid - self.pre, mid):
            return found.parallel
        for record in self._outside_attention():
            if record.given is not None and self._same(record.given, mid):
                return False
        root = self._root(self.down(found)[0] or found.mlp, found.attn)
        attention = self._root(found.attn, found.mlp)
        normed = [r.made for r in self.records if r.made is not None and r.given is not None and self._is_input(r)]
        if root.given is not None and any(
            x is not None and x.shape == root.given.shape and torch.equal(x, root.given)
            for x in [attention.given, self.pre, *normed]
        ):
            return True
        return None

    def down(self, found: Sum) -> tuple[Record | None, str]:
        """The down projection, whose output is that of the MLP (before a norm that follows it); or None, and why."""
        maker: Record | None = found.mlp
        for _ in range(3):  # the MLP itself, or a norm after it, or a dropout between them
            assert maker is not None
            made = maker.made
            down = [
                r for r in self._outside_attention() if r.is_projection and r.given is not None and _equal(r.made, made)
            ]
            if down:
                chosen = min(down, key=lambda r: r.depth)
                if "expert" in chosen.path or self._has_experts(self._root(chosen, found.attn)):
                    return None, "its MLP is a mixture of experts, each of which has its own"
                return chosen, ""
            if any(maker.module.children()):
                break
            before = [r for r in self._outside_attention() if r is not maker and _equal(r.made, maker.given)]
            if not before:
                break
            maker = min(before, key=lambda r: r.depth)
        if self._has_experts(self._root(found.mlp, found.attn)) or (maker and self._has_experts(maker)):
            return None, "its MLP is a mixture of experts, each of which has its own"
        return None, "no projection within its MLP makes the MLP's output"

    def entry(self) -> Record | None:
        """A module that is given the block's input as it is, the outermost and then the first."""
        given = [r for r in self.records if r.given is not None and not r.flat_given and self._is_input(r)]
        return min(given, key=lambda r: r.depth, default=None)

    def why_not(self) -> str:
        """Why `find` found nothing, in words."""
        last = self.wide[-1] if self.wide else None
        if last is not None and "norm" in type(last.module).__name__.lower() and _equal(last.made, self.post):
            return "its blocks norm the sum of residual and MLP (post-norm), so nothing is added to a residual stream"
        if not self._attentions():
            return "its blocks have no module that is called attention and makes states of the model's width"
        return "no attention and no other module of its blocks add up to what a block adds to the residual stream"

    def _attentions(self) -> list[Record]:
        """Attention modules, and the norms and dropouts that follow them; what comes last comes first."""
        found = [r for r in self.wide if r.is_attention]
        outer = [r for r in found if not any(o.holds(r) and o is not r for o in found)]
        for record in self.wide:
            if record not in found and not any(record.module.children()) and any(
                _equal(record.given, before.made) for before in found
            ):  # fmt: skip
                outer.append(record)
                found.append(record)
        return [*reversed(outer), *(r for r in found if r not in outer)]

    def _others(self) -> list[Record]:
        """Everything that may be the MLP: the outermost first, of these the last first."""
        return sorted(reversed(self._outside_attention(self.wide)), key=lambda r: r.depth)

    def _outside_attention(self, records: Sequence[Record] | None = None) -> list[Record]:
        return [r for r in (self.records if records is None else records) if not r.is_attention]

    def _root(self, record: Record, other: Record) -> Record:
        """The outermost module that holds `record` and not `other`."""
        return min(
            (r for r in self.records if r.holds(record) and not r.holds(other)), key=lambda r: r.depth, default=record
        )

    def _has_experts(self, record: Record) -> bool:
        return any("expert" in name for name, _ in record.module.named_modules())

    def _is_input(self, record: Record) -> bool:
        return record.given is not None and record.given.shape == self.pre.shape and torch.equal(record.given, self.pre)

    def _same(self, x: Tensor, y: Tensor) -> bool:
        """Whether x is y, up to rounding, and is not the block's input."""
        if x.shape != y.shape:
            return False
        bound = self.eps * (self.pre.abs() + x.abs() + y.abs())
        return bool(((x - y).abs() <= bound).all()) and self._stands_out(x - self.pre, x)

    def _stands_out(self, term: Tensor, total: Tensor) -> bool:
        """Whether a term is more than the rounding of pre + term = total."""
        return _share(term.abs() > 2 * self.eps * (self.pre.abs() + total.abs())) >= _SEEN

    def _adds_up(self, attn: Record, mlp: Record, a: float, m: float, seen: bool = True) -> bool:
        assert attn.made is not None
        assert mlp.made is not None
        first = (0, slice(0, 1))  # one token rules out nearly all
        for part in (first, ...):
            x, y, pre, post = (t[part] for t in (a * attn.made, m * mlp.made, self.pre, self.post))
            bound = self.eps * (pre.abs() + post.abs() + x.abs() + y.abs())
            if not bool(((post - pre - x - y).abs() <= bound).all()):
                return False
        return not seen or all(_share(term.abs() > 2 * bound) >= _SEEN for term in (x, y))

    def _scales(self, attn: Record, mlp: Record) -> Iterator[tuple[float, float]]:
        """The factors that fit best, in units of the rounding; first as the nearest numbers of the configuration."""
        assert attn.made is not None
        assert mlp.made is not None
        weight = 1 / (self.eps * (self.pre.abs() + self.post.abs()) + torch.finfo(torch.float64).tiny ** 0.5).flatten()
        terms = torch.stack([attn.made.flatten() * weight, mlp.made.flatten() * weight], 1)
        gram, moment = terms.T @ terms, terms.T @ ((self.post - self.pre).flatten() * weight)
        if not torch.linalg.cond(gram) <= 1e8:  # of zeros it is not a number
            return
        fit = torch.linalg.solve(gram, moment).tolist()
        if not all(1e-4 < abs(s) < 1e4 for s in fit):
            return
        near = [min((1.0, *self.numbers), key=lambda n: abs(n - s)) for s in fit]
        yield near[0], near[1]
        yield fit[0], fit[1]


def _equal(x: Tensor | None, y: Tensor | None) -> bool:
    return x is not None and y is not None and x.shape == y.shape and torch.equal(x, y)


def _share(condition: Tensor) -> float:
    return float(condition.double().mean())
