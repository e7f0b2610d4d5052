"""Where a training stands: its parameters, its optimiser and its curves, and the checkpoint that it goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..atomic import write_bytes
from ..errors import UserError
from ..hashes import tensor_bytes
from ..maps.linear_map import read_safetensors

log = logging.getLogger("workbench")
FORMAT = "workbench.training"


@dataclass
class TrainingState:
    """What the rest of a training depends on, beside its arguments.

    The order of the data is not kept: it is drawn with the seed, and drawn again up to `step`. Nothing else is random
    once the parameters have their first values.
    """

    parts: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    step: int = 0
    """optimiser steps that are done"""
    tokens: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, loss, size of the delta in spreads)"""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, loss on the demonstrations that are held out)"""
    best: dict[str, Tensor] = field(default_factory=dict)
    """the parameters where the validation loss was least"""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{key}": p for name, part in self.parts.items() for key, p in part.named_parameters()}

    @property
    def best_step(self) -> int | None:
        """Steps done where the validation loss was least, the first such; None without validation."""
        return min(self.validation, key=lambda found: found[1])[0] if self.validation else None

    def validated(self, loss: float) -> None:
        """Notes a validation loss, and the parameters where it is the least so far."""
        self.validation.append((self.step, loss))
        if self.best_step == self.step:
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}

    def since_best(self) -> int:
        """Validations since the best one."""
        return sum(step > self.best_step for step, _ in self.validation) if self.best_step is not None else 0

    def restore_best(self) -> None:
        """Puts the parameters of the least validation loss in place, where there are any."""
        with torch.no_grad():
            for name, value in self.best.items():
                self.parameters[name].copy_(value)

    def save(self, path: Path, key: str) -> None:
        """Writes the checkpoint; `key` says which training it is of."""
        tensors = {f"parameter/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for i, kept in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": value for name, value in kept.items()}
        said = {name: getattr(self, name) for name in ("step", "tokens", "seconds", "curve", "validation")}
        tensors = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
        text = json.dumps(said)
        header = {"format": FORMAT, "key": key, "state": text, "sha256": _seal(tensors, text)}
        write_bytes(path, to_bytes(tensors, header))

    def resume(self, path: Path, key: str) -> bool:
        """Takes up the checkpoint at `path`; False, with a line in the log, where it is damaged or of another training."""
        try:
            tensors, header = read_safetensors(path)
            if header.get("format") != FORMAT or header.get("key") != key:
                log.info("%s is of another training; this one begins anew", path)
                return False
            if header["sha256"] != _seal(tensors, header["state"]):
                raise UserError("it is not what was written")
            self._take(tensors, json.loads(header["state"]))
        except (UserError, ValueError, KeyError, TypeError, RuntimeError, ArithmeticError) as err:
            log.warning("%s cannot be taken up (%s); the training begins anew", path, " ".join(str(err).split())[:200])
            return False
        return True

    def _take(self, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
        groups: dict[str, dict[str, Tensor]] = {"parameter": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            groups[kind][rest] = tensor
        shapes = {name: p.shape for name, p in self.parameters.items()}
        for kind in ("parameter", "best"):
            found = {name: tensor.shape for name, tensor in groups[kind].items()}
            if found != shapes and (found or kind == "parameter"):
                raise UserError("its parameters are not those of this adapter")
        moved: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            number, _, what = name.partition("/")
            moved.setdefault(int(number), {})[what] = tensor
        curve = [(int(i), float(loss), float(size)) for i, loss, size in said["curve"]]
        validation = [(int(i), float(loss)) for i, loss in said["validation"]]
        step, tokens, seconds = int(said["step"]), int(said["tokens"]), float(said["seconds"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moved})
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(groups["parameter"][name])
        self.best = {name: t.to(self.parameters[name].device) for name, t in groups["best"].items()}
        self.step, self.tokens, self.seconds, self.curve, self.validation = step, tokens, seconds, curve, validation


def _seal(tensors: Mapping[str, Tensor], text: str) -> str:
    """The hash of all that a checkpoint holds."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        for part in tensor_bytes(tensors[name]):
            digest.update(part)
    return digest.hexdigest()
