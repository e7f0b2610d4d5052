"""What an adapter is: low-rank parts at some sites, for some positions, with a strength."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..fingerprint import difference_of
from ..sites import Site
from .low_rank import LowRank

if TYPE_CHECKING:
    from ..models import Model


@dataclass(frozen=True, eq=False)
class Adapter:
    """Adapter parts at sites, the positions they act on, and a strength; a value with algebra.

    Args:
        parts: {site: LowRank}; kept in order of the sites.
        positions: which positions are edited: last (the last prompt token), prompt, generated, all, first:n, ...
        strength: factor on every delta; 0 leaves the model as it is, bit for bit.
        name: for people.
        base: fingerprint of the model that it belongs to; {} where that is not known.
        meta: anything else about it, JSON values. Name and meta take no part in `==`.
        terms: set by `+` where it acts differently at different positions: adapters of one positions each whose sum, on
            the same states, it is. It has no parts of its own then, and whoever asks for them gets a UserError; `split`
            gives the adapters one by one, whatever the kind.

    >>> import torch
    >>> a = vector(Site(2), torch.ones(4))
    >>> a.layers, a.width, a.rank, (a * 2 - a).delta(Site(2), torch.zeros(4)).tolist()
    ([2], 4, 1, [1.0, 1.0, 1.0, 1.0])
    """

    parts: Mapping[Site, LowRank]
    positions: str = "last"
    strength: int | float = 1.0
    name: str = ""
    base: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    terms: tuple[Adapter, ...] = ()

    def __post_init__(self) -> None:
        from ..backends.torch_hooks import check_policy

        if not abs(self.strength) < float(torch.finfo(torch.float32).max):  # NaN neither
            said = "of hundreds of digits" if isinstance(self.strength, int) else self.strength
            raise UserError(
                f"strength {said} is not a finite number of float32; 1 is the adapter as it is, 0 the plain model"
            )
        if abs(self.strength) > 1 << 53:  # no tensor is multiplied by an integer of more bits than it can hold
            object.__setattr__(self, "strength", float(self.strength))
        if self.terms:
            object.__setattr__(self, "positions", " and ".join(term.positions for term in self.terms))
            object.__setattr__(self, "parts", _Apart(self.positions))
            return
        if not self.parts:
            raise UserError("an adapter needs at least one part")
        check_policy(self.positions)
        ordered = {site: self.parts[site] for site in sorted(self.parts)}
        object.__setattr__(self, "parts", MappingProxyType(ordered))

    def __repr__(self) -> str:
        what = ", and ".join(
            ", ".join(f"{site} (width {part.width}, rank {part.rank})" for site, part in term.parts.items())
            + f", positions {term.positions!r}"
            for term in self.split()
        )
        of = f", of {self.base['name']}" if self.base.get("name") else ""
        return f"Adapter({self.name!r} at {what}, strength {self.strength:.3g}{of})"

    def split(self) -> list[Adapter]:
        """The adapters of one positions each whose sum it is; of most adapters, itself alone."""
        return [replace(t, strength=self.strength, name=self.name, base=self.base) for t in self.terms] or [self]

    @property
    def sites(self) -> list[Site]:
        """Sites that are edited, in order."""
        return sorted({site for term in self.split() for site in term.parts})

    @property
    def layers(self) -> list[int]:
        """Layers that are edited, ascending."""
        return sorted({site.layer for site in self.sites})

    @property
    def width(self) -> int:
        """Width of the states that it edits; UserError where its parts differ in width."""
        widths = sorted({part.width for term in self.split() for part in term.parts.values()})
        if len(widths) > 1:
            raise UserError(f"this adapter has parts of several widths: {widths}")
        return widths[0]

    @property
    def rank(self) -> int:
        """The largest rank among its parts."""
        return max(part.rank for term in self.split() for part in term.parts.values())

    def only(self, layers: Iterable[int]) -> Adapter:
        """The adapter with the parts at these layers alone; UserError for layers that it does not edit."""
        wanted = set(layers)
        if not wanted or not wanted <= set(self.layers):
            raise UserError(f"this adapter edits layers {self.layers}; asked for {sorted(wanted)}")
        if self.terms:
            kept = [term.only(wanted & set(term.layers)) for term in self.terms if wanted & set(term.layers)]
            return replace(_sum(kept), strength=self.strength, name=self.name, base=self.base, meta=self.meta)
        return replace(self, parts={site: part for site, part in self.parts.items() if site.layer in wanted})

    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """As `Tensor.to`: another device or dtype."""
        if self.terms:
            return replace(self, terms=tuple(term.to(*args, **kwargs) for term in self.terms))
        return replace(self, parts={site: part.to(*args, **kwargs) for site, part in self.parts.items()})

    def delta(self, site: Site, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What it adds to states h [..., d] at `site`, strength included."""
        if site not in self.parts:
            raise UserError(f"this adapter does not edit {site}; it edits {', '.join(map(str, self.parts))}")
        delta = self.parts[site].delta(h)
        return delta if self.strength == 1 else delta * self.strength

    def on(
        self, model: Model, allow_mismatch: bool = False, prompt_lengths: Any = None
    ) -> AbstractContextManager[None]:
        """The model with this adapter, for every forward pass inside the block; `generate` included.

        Only the positions that it names are touched; all others stay bit for bit. At strength 0 nothing is hooked.

        Args:
            allow_mismatch: use it on a model other than the one in `base`.
            prompt_lengths: real tokens of each prompt, [b], where the backend cannot know (`backends.torch_hooks`).

        Raises:
            UserError: another width, a layer that the model lacks, or another model, naming both.
        """
        from .blend import Blend

        return Blend([self]).on(model, allow_mismatch, prompt_lengths)

    def check(self, model: Model, allow_mismatch: bool = False) -> None:
        """Raises UserError where the adapter cannot act on `model`: another model, another width, a missing layer."""
        # whose it is comes first: the other two are then only symptoms
        if self.base and not allow_mismatch and (difference := difference_of(self.base, model.fingerprint)):
            raise UserError(
                f"this adapter belongs to {self.base.get('name', 'another model')}, not to "
                f"{model.fingerprint.get('name', model.name)}: {difference}; paste it, or pass allow_mismatch=True"
            )
        for site, part in (pair for term in self.split() for pair in term.parts.items()):
            if site.point != "mlp_act" and part.width != model.width:
                raise UserError(
                    f"this adapter has width {part.width} at {site} and {model.name} has width {model.width}; an "
                    "adapter of another model reaches it through a paste"
                )
        for site in self.sites:
            Site.parse(site, model.n_layers)

    def __mul__(self, scale: int | float) -> Adapter:
        """The adapter at `scale` times its strength."""
        return replace(self, strength=self.strength * scale)

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1

    def __add__(self, other: Adapter) -> Adapter:
        """Both at once, on the same states: ranks are concatenated where they share a site; strengths go into U.

        Of adapters for different positions it is an adapter of several `terms`.
        """
        if not isinstance(other, Adapter):
            return NotImplemented
        if self.base and other.base and (difference := difference_of(self.base, other.base)):
            names = self.base.get("name", "?"), other.base.get("name", "?")
            raise UserError(f"adapters of {names[0]} and {names[1]} do not add: {difference}")
        name = " + ".join(filter(None, (self.name, other.name)))
        return replace(_sum([*self.split(), *other.split()]), name=name, base=self.base or other.base)

    def __sub__(self, other: Adapter) -> Adapter:
        return self + -other if isinstance(other, Adapter) else NotImplemented

    @property
    def hash(self) -> str:
        """sha256 (hex) of what takes part in `==`: what a step that uses the adapter depends on."""
        if self.terms:
            return hashlib.sha256("".join(term.hash for term in self.split()).encode()).hexdigest()
        head = [self.positions, float(self.strength), dict(self.base), [str(site) for site in self.parts]]
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for part in self.parts.values():
            digest.update(part.act.encode())
            for tensor in (part.V, part.b, part.U):
                digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        mine, theirs = (self.positions, self.strength, self.base), (other.positions, other.strength, other.base)
        if self.terms or other.terms:
            return mine == theirs and self.terms == other.terms
        return mine == theirs and dict(self.parts) == dict(other.parts)

    def save(self, folder: str | Path, *, overwrite: bool = False, storage: str | None = None) -> None:
        """Writes adapter.json and adapter.safetensors, and of a paste its card, README.md.

        storage: `int8` keeps V and U as 8-bit integers with a scale for each rank, in a quarter of the bytes of float32; it
        is loaded as float32, and adapter.json has the relative error of each. Unless given, the tensors as they are.
        Raises UserError where `folder` exists, unless `overwrite`, and for an unknown storage.
        """
        from .adapter_files import write_adapter

        write_adapter(self, Path(folder), overwrite=overwrite, storage=storage)

    @classmethod
    def load(cls, path: str | Path, *, site: str | int | Site | None = None, positions: str | None = None) -> Adapter:
        """Reads an adapter of any format that is known, found by what is there; see `formats`.

        Args:
            path: what `save` wrote, `bundled:NAME`, a pyreft or adapter-hub folder, a GGUF control vector, or a file of
                steering vectors or of AdapterBias (.safetensors, .pt).
            site: where a steering vector acts, for files that do not say it.
            positions: in place of those of the file, or of what its format does where the file does not say them.

        Raises:
            UserError: anything else, or a file that is damaged or holds more than numbers.
        """
        from .formats import load_adapter

        return load_adapter(path, site=site, positions=positions)


