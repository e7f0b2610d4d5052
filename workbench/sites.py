"""Places on the residual stream, and how to find a model's blocks."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("workbench")
POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act")

_DEPTHS = {"resid_pre": 0.0, "attn_out": 0.25, "resid_mid": 0.5, "mlp_act": 0.6, "mlp_out": 0.75, "resid_post": 1.0}
_TRANSFORMER_LENS = re.compile(r"blocks\.(-?\d+)\.(?:hook_(\w+)|mlp\.hook_post)")
_PLAIN = re.compile(r"(\w+)\.(-?\d+)")


@dataclass(frozen=True, order=True)
class Site:
    """A layer (0-based) and a point of its block; `resid_post.l` is the output of block l, before any final norm.

    resid_mid is between attention and MLP, attn_out and mlp_out are what these add to the residual stream, and mlp_act is
    what the MLP's down projection is given.

    >>> str(Site(5)), Site(5).transformer_lens, Site(5, "mlp_act").transformer_lens
    ('resid_post.5', 'blocks.5.hook_resid_post', 'blocks.5.mlp.hook_post')
    """

    layer: int
    point: str = "resid_post"

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise UserError(f"unknown point {self.point!r} of a site; allowed: {', '.join(POINTS)}")

    def __str__(self) -> str:
        return f"{self.point}.{self.layer}"

    @property
    def transformer_lens(self) -> str:
        """The name that TransformerLens gives this site."""
        return f"blocks.{self.layer}." + ("mlp.hook_post" if self.point == "mlp_act" else f"hook_{self.point}")

    @classmethod
    def parse(cls, text: str | int | Site, n_layers: int | None = None) -> Site:
        """Reads `resid_post.5`, `blocks.5.hook_resid_post`, `5`, or a negative layer where `n_layers` is known.

        TransformerLens calls mlp_act `blocks.5.mlp.hook_post`.

        Raises UserError for anything else, and for a layer that the model does not have.

        >>> Site.parse("blocks.3.hook_resid_pre"), Site.parse(-1, n_layers=12)
        (Site(layer=3, point='resid_pre'), Site(layer=11, point='resid_post'))
        """
        if isinstance(text, Site):
            site = text
        elif isinstance(text, int) or re.fullmatch(r"-?\d+", str(text).strip()):
            site = cls(int(text))
        elif match := _TRANSFORMER_LENS.fullmatch(str(text).strip()):
            site = cls(int(match[1]), match[2] or "mlp_act")
        elif match := _PLAIN.fullmatch(str(text).strip()):
            site = cls(int(match[2]), match[1])
        else:
            raise UserError(f"cannot read {text!r} as a site; write resid_post.5, blocks.5.hook_resid_post or 5")
        if n_layers is None:
            return site
        if not -n_layers <= site.layer < n_layers:
            raise UserError(f"layer {site.layer} is out of range: the model has layers 0 to {n_layers - 1}")
        return cls(site.layer % n_layers, site.point)


def depth(site: Site) -> float:
    """Where a site lies in the order of computation; resid_pre.l and resid_post.(l-1), one place, have one depth.

    >>> depth(Site(1, "attn_out")) < depth(Site(1, "mlp_out")), depth(Site(2, "resid_pre")) == depth(Site(1))
    (True, True)
    """
    return site.layer + _DEPTHS[site.point]


def text_config(module: Any) -> Any:
    """The configuration of the language part, also of a multimodal wrapper."""
    return module.config.get_text_config(decoder=True)


def plain_module(module: Any) -> Any:
    """The module that runs, of what a user may hold: what `torch.compile(model)` wraps is unwrapped.

    Raises UserError for a PEFT model that adds virtual tokens: they stand in no prompt, so positions would be others'.
    """
    if hasattr(module, "_orig_mod"):
        log.info("%s was compiled: the model inside is used, which runs eagerly", type(module._orig_mod).__name__)
        module = module._orig_mod
    tuned = getattr(module, "active_peft_config", None)
    if tuned is not None and getattr(tuned, "is_prompt_learning", False):
        raise UserError(f"a {type(module).__name__} with {tuned.peft_type.value} adds virtual tokens, whose states belong "
                        "to no token of a prompt; load the model that it wraps")  # fmt: skip
    return module


def find_blocks(module: nn.Module, override: str | None = None) -> tuple[str, nn.ModuleList]:
    """The ModuleList that holds a decoder's blocks, with its path in `module`.

    `override` is that path, for a family that is not recognised. Raises UserError when no ModuleList, or more than one,
    has as many entries as the configuration has layers.
    """
    from torch import nn

    if override is not None:
        try:
            found = module.get_submodule(override)
        except AttributeError:
            found = None
        if not isinstance(found, nn.ModuleList):
            raise UserError(f"blocks={override!r} is not a ModuleList of {type(module).__name__}; give its path, as in "
                            "blocks='model.layers'")  # fmt: skip
        return override, found
    n_layers = text_config(module).num_hidden_layers
    decoder = getattr(module, "get_decoder", lambda: None)() or module
    lists = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == n_layers and any(child is m for m in decoder.modules())
    ]
    outer = [(name, child) for name, child in lists if not any(name.startswith(other + ".") for other, _ in lists)]
    if len(outer) != 1:
        names = ", ".join(name for name, _ in outer) or "none"
        raise UserError(f"cannot tell the blocks of {type(module).__name__} (lists of {n_layers} modules: {names}); "
                        "pass blocks='path.to.the.ModuleList'")  # fmt: skip
    return outer[0]
