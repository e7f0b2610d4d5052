"""Probe: a linear read-out of a label at a site, a value that scores rows, steers, moves through a map and is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import save as to_bytes
from torch import Tensor

from workbench.adapters import Adapter, vector
from workbench.atomic import staged_folder
from workbench.errors import UserError
from workbench.maps.headers import damaged, read_header
from workbench.maps.linear_map import LinearMap, read_safetensors
from workbench.sites import Site

FORMAT = "workbench.probe"
VERSION = 1
MARKER = "probe.json"


@dataclass(frozen=True, eq=False)
class Probe:
    """Scores of rows h [n, d] are h @ weight + bias.

    Args:
        weight: [d, c], float32: c = 1 for two classes (the log-odds of the second) and for a quantity; else one for each
            class, whose softmax are the probabilities.
        bias: [c].
        classes: their names; () for a quantity.
        site: where it reads.
        label, kind: what it was trained on, and how (see `probes.solvers.KINDS`).
        means: of the training rows of each class, [k, d] (of a quantity: of all, [1, d]); none after `through`.
        seen: hashes of the prompts (groups) that it was trained on: `probe_score` leaves their rows out.
        base: fingerprint of the model; {} where that is not known.
        meta: anything else about it, JSON values; takes no part in `==`.

    >>> probe = Probe(torch.tensor([[2.0], [0.0]]), torch.zeros(1), ("no", "yes"), Site(3))
    >>> probe.score(torch.tensor([[1.5, 7.0]])).tolist(), probe.direction().tolist()
    ([3.0], [1.0, 0.0])
    """

    weight: Float[Tensor, "d c"]
    bias: Float[Tensor, " c_b"]
    classes: tuple[str, ...]
    site: Site
    label: str = ""
    kind: str = "logistic"
    means: Float[Tensor, "k d_m"] | None = None
    seen: Int64[Tensor, " g"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)
    base: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k = len(self.classes)
        wanted = 1 if k in (0, 2) else k
        if k == 1 or self.weight.ndim != 2 or self.weight.shape[1] != wanted or self.bias.shape != (wanted,):
            raise UserError(f"a probe of {k} classes needs weight [d, {wanted}] and bias [{wanted}]; got "
                            f"{list(self.weight.shape)} and {list(self.bias.shape)}")  # fmt: skip

    def __repr__(self) -> str:
        what = f"{len(self.classes)} classes" if self.classes else "a quantity"
        return f"Probe({self.kind} of {self.label!r} ({what}) at {self.site}, width {self.width})"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<code>{escape(repr(self))}</code>"

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    def score(self, rows: Float[Tensor, "*batch d_in"]) -> Tensor:
        """Log-odds of the second of two classes, or the quantity, [...]; of more classes one score each, [..., k]."""
        if rows.shape[-1] != self.width:
            raise UserError(f"this probe reads rows of width {self.width} at {self.site}; got width {rows.shape[-1]}")
        scores = rows.float() @ self.weight.to(rows.device) + self.bias.to(rows.device)
        return scores[..., 0] if scores.shape[-1] == 1 else scores

    def log_odds(self, rows: Float[Tensor, "*batch d_in"], target: str | None = None) -> Float[Tensor, "*batch"]:
        """Log-odds of `target`, the last class unless given, against all others, in nats, [...]; or the quantity.

        Raises UserError for a class that is not there and rows of another width.

        >>> probe = Probe(torch.tensor([[2.0], [0.0]]), torch.zeros(1), ("no", "yes"), Site(3))
        >>> probe.log_odds(torch.tensor([[1.5, 7.0]]), "no").tolist()
        [-3.0]
        """
        number, scores = self.target_number(target), self.score(rows).float()
        if len(self.classes) > 2:
            others = [j for j in range(len(self.classes)) if j != number]
            return scores[..., number] - scores[..., others].logsumexp(-1)
        return -scores if self.classes and number == 0 else scores

    def probabilities(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch k"]:
        """The probability of each class, [..., k]; UserError for the probe of a quantity."""
        if not self.classes:
            raise UserError(f"a probe of a quantity ({self.label!r}) gives no probabilities; use score")
        scores = self.score(rows)
        return scores.softmax(-1) if len(self.classes) > 2 else torch.stack([(-scores).sigmoid(), scores.sigmoid()], -1)

    def predict(self, rows: Float[Tensor, "*batch d_in"]) -> Tensor:
        """The number of the likeliest class, [...]; of a quantity its value."""
        return self.probabilities(rows).argmax(-1) if self.classes else self.score(rows)

    def target_number(self, target: str | None = None) -> int:
        """The number of a class by its name; None: the last. Raises UserError for a class that is not there."""
        if not self.classes:
            return 0
        if target is not None and target not in self.classes:
            raise UserError(
                f"this probe of {self.label!r} has no class {target[:40]!r}; it has {', '.join(self.classes[:20])}"
            )
        return len(self.classes) - 1 if target is None else self.classes.index(target)

    def direction(self, target: str | None = None) -> Float[Tensor, " d"]:
        """The unit vector along which the score of `target` (a class; the last unless given) rises fastest against the mean
        of the others'; of a quantity, along which it rises."""
        number = self.target_number(target)
        w = self.weight.double()
        if w.shape[1] == 1:
            raw = w[:, 0] if number or not self.classes else -w[:, 0]
        else:
            others = [j for j in range(w.shape[1]) if j != number]
            raw = w[:, number] - w[:, others].mean(1)
        length = float(raw.norm())
        if not length > 0:
            raise UserError(f"this probe of {self.label!r} reads nothing (its weights are zero), so it has no direction; "
                            "train it with a smaller penalty")  # fmt: skip
        return (raw / length).float()

    def gap(self, target: str | None = None) -> float:
        """How far the training rows of `target` lie from those of the other classes along its direction."""
        if self.means is None or not self.classes:
            why = "it was moved by a map" if self.classes else "it reads a quantity"
            raise UserError(
                f"this probe of {self.label!r} has no means of classes ({why}); give the length of the vector"
            )
        number, means = self.target_number(target), self.means.double()
        others = [j for j in range(len(means)) if j != number]
        return float((means[number] - means[others].mean(0)) @ self.direction(target).double())

    def steering(self, target: str | None = None, *, length: float | None = None, positions: str = "all") -> Adapter:
        """Its direction as a steering vector: added at its site, towards `target`.

        length: of the vector; None: the gap between the means of the classes along it. Raises UserError where that is not
        known.
        """
        size = abs(self.gap(target)) if length is None else length
        name = f"{self.label}: {self.classes[self.target_number(target)]}" if self.classes else self.label
        meta = {"kind": "steering", "method": f"{self.kind} probe", "label": self.label, "length": size}
        return vector(
            self.site, self.direction(target) * size, positions=positions, name=name, base=self.base, meta=meta
        )

    def through(self, operator: LinearMap, site: Site | str | int, base: Mapping[str, str] | None = None) -> Probe:
        """The probe that reads at `site` what `operator` maps to where this one reads: weight' = W @ weight.

        base: fingerprint of the model of `site`, where it is another. Raises UserError for a map to another width.
        """
        if operator.d_out != self.width:
            raise UserError(f"the map gives width {operator.d_out} and the probe reads width {self.width}; give one that maps "
                            f"to {self.site}")  # fmt: skip
        w = operator.weight.double() @ self.weight.double()
        b = operator.bias.double() @ self.weight.double() + self.bias.double()
        meta = {**self.meta, "moved_from": str(self.site)}
        return replace(self, weight=w.float(), bias=b.float(), site=Site.parse(site), means=None,
                       base=self.base if base is None else base, meta=meta)  # fmt: skip

    def to(self, *args: Any, **kwargs: Any) -> Probe:
        """As `Tensor.to`: another device or dtype."""
        means = None if self.means is None else self.means.to(*args, **kwargs)
        return replace(self, weight=self.weight.to(*args, **kwargs), bias=self.bias.to(*args, **kwargs), means=means)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Probe):
            return NotImplemented
        mine, theirs = ((p.classes, p.site, p.label, p.kind, dict(p.base)) for p in (self, other))
        a, b = self._tensors(), other._tensors()
        return mine == theirs and a.keys() == b.keys() and all(
            a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
        )  # fmt: skip

    def _tensors(self) -> dict[str, Tensor]:
        found = {"weight": self.weight, "bias": self.bias, "seen": self.seen}
        return found if self.means is None else found | {"means": self.means}

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes probe.json and probe.safetensors. Raises UserError where `folder` exists, unless `overwrite`."""
        header = {"format": FORMAT, "version": VERSION, "classes": list(self.classes), "site": str(self.site),
                  "label": self.label, "kind": self.kind, "base": dict(self.base), "meta": dict(self.meta)}  # fmt: skip
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self._tensors().items()}
        with staged_folder(folder, marker=MARKER, overwrite=overwrite) as staged:
            (staged / MARKER).write_text(json.dumps(header, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
                                         encoding="utf-8")  # fmt: skip
            (staged / "probe.safetensors").write_bytes(to_bytes(tensors))

    @classmethod
    def load(cls, folder: str | Path) -> Probe:
        """Reads what `save` wrote; UserError, in one line, for anything that is not whole."""
        folder = Path(folder)
        file = folder / MARKER
        if not file.is_file():
            raise UserError(f"{folder} is not a saved probe: it has no {MARKER}")
        fields = {"classes": list, "site": str, "label": str, "kind": str, "base": dict, "meta": dict}
        header = read_header(file, file, "a saved probe", format=FORMAT, version=VERSION, fields=fields)
        tensors, _ = read_safetensors(folder / "probe.safetensors")
        if not {"weight", "bias", "seen"} <= set(tensors) <= {"weight", "bias", "seen", "means"}:
            raise damaged(folder / "probe.safetensors", f"it holds {sorted(tensors)}")
        for name, tensor in tensors.items():
            whole = tensor.dtype == torch.int64 and tensor.ndim == 1 if name == "seen" else bool(
                tensor.is_floating_point() and torch.isfinite(tensor).all()
            )  # fmt: skip
            if not whole:
                raise damaged(folder / "probe.safetensors", f"its {name} is not what it should be")
        if not all(isinstance(c, str) for c in header["classes"]):
            raise damaged(file, "its classes are not all names")
        if not all(isinstance(one, str) for one in header["base"].values()):
            raise damaged(file, "the fingerprint of its model is none")
        means = tensors.get("means")
        if means is not None and (
            means.ndim != 2
            or tensors["weight"].ndim != 2
            or list(means.shape) != [max(1, len(header["classes"])), len(tensors["weight"])]
        ):
            raise damaged(folder / "probe.safetensors", f"its means have shape {list(means.shape)}")
        try:
            return cls(tensors["weight"], tensors["bias"], tuple(header["classes"]), Site.parse(header["site"]),
                       header["label"], header["kind"], means, tensors["seen"], header["base"], header["meta"])  # fmt: skip
        except UserError as err:
            raise damaged(file, str(err)) from err