def vector(site: Site, v: Float[Tensor, " d"], **options: Any) -> Adapter:
    """A steering vector as an adapter: delta(h) = v at `site` (V = 0, b = 1, U = v); options go to `Adapter`."""
    return Adapter({site: LowRank(v.new_zeros(len(v), 1), v.new_ones(1), v[None].clone())}, **options)


class _Apart(Mapping[Site, LowRank]):
    """In the place of the parts of an adapter that has several terms: the parts of none may be taken for all."""

    def __init__(self, positions: str) -> None:
        self.positions = positions

    def _refuse(self, *_: Any) -> Any:
        raise UserError(f"this adapter acts differently at {self.positions}; take one of adapter.split()")

    __getitem__ = __iter__ = __contains__ = _refuse

    def __len__(self) -> int:
        return 0


def _sum(adapters: Iterable[Adapter]) -> Adapter:
    """The sum on the same states, without name and base: one term for each positions, strengths in U."""
    by_positions: dict[str, dict[Site, LowRank]] = {}
    for adapter in adapters:
        parts = by_positions.setdefault(adapter.positions, {})
        for site, part in adapter.parts.items():
            scaled = part * adapter.strength
            parts[site] = parts[site] + scaled if site in parts else scaled
    terms = tuple(Adapter(parts, positions) for positions, parts in sorted(by_positions.items()))
    return terms[0] if len(terms) == 1 else Adapter({}, terms=terms)
