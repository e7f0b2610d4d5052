"""The feed-forward networks of a model's blocks, found by watching one short pass, and their weights as row-vector maps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..anatomy.hooks import Hooks, hidden_of, state_in
from ..errors import UserError

_EXPERTS = re.compile(r"expert|router")
FOLDED = "FoldedFFN"


@dataclass(frozen=True)
class FFN:
    """One feed-forward network: down(act(up(x))), or down(act(gate(x)) * up(x)) where it is gated.

    path: of its module, from the model; inputs: its projections from width d to the hidden width; output: the one back;
    act: the activation; all three from `path`. parts: how many hidden widths each of `inputs` makes (2 where gate and up
    are one projection).
    """

    path: str
    inputs: tuple[str, ...]
    output: str
    act: str
    width: int
    hidden: int
    gated: bool
    parts: int = 1

    def as_dict(self) -> dict[str, Any]:
        """The form in which a config keeps it."""
        return {**asdict(self), "inputs": list(self.inputs)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> FFN:
        return cls(**{**value, "inputs": tuple(value["inputs"])})

    def module(self, model: nn.Module) -> Any:
        return model.get_submodule(self.path)


@dataclass(eq=False)
class _Seen:
    given: Tensor
    made: Tensor
    others: list[Tensor]
    """further states among the arguments: a residual that the module adds itself"""


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a plain Linear (Falcon's is one too), or GPT-2's Conv1D (a Linear with its weight transposed).

    Others, quantised ones and those with an adapter, hold their weights in another way.
    """
    return type(module) is nn.Linear or type(module).__name__ in ("Conv1D", "FalconLinear")


def weight_of(module: Any) -> Float[Tensor, "d_in d_out"]:
    """The weight of a projection for row vectors, y = x @ W + b; a view."""
    return module.weight if type(module).__name__ == "Conv1D" else module.weight.T


def find_ffns(model: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], Any], name: str = "") -> list[FFN]:
    """The feed-forward network of every block.

    What is found is proved in the pass: the activation was given the projection's output, the output projection was given
    the activation's (times the other projection's, where gated), and what the network returns is that projection's
    output, plus a residual where it was given one.

    Args:
        blocks: of the model, in their order; run: starts a short forward pass of the model.
        name: of the model, for messages.

    Raises:
        UserError: a mixture of experts, networks that were folded already, or blocks without a network of this form.
    """
    name = name or type(model).__name__
    paths = {id(module): path for path, module in model.named_modules()}
    seen: dict[str, _Seen] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, made = state_in(args, kwargs), hidden_of(output)
            if isinstance(given, Tensor) and isinstance(made, Tensor):
                others = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not given]
                seen[path] = _Seen(given.detach().clone(), made.detach().clone(), others)

        return hook

    for layer, block in enumerate(blocks):
        names = [path for path, _ in block.named_modules()]
        if any(_EXPERTS.search(path) for path in names):
            raise UserError(f"{name}: the feed-forward network of block {layer} is a mixture of experts, each of which sees "
                            "tokens of its own; only dense networks can be folded")  # fmt: skip
        if any(type(module).__name__ == FOLDED for module in block.modules()):
            raise UserError(f"{name} is folded already (block {layer}); fold the model that it was made of")
    with torch.inference_mode(), Hooks(model) as hooks:
        for block in blocks:
            for module in block.modules():
                path = paths[id(module)]
                hooks.add(module.register_forward_hook(record(path), with_kwargs=True))
        run()
    return [_find(model, paths[id(block)], block, seen, f"{name}, block {layer}") for layer, block in enumerate(blocks)]


def _find(model: nn.Module, root: str, block: nn.Module, seen: dict[str, _Seen], where: str) -> FFN:
    projections = [
        f"{root}.{path}" for path, m in block.named_modules() if is_projection(m) and f"{root}.{path}" in seen
    ]
    for output in reversed(projections):
        path = output.rpartition(".")[0]
        if path == root or path not in seen:
            continue
        inside = [p for p in projections if p.startswith(path + ".") and p != output]
        inputs = [p for p in inside if _same(seen[p].given, seen[path].given)]
        if found := _form(model, path, inputs, output, seen):
            return found
    raise UserError(f"{where}: no module of it is a feed-forward network of plain Linear layers, down(act(up(x))) or "
                    "down(act(gate(x)) * up(x)), that is given x and returns what it adds; it cannot be folded")  # fmt: skip


def _form(model: nn.Module, path: str, inputs: Sequence[str], output: str, seen: dict[str, _Seen]) -> FFN | None:
    """What a module is, if projections at `inputs` and `output` make it a feed-forward network."""
    z, made = seen[output].given, seen[path].made
    hidden, width = z.shape[-1], seen[path].given.shape[-1]
    down = seen[output].made
    if down.shape != made.shape or not any(
        torch.allclose(made, down + rest, atol=1e-5 * float(made.abs().max())) if isinstance(rest, Tensor)
        else _same(made, down) for rest in (None, *(t for t in seen[path].others if t.shape == made.shape))
    ):  # fmt: skip
        return None
    acts = [p for p in seen if p.startswith(path + ".") and p not in (*inputs, output)]
    states: dict[str, list[Tensor]] = {p: list(seen[p].made.split(hidden, -1)) for p in inputs}
    every = [part for split in states.values() for part in split]
    if len(every) not in (1, 2) or any(part.shape != z.shape for part in every):
        return None
    for act in acts:
        if not any(_same(seen[act].given, u) for u in every):
            continue
        inside = len(path) + 1
        names, parts = tuple(p[inside:] for p in inputs), len(every) // len(inputs)
        gated = len(every) == 2
        if not gated and not _same(seen[act].made, z):
            continue
        if gated and not any(_near(seen[act].made * u, z) for u in every):
            continue
        return FFN(path, names, output[inside:], act[inside:], width, hidden, gated, parts)
    return None


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x, y)


def _near(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=4 * torch.finfo(x.dtype).eps)
