"""The attention weights of a model: which module of each block hands them out, and a context that listens to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import UserError
from .anatomy import probe_ids
from .hooks import Hooks

if TYPE_CHECKING:
    from ..models import Model

EAGER = "eager"
SLACK = 2**-6  # what the rounding of half precision may add to a row that sums to 1
Take = Callable[[int, Float[Tensor, "b h t t"]], None]


@contextmanager
def eager_attention(model: Model) -> Iterator[None]:
    """Runs the attention of a model's decoder as plain matrix products, which alone have the weights at hand.

    The implementation that was there (sdpa, flash) is put back, an exception included. Families that chose theirs when
    they were made are left as they are.
    """
    decoder: Any = model.decoder
    before = getattr(getattr(decoder, "config", None), "_attn_implementation", None)
    settable = getattr(decoder, "_can_set_attn_implementation", lambda: False)
    if before in (None, EAGER) or not settable():
        yield
        return
    decoder.set_attn_implementation(EAGER)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def attention_modules(model: Model, layers: Sequence[int]) -> dict[int, str]:
    """The path, in its block, of the module that hands out the attention weights of each layer.

    Found by what they are, in one pass of 16 tokens: [b, heads, t, t], not negative, nothing above the diagonal, rows that
    sum to 1 at most (an attention sink of its own, as in gpt-oss, has the rest). Raises UserError naming the layers that
    have none: state space and linear attention, or a family that runs a fused kernel only.
    """
    if model.backend.name != "hooks":
        raise UserError(f"attention weights are read with plain hooks; this model was loaded with backend="
                        f"{model.backend.name!r}: load it with backend='hooks'")  # fmt: skip
    ids, found = probe_ids(model.module).to(model.device), dict[int, str]()

    def see(layer: int, path: str, output: Any) -> None:
        if layer not in found and _weights_in(output, tuple(ids.shape)) is not None:
            found[layer] = path  # the innermost: it returns before those around it

    with torch.inference_mode(), eager_attention(model), Hooks(model.module) as hooks:
        for layer in layers:
            for path, child in model.block(layer).named_modules():
                hooks.add(_listen(child, partial(see, layer, path)))
        model.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if missing := [layer for layer in layers if layer not in found]:
        raise UserError(
            f"{model.name} ({model.family}) gives no attention weights at layer {', '.join(map(str, missing))}: it has no "
            "softmax attention there, or runs it fused; give a model that was loaded with attn_implementation='eager', or "
            "other positions"
        )
    return found


@contextmanager
def attention_weights(model: Model, modules: Mapping[int, str], take: Take) -> Iterator[None]:
    """Calls `take(layer, weights)` with the softmax rows [b, heads, t, t] of each layer in every pass inside the block.

    modules: from `attention_modules`. They come as they are made, layer after layer, and nothing here holds them.

    >>> with attention_weights(model, attention_modules(model, [0]), take): model.run(ids, mask)   # doctest: +SKIP
    """

    def see(layer: int, output: Any) -> None:
        weights = _weights_in(output)
        assert weights is not None, "the attention of a layer no longer gives weights"
        take(layer, weights)

    with eager_attention(model), Hooks(model.module) as hooks:
        for layer, path in modules.items():
            hooks.add(_listen(model.block(layer).get_submodule(path), partial(see, layer)))
        yield


def _listen(module: nn.Module, see: Callable[[Any], None]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        see(output)

    return module.register_forward_hook(hook)


def _weights_in(output: Any, shape: tuple[int, ...] | None = None) -> Tensor | None:
    """The first square map [b, h, t, t] in what a module returns; given the shape [b, t], one that is an attention's."""
    for value in output if isinstance(output, tuple | list) else (output,):
        if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[-1] != value.shape[-2]:
            continue
        if shape is None or ((len(value), value.shape[-1]) == shape and _is_attention(value.float())):
            return value
    return None


def _is_attention(weights: Float[Tensor, "b h t t"]) -> bool:
    rows = weights.sum(-1)
    return bool((weights >= 0).all() and (rows > 0).all() and (rows <= 1 + SLACK).all() and not weights.triu(1).any())
