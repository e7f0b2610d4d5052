"""The TransformerLens backend: reads and edits at the hook points of a `TransformerBridge`, in the raw basis.

The bridge's own names are used (`blocks.5.hook_attn_out`, `blocks.5.mlp.hook_post`, ...), beside whatever hooks a
notebook has set on it. Forward passes and `generate` are those of the Hugging Face model inside the bridge, whose blocks
are the bridge's, so tokens, positions, caches and beams are as on the other backends.

What TransformerLens does to a model, and is so here: attention runs in the `eager` implementation, since its attention
hooks need that; and wrapping changes the module tree for good, after which `save_pretrained` of that module fails.
Compatibility mode (weights folded, the stream centred) is another basis, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..anatomy import Anatomy, check, resolve
from ..errors import UserError
from ..sites import POINTS, Site
from . import torch_hooks
from .hooks import HooksBackend

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

    from ..models import Model

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_act": "mlp.hook_post",
}


def bridge_of(module: Any, name: str = "") -> TransformerBridge:
    """A bridge around a Hugging Face model, which it changes for good (see above).

    Raises UserError where TransformerLens has no adapter for the family, or cannot wrap this model.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.utilities.attn_implementation import force_eager_attention

    family = type(module).__name__
    try:
        force_eager_attention(module)
        return build_bridge_from_module(module, family, hf_config=module.config, model_name=name or family)
    except Exception as err:  # adapters fail in their own ways on a module tree that is not what they expect
        reason = " ".join(str(err).split())[:200]
        raise UserError(f"TransformerLens cannot wrap {family} ({type(err).__name__}: {reason}); use "
                        "backend='hooks' or backend='nnsight'") from err  # fmt: skip


def opened(bridge: TransformerBridge) -> tuple[Any, Any]:
    """The Hugging Face model and the tokenizer in a bridge that a notebook has made.

    Raises UserError for compatibility mode and for a bridge that holds no local model.
    """
    if bridge.compatibility_mode or getattr(bridge, "_weights_processed", False):
        raise UserError("this TransformerBridge is in compatibility mode or has processed weights: its activations are in "
                        "another basis than the model's own; boot it anew and leave enable_compatibility_mode out")  # fmt: skip
    module = getattr(bridge, "original_model", None)
    if module is None or not hasattr(module, "config"):
        raise UserError(f"this {type(bridge).__name__} holds no Hugging Face model on this machine; boot it with "
                        "TransformerBridge.boot_transformers")  # fmt: skip
    return module, bridge.tokenizer


class TransformerLensBackend(HooksBackend):
    """See `backends.Backend`. `bridge` is the `TransformerBridge` of the model, for whatever else it can do."""

    name = "transformer-lens"

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge

    def anatomy(self, model: Model) -> list[Anatomy]:
        found = []
        try:
            resolved = resolve(_PlainModel(model))  # type: ignore[arg-type]
        except RuntimeError as err:  # its parts say so only when they run
            raise UserError(f"TransformerLens wraps {model.name} ({model.family}) and cannot run it ({err}); use "
                            "backend='hooks' or backend='nnsight'") from err  # fmt: skip
        for layer, anatomy in enumerate(resolved):
            lacking = [point for point in POINTS if not self._has(_name(Site(layer, point)))]
            if self._entry(layer) is None:
                lacking.append("resid_mid")
            found.append(anatomy.without(lacking, "TransformerLens has no hook there in this family"))
        return found

    @contextmanager
    def _attach(self, model: Model, taps: Sequence[torch_hooks.Tap]) -> Iterator[None]:
        if self.bridge.compatibility_mode:
            raise UserError("compatibility mode was enabled on this model's bridge after it was loaded: its activations are "
                            "in another basis now; load the model anew")  # fmt: skip
        check(model, [site for site, _ in taps])
        hooks: list[tuple[str, Callable[..., Any]]] = []
        for site, fn in sorted(taps, key=lambda tap: torch_hooks.FLOW.index(tap[0].point)):
            hooks += self._between(site, fn) if site.point == "resid_mid" else [(_name(site), partial(_call, fn))]
        with self.bridge.hooks(fwd_hooks=hooks):
            yield

    def _entry(self, layer: int) -> str | None:
        """The hook of the first part of a block that is given the block's own input."""
        names = (f"blocks.{layer}.{part}.hook_in" for part in ("ln1", "attn"))
        return next((name for name in names if self._has(name)), None)

    def _between(self, site: Site, fn: Callable[[Tensor], Tensor | None]) -> list[tuple[str, Callable[..., Any]]]:
        """The hooks for resid_mid, which is written through attn_out.

        What is returned from TransformerLens' own hook_resid_mid reaches the MLP and not the residual stream.
        """
        entry, entered = self._entry(site.layer), list[Tensor]()
        assert entry is not None, "resid_mid is missing and was not refused"

        def enter(states: Tensor, hook: Any) -> None:
            entered[:] = [states]

        def leave(states: Tensor, hook: Any) -> Tensor | None:
            mid = entered.pop().to(states.device) + states
            new = fn(mid)
            return None if new is None or new is mid else states + (new - mid)

        return [(entry, enter), (_name(Site(site.layer, "attn_out")), leave)]

    def _has(self, name: str) -> bool:
        return self.bridge.get_hook_point(name) is not None


class _PlainModel:
    """A model whose blocks are seen as they were before they were wrapped."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # it stands in for one, for isinstance as well
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def block(self, layer: int) -> Any:
        return _PlainModule(self._model.block(layer))


class _PlainModule:
    """A wrapped module with the children of the one inside: no hook points, none twice, under their own names."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # it stands in for one, for isinstance as well
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def named_children(self) -> Iterator[tuple[str, _PlainModule]]:
        inside = self._module
        while isinstance(wrapped := inside._modules.get("_original_component"), nn.Module):
            inside = wrapped
        for name, child in inside._modules.items():
            if child is not None:
                yield name, _PlainModule(child)

    def children(self) -> Iterator[_PlainModule]:
        return (child for _, child in self.named_children())

    def named_modules(self) -> Iterator[tuple[str, _PlainModule]]:
        yield "", self
        for name, child in self.named_children():
            for path, module in child.named_modules():
                yield f"{name}.{path}".rstrip("."), module


def _name(site: Site) -> str:
    return f"blocks.{site.layer}.{HOOKS[site.point]}"


def _call(fn: Callable[[Tensor], Tensor | None], states: Tensor, hook: Any) -> Tensor | None:
    return fn(states)
