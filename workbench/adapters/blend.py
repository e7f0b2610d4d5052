"""Several adapters at once, each with its strength, its positions and its schedule over the tokens that are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from ..backends.torch_hooks import names_prompts_alone, of_prompts
from ..errors import UserError
from ..sites import Site
from .adapter import Adapter

if TYPE_CHECKING:
    from ..backends.torch_hooks import Where
    from ..models import Model

SCHEDULES = "constant, linear:n, first:n"


@dataclass(frozen=True)
class Schedule:
    """The factor on an adapter's strength at the k-th generated token, k = 1, 2, ...; 1 throughout the prompt.

    `constant`: 1. `first:n`: 1 up to the n-th, then 0. `linear:n`: 1 at the first, falling in equal steps, 0 after the
    n-th: max(0, 1 - (k - 1) / n). Raises UserError for anything else.

    >>> Schedule("linear:4").factor(3), Schedule("first:4").factor(4), Schedule("first:4").factor(5)
    (0.5, 1.0, 0.0)
    """

    text: str = "constant"

    def __post_init__(self) -> None:
        kind, colon, count = self.text.partition(":")
        counted = kind in ("linear", "first") and count.isascii() and count.isdigit() and 0 < int(count[:9]) < 10**8
        if not (counted or (kind == "constant" and not colon)):
            raise UserError(f"unknown schedule {self.text!r}; allowed: {SCHEDULES}, n tokens from 1")

    @property
    def constant(self) -> bool:
        return self.text == "constant"

    def factor(self, token: int) -> float:
        """At the `token`-th generated token; 0 or less is the prompt."""
        from torch import tensor

        return float(self.factors(tensor([token]))[0])

    def factors(self, tokens: Any) -> Float[Tensor, " *shape"]:
        """`factor` of each of a tensor of such numbers, float32."""
        kind, _, count = self.text.partition(":")
        gone = (tokens - 1).clamp(min=0).float()  # tokens that have had their share
        if kind == "constant":
            return gone * 0 + 1
        return (gone < int(count)).float() if kind == "first" else (1 - gone / int(count)).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Blend:
    """Adapters that act together: each delta is of the state as no other adapter has touched it there, and they add up.

    Args:
        adapters: one or several, of one model; their positions may differ. An adapter's strength is its own (`a * 0.5`).
        schedules: what `Schedule` reads: one for all, or one for each.

    Raises:
        UserError: no adapters, another number of schedules, or a schedule for an adapter that edits no generated token.

    >>> import torch
    >>> from workbench.adapters import vector
    >>> a = vector(Site(2), torch.ones(4), positions="generated")
    >>> Blend([a, a * 0.5], ["constant", "first:8"])
    Blend(strength 1 at generated, strength 0.5 at generated first:8)
    """

    adapters: Sequence[Adapter]
    schedules: str | Sequence[str] = "constant"

    def __post_init__(self) -> None:
        adapters = tuple(self.adapters)
        listed = [self.schedules] * len(adapters) if isinstance(self.schedules, str) else list(self.schedules)
        if not adapters or len(listed) != len(adapters):
            raise UserError(f"{len(listed)} schedules do not go with {len(adapters)} adapters; give at least one adapter, and "
                            "one schedule for all or one for each")  # fmt: skip
        pairs = [(term, text) for adapter, text in zip(adapters, listed, strict=True) for term in adapter.split()]
        for adapter, text in pairs:
            if not Schedule(text).constant and adapter.positions not in ("generated", "all", "prompt+generated"):
                raise UserError(
                    f"the schedule {text!r} is over generated tokens and positions {adapter.positions!r} hold none; "
                    "choose positions generated, or all for the prompt too"
                )
        object.__setattr__(self, "adapters", tuple(adapter for adapter, _ in pairs))
        object.__setattr__(self, "schedules", tuple(text for _, text in pairs))

    def __repr__(self) -> str:
        pairs = zip(self.adapters, self.schedules, strict=True)
        said = (f"strength {a.strength:.3g} at {a.positions}{'' if s == 'constant' else ' ' + s}" for a, s in pairs)
        return f"Blend({', '.join(said)})"

    def __mul__(self, scale: int | float) -> Blend:
        """The blend at `scale` times its strengths."""
        return replace(self, adapters=tuple(adapter * scale for adapter in self.adapters))

    __rmul__ = __mul__

    def split(self) -> list[Adapter]:
        """Its adapters, of one positions each."""
        return list(self.adapters)

    @property
    def sites(self) -> list[Site]:
        """Every site that is edited, ascending."""
        return sorted({site for adapter in self.adapters for site in adapter.parts})

    @contextmanager
    def on(self, model: Model, allow_mismatch: bool = False, prompt_lengths: Any = None) -> Iterator[None]:
        """The model with these adapters, for every forward pass inside the block; see `Adapter.on`."""
        for adapter in self.adapters:
            adapter.check(model, allow_mismatch)
        pairs = [(a.to(model.device, model.dtype), Schedule(s))
                 for a, s in zip(self.adapters, self.schedules, strict=True) if a.strength != 0]  # fmt: skip
        if not pairs:
            yield
            return
        sites = sorted({site for adapter, _ in pairs for site in adapter.parts})
        edits = {site: _edit(site, [(a, s) for a, s in pairs if site in a.parts]) for site in sites}
        with model.edit(edits, prompt_lengths):
            yield


def _edit(site: Site, pairs: Iterable[tuple[Adapter, Schedule]]) -> Callable[[Tensor, Where], Tensor]:
    pairs = list(pairs)

    def fn(h: Tensor, where: Where) -> Tensor:
        edited = h
        for adapter, schedule in pairs:
            if not where.names_any(adapter.positions):
                continue
            _check_lengths(where, adapter.positions)
            chosen, factors = where.mask(adapter.positions), None
            if not schedule.constant:
                factors = schedule.factors(
                    where.position - where.prompt_length[:, None] + 1
                )  # 1 at the first generated
                chosen = chosen & (factors > 0)
                if not bool(chosen.any()):
                    continue
            delta = adapter.delta(site, h[chosen])
            if factors is not None:
                delta = delta * factors[chosen][:, None].to(delta)
            edited = h.clone() if edited is h else edited
            edited[chosen] = edited[chosen] + delta
        return edited

    return of_prompts(fn) if all(names_prompts_alone(adapter.positions) for adapter, _ in pairs) else fn


def _check_lengths(where: Where, positions: str) -> None:
    """UserError for a prompt that has fewer tokens than `positions` name."""
    if (short := where.too_short(positions)) is not None:
        row, tokens, needed = short
        raise UserError(f"prompt {row} of the batch (from 0) has {tokens} tokens, too few for positions {positions!r}, which "
                        f"name {needed}; choose other positions or leave it out")  # fmt: skip
