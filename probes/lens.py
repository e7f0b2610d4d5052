"""A lens: what a model would predict if it stopped at a layer; plain (logit lens), or through a translator per layer.

The state h at a site is taken to the output of the last block and unembedded as the model does it:

    logits = unembed(norm(h + h @ A + b))

with A = 0 and b = 0 for the logit lens, fitted for the tuned lens (`tuned_lens`), and the mean Jacobian less the identity
for the Jacobian lens (`jacobian_lens`). Sites are the input of block 0, the embeddings, and the output of each block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.fingerprint import difference_of
from workbench.maps.linear_map import LinearMap
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.models import Model

KINDS = ("logit", "tuned", "jacobian")


@dataclass(frozen=True, eq=False)
class Lens:
    """Translators from sites to the output of the last block, for one model; a value without the model itself.

    Args:
        kind: logit, tuned or jacobian.
        translators: {site: map}; what is added to the state, h + map(h), as tuned-lens has it. A site without one is read
            as it stands.
        base: fingerprint of the model that it belongs to; {} of the logit lens, which fits every model.
        meta: how it was made, JSON values; it takes no part in `==`.

    >>> shift = Lens("tuned", {Site(0): LinearMap(torch.zeros(2, 2), torch.ones(2))})
    >>> shift(Site(0), torch.zeros(1, 2)).tolist(), shift(Site(1), torch.zeros(1, 2)).tolist()
    ([[1.0, 1.0]], [[0.0, 0.0]])

    Source: arXiv:2303.08112, eq. 8, with its residual parametrisation; `KINDS` has the others.
    """

    kind: str = "logit"
    translators: Mapping[Site, LinearMap] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown kind of lens {self.kind!r}; allowed: {', '.join(KINDS)}")
        widths = {n for one in self.translators.values() for n in one.weight.shape}
        if len(widths) > 1:
            raise UserError(f"the translators of a lens are square and of one width; got widths {sorted(widths)}")
        ordered = {site: self.translators[site] for site in sorted(self.translators)}
        object.__setattr__(self, "translators", MappingProxyType(ordered))

    def __repr__(self) -> str:
        of = f" of {self.base['name']}" if self.base.get("name") else ""
        return f"Lens({self.kind}{of}, {len(self.translators)} translators)"

    def __call__(self, site: Site, states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """States at `site` as they would be after the last block; a translator is applied in float32."""
        found = self.translators.get(site)
        if found is None:
            return states
        h = states.float()
        return h + found(h)

    def map(self, site: Site, width: int) -> LinearMap:
        """The whole map of a site, identity included: y = x @ (I + A) + b.

        width: of the states, for a site that is read as it stands.
        """
        found = self.translators.get(site)
        if found is None:
            return LinearMap.identity(width)
        return LinearMap(torch.eye(width).to(found.weight) + found.weight, found.bias, found.meta)

    def only(self, sites: Sequence[Site]) -> Lens:
        """The lens with the translators of these sites alone."""
        kept = {site: one for site, one in self.translators.items() if site in set(sites)}
        return Lens(self.kind, kept, self.base, self.meta)

    def to(self, *args: Any, **kwargs: Any) -> Lens:
        """As `Tensor.to`: another device or dtype."""
        return Lens(self.kind, {s: m.to(*args, **kwargs) for s, m in self.translators.items()}, self.base, self.meta)

    def check(self, model: Model, allow_mismatch: bool = False) -> None:
        """Raises UserError where it is of another model, naming both, of another width, or of layers that are not there."""
        if self.base and not allow_mismatch and (difference := difference_of(self.base, model.fingerprint)):
            raise UserError(
                f"this lens belongs to {self.base.get('name', 'another model')}, not to "
                f"{model.fingerprint.get('name', model.name)}: {difference}; fit one for this model, or pass "
                "allow_mismatch=True"
            )
        for site, one in self.translators.items():
            if one.d_in != model.width:
                raise UserError(f"this lens has width {one.d_in} at {site} and {model.name} has width {model.width}")
            Site.parse(site, model.n_layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Lens):
            return NotImplemented
        mine, theirs = (self.kind, dict(self.base)), (other.kind, dict(other.base))
        return mine == theirs and dict(self.translators) == dict(other.translators)

    def save(self, folder: str | Path, model: Model, *, overwrite: bool = False) -> None:
        """Writes config.json, as tuned-lens has it, and params.safetensors; see `lens_files.write_lens`."""
        from .lens_files import write_lens

        write_lens(self, Path(folder), model, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> Lens:
        """Reads what `save` wrote, or a folder of tuned-lens; see `lens_files.read_lens`."""
        from .lens_files import read_lens

        return read_lens(Path(folder))


def lens_sites(model: Model) -> list[Site]:
    """Where a lens looks: the embeddings (`resid_pre.0`) and the output of every block, in order."""
    return [Site(0, "resid_pre"), *(Site(layer) for layer in range(model.n_layers))]


def translated_sites(model: Model, asked: Sequence[Site | str | int] | None = None) -> list[Site]:
    """Those that have a translator: all but the output of the last block, which is the end itself.

    asked: of these alone. Raises UserError for others, and for none.
    """
    allowed = lens_sites(model)[:-1]
    found = allowed if asked is None else sorted({model.site(site) for site in asked})
    if not found or not set(found) <= set(allowed):
        raise UserError(f"a lens has translators at {', '.join(map(str, allowed))}; asked for "
                        f"{', '.join(map(str, found)) or 'none'}")  # fmt: skip
    return found


def site_word(site: Site) -> str:
    """The name of a lens's site in tables: `embeddings`, or its layer.

    >>> site_word(Site(0, "resid_pre")), site_word(Site(3))
    ('embeddings', '3')
    """
    return "embeddings" if site == Site(0, "resid_pre") else str(site.layer)
