"""Torch hooks that are always taken away again, and the hidden states in what modules are given and return."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("workbench")


class Hooks(ExitStack):
    """A context in which hooks live: `add` takes the handle of a registered hook and removes it at the end.

    Compiled code was traced without the hooks and would pass them by, so the compiled parts of `module`, if it has any,
    run eagerly meanwhile.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __enter__(self) -> Hooks:
        if is_compiled(self.module):
            log.info("%s is compiled: it runs eagerly while it is read or edited", type(self.module).__name__)
            self.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def add(self, handle: Any) -> None:
        self.callback(handle.remove)


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` was applied to any part of a module."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        hasattr(m, "_orig_mod")
        or getattr(m, "_compiled_call_impl", None) is not None
        or hasattr(m.forward, "_torchdynamo_orig_callable")
        for m in module.modules()
    )


def hidden_of(output: Any) -> Any:
    """The hidden states in a module's output: transformers 5 returns a tensor, older families a tuple."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with other hidden states."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _name_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The keyword that carries the hidden states; None where the first positional argument does."""
    if args:
        return None
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)


def state_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states among a module's arguments: the first one, `hidden_states`, or the first tensor by name."""
    name = _name_of(args, kwargs)
    return args[0] if args else kwargs.get(name) if name else None


def with_state(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other hidden states."""
    name = _name_of(args, kwargs)
    return ((hidden, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: hidden})
