"""The nnsight backend: one trace for each call of the model, whose body visits the sites in the order of the pass.

`read` and `edit` note what is wanted; a call of the model opens a trace, and the body of it (real source, as nnsight
needs) asks for each value as the pass reaches it. Under `generate` the body repeats for each step. nnsight's trace is
not safe for threads: calls of one model wait for one another.

Importing nnsight gives every Python object a `.save`, and patches `Tensor.backward`: it is imported when a model is
loaded with this backend, not before. It instruments the module that it is given; plain hooks go on working on it.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..errors import UserError
from . import Method, torch_hooks
from .hooks import HooksBackend, callee

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from nnsight.intervention.envoy import Envoy

    from ..models import Model


def adopted(module: Any, tokenizer: Any) -> TransformersModel:
    """An nnsight model around a Hugging Face model, which shares its weights."""
    from nnsight import TransformersModel
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.CRITICAL)  # a multimodal model is told off at length, and works
    try:
        return TransformersModel(module, task="text-generation", tokenizer=tokenizer)
    finally:
        hf_logging.set_verbosity(level)


def opened(source: Any) -> tuple[Any, Any]:
    """The Hugging Face model and the tokenizer in an nnsight model that a notebook has made.

    Raises UserError for one that is no causal language model or that carries edits of its own.
    """
    if not hasattr(source, "tokenizer") or not hasattr(source, "dispatch"):
        raise UserError(f"an nnsight {type(source).__name__} cannot be loaded here; give a TransformersModel")
    if source._edits:
        raise UserError("this nnsight model carries edits of its own (model.edit), and would not be the model that its "
                        "weights say; call clear_edits() on it first")  # fmt: skip
    source.dispatch()
    return source._module, source.tokenizer


@dataclass(eq=False)
class _Hook:
    """What the default backend would have registered on a module, and what it would have been called with."""

    module: nn.Module
    after: bool
    layer: int
    fn: Callable[..., Any]
    with_kwargs: bool
    all: list[_Hook]

    def remove(self) -> None:
        self.all.remove(self)


class _Recorder:
    """A module of a block on which hooks are noted in place of being registered."""

    def __init__(self, module: nn.Module, layer: int, hooks: list[_Hook]) -> None:
        self._module, self._layer, self._hooks = module, layer, hooks

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # it stands in for one, for isinstance as well
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def get_submodule(self, path: str) -> _Recorder:
        return _Recorder(self._module.get_submodule(path), self._layer, self._hooks)

    def register_forward_hook(self, fn: Callable[..., Any], *, with_kwargs: bool = False) -> _Hook:
        return self._note(True, fn, with_kwargs)

    def register_forward_pre_hook(self, fn: Callable[..., Any], *, with_kwargs: bool = False) -> _Hook:
        return self._note(False, fn, with_kwargs)

    def _note(self, after: bool, fn: Callable[..., Any], with_kwargs: bool) -> _Hook:
        hook = _Hook(self._module, after, self._layer, fn, with_kwargs, self._hooks)
        self._hooks.append(hook)
        return hook


class _View:
    """A model whose blocks note the hooks that are registered on them."""

    def __init__(self, model: Model, hooks: list[_Hook]) -> None:
        self._model, self._hooks = model, hooks

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # it stands in for one, for isinstance as well
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def block(self, layer: int) -> Any:
        return _Recorder(self._model.block(layer), layer, self._hooks)


@dataclass(eq=False)
class _Visit:
    """A place of the pass where the trace stops: the input or the output of a module, with the hooks there."""

    envoy: Envoy
    hooks: list[_Hook]
    made: int = 0

    @property
    def path(self) -> str:
        return f"the {'output' if self.hooks[0].after else 'input'} of {self.envoy.path}"

    def make(self) -> None:
        """Waits for the pass to come here, calls the hooks in their order, and hands back what they changed."""
        if self.hooks[0].after:
            given: Any = self.envoy.inputs if any(hook.with_kwargs for hook in self.hooks) else ((), {})
            value: Any = self.envoy.output
        else:
            given = value = self.envoy.inputs
        self.made += 1
        changed = False
        for hook in self.hooks:
            args, kwargs = given if hook.after else value
            new = hook.fn(hook.module, args, *([kwargs] if hook.with_kwargs else []), *([value] if hook.after else []))
            if new is not None:
                value, changed = new if hook.after or hook.with_kwargs else (new, kwargs), True
        if changed and self.hooks[0].after:
            self.envoy.output = value
        elif changed:
            self.envoy.inputs = value


def _trace(carrier: Envoy, run: Callable[[None], None], visits: list[_Visit], end: Envoy | None) -> None:
    """Calls `run` and makes the visits of each step that it takes; with `end`, stops it at the output of that block."""
    with carrier.trace(None, fn=run) as tracer:
        for _ in tracer.iter[:]:
            for visit in visits:
                visit.make()
            if end is not None:
                end.output  # noqa: B018 -- waits for it
                tracer.stop()


class NnsightBackend(HooksBackend):
    """See `backends.Backend`. `source` is the nnsight model, for whatever else it can do."""

    name = "nnsight"

    def __init__(self, source: TransformersModel) -> None:
        self.source = source
        self._lock, self._busy = threading.RLock(), False
        self._hooks: list[_Hook] = []
        self._envoys: dict[int, Envoy] = {}
        self._order: dict[tuple[int, bool], int] = {}

    def call(self, model: Model, method: Method, options: Mapping[str, Any], stop_after: int | None = None) -> Any:
        if not self._hooks:
            return super().call(model, method, options, stop_after)
        with self._lock:
            if self._busy:
                raise UserError("an edit or a take called the model whose pass it is part of; nnsight cannot run one pass "
                                "inside another")  # fmt: skip
            self._busy = True
            try:
                return self._traced(model, method, options, stop_after)
            finally:
                self._busy = False

    def _traced(self, model: Model, method: Method, options: Mapping[str, Any], stop_after: int | None) -> Any:
        last = model.n_layers - 1 if stop_after is None else stop_after
        visits = self._visits(model, last)
        end = None if stop_after is None else self._envoy(model.block(stop_after))
        made: list[Any] = []
        target = callee(model, method)

        def run(_: None) -> None:
            made.append(target(**options))

        with warnings.catch_warnings():
            # an open loop over the steps ends by asking for one that does not come
            warnings.filterwarnings("ignore", message="(?s).*was never reached")
            _trace(self._envoy(model.block(0)), run, visits, end)
        for visit in visits:
            if not visit.made:
                raise UserError(
                    f"nnsight never reached {visit.path}, which {model.name} was asked for; use backend='hooks'"
                )
        return made[0] if made else None

    @contextmanager
    def _attach(self, model: Model, taps: Sequence[torch_hooks.Tap]) -> Iterator[None]:
        # the hooks that the default backend would register are noted instead, and called from the trace
        with torch_hooks.attach(cast("Model", _View(model, self._hooks)), taps):
            yield

    def _visits(self, model: Model, last: int) -> list[_Visit]:
        """What the body of a trace asks for, in the order of the pass."""
        grouped: dict[tuple[int, bool], _Visit] = {}
        for hook in self._hooks:
            if hook.layer <= last:
                visit = grouped.setdefault((id(hook.module), hook.after), _Visit(self._envoy(hook.module), []))
                visit.hooks.append(hook)
        return sorted(grouped.values(), key=lambda visit: self._rank(model, visit.hooks[0]))

    def _rank(self, model: Model, hook: _Hook) -> tuple[int, float]:
        """Where in a pass a hook is called: the layer, and the place in its block."""
        if hook.module is model.block(hook.layer):
            return hook.layer, float("inf") if hook.after else -1.0
        key = (id(hook.module), hook.after)
        if key not in self._order:
            self._order = _order_of(model)
        return hook.layer, float(self._order.get(key, 0))

    def _envoy(self, module: nn.Module) -> Envoy:
        if id(module) not in self._envoys:
            self._envoys = {id(envoy._module): envoy for envoy in self.source.modules()}
        return self._envoys[id(module)]


def _order_of(model: Model) -> dict[tuple[int, bool], int]:
    """In which order the modules of the blocks are entered and left, from one pass of two tokens."""
    order: dict[tuple[int, bool], int] = {}
    handles = []

    def note(module: nn.Module, after: bool) -> None:
        order.setdefault((id(module), after), len(order))

    try:
        for layer in range(model.n_layers):
            for module in model.block(layer).modules():
                handles.append(module.register_forward_pre_hook(lambda m, _: note(m, False)))
                handles.append(module.register_forward_hook(lambda m, _, __: note(m, True)))
        ids = torch.ones((1, 2), dtype=torch.long, device=model.device)
        with torch.inference_mode():
            # not by a call: the hooks of an edit that is entered on the decoder would take it for a batch of prompts
            model.decoder.forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return order
