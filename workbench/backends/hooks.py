"""The default backend: plain torch hooks, see `torch_hooks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..anatomy import Anatomy, resolve
from ..sites import Site
from . import Method, torch_hooks

if TYPE_CHECKING:
    from ..models import Model


def callee(model: Model, method: Method) -> Callable[..., Any]:
    """What `Backend.call` calls of a model."""
    if method == "generate":
        return model.module.generate
    return model.decoder if method == "decoder" else model.module


class HooksBackend:
    """See `backends.Backend`. The others differ from it in how they attach a function to a site, and in what they call."""

    name = "hooks"

    def anatomy(self, model: Model) -> list[Anatomy]:
        return resolve(model)

    def read(
        self, model: Model, sites: Sequence[Site], take: torch_hooks.Take | None = None
    ) -> AbstractContextManager[dict[Site, Tensor]]:
        return torch_hooks.read(model, sites, take, attach=self._attach)

    def edit(
        self, model: Model, edits: Mapping[Site, torch_hooks.Edit], prompt_lengths: Any = None
    ) -> AbstractContextManager[None]:
        return torch_hooks.edit(model, edits, prompt_lengths, attach=self._attach)

    def call(self, model: Model, method: Method, options: Mapping[str, Any], stop_after: int | None = None) -> Any:
        run = callee(model, method)
        if stop_after is None:
            return run(**options)
        with torch_hooks.stop_after(model, stop_after), suppress(torch_hooks.Stop):
            run(**options)
        return None

    def _attach(self, model: Model, taps: Sequence[torch_hooks.Tap]) -> AbstractContextManager[None]:
        return torch_hooks.attach(model, taps)
