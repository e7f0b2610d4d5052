"""LEACE: the smallest affine change of a state after which no linear probe tells a label; in closed form from moments.

Source: arXiv:2306.03819, theorem 4.3; the formula for any norm there makes the mean squared change least in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors.torch import save as to_bytes
from torch import Tensor

from workbench.adapters import Adapter, LowRank
from workbench.atomic import staged_folder
from workbench.errors import UserError
from workbench.maps.headers import damaged, read_header
from workbench.maps.linear_map import read_safetensors
from workbench.maps.moments import Moments
from workbench.maps.whitening import CUT, Whitener
from workbench.models import Model
from workbench.sites import Site
from workbench.store import Store
from workbench.store.resident import ResidentRows

from .held_out_scores import HeldOut
from .labels import labels_of
from .linear import MOST_ROWS, _scores, _Task
from .solvers import PENALTY, Solver

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "workbench.eraser"
VERSION = 1
MARKER = "eraser.json"
EPS = 1e-9
"""singular values of the whitened cross-covariance below this share of the largest are none"""


@dataclass(frozen=True, eq=False)
class LeaceEraser:
    """x -> x - ((x - mean) @ right.T) @ left.T: what a linear probe could read of a label is taken out.

    With S = cov(x), Z = cov(x, z) and W = S^(-1/2): U the left singular vectors of W Z, left = S^(1/2) U [d, r] (what is
    taken away), right = U' W [r, d] (what it is read by). Among all affine maps after which x and z are uncorrelated, it
    changes x least.

    >>> x, z = torch.randn(200, 3, dtype=torch.float64), torch.randint(0, 2, (200,))
    >>> x[:, 0] += 3 * z
    >>> erased = LeaceEraser.fit(x, z)(x)
    >>> bool((erased[z == 1].mean(0) - erased[z == 0].mean(0)).abs().max() < 1e-9)
    True
    """

    mean: Float[Tensor, " d"]
    left: Float[Tensor, "d r"]
    right: Float[Tensor, "r d_r"]

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.shape != self.left.shape[::-1] or self.mean.shape != self.left.shape[:1]:
            raise UserError(f"an eraser needs mean [d], left [d, r] and right [r, d]; got {list(self.mean.shape)}, "
                            f"{list(self.left.shape)} and {list(self.right.shape)}")  # fmt: skip

    def __repr__(self) -> str:
        return f"LeaceEraser(width {self.width}, rank {self.rank})"

    @classmethod
    def of(cls, moments: Moments, x: str = "x", z: str = "z", *, cut: float = CUT) -> LeaceEraser:
        """From moments of rows x [n, d] and labels z [n, k] (one column for each class, or quantities).

        cut: directions of x with less than this share of the largest variance are left as they are. Raises UserError where
        x or z never varies.
        """
        if not bool((moments.squares(z) > 0).any()):
            raise UserError("the label never varies, so there is nothing to erase; give rows of two classes")
        white = Whitener.of(moments.cov(x, x) / moments.n, cut=max(cut, moments.noise))
        u, s, _ = torch.linalg.svd(white.inverse_root @ (moments.cov(x, z) / moments.n), full_matrices=False)
        kept = u[:, s > EPS * max(float(s[0]), 1e-300)]
        return cls(moments.mean(x), white.root @ kept, kept.T @ white.inverse_root)

    @classmethod
    def fit(cls, x: Float[Tensor, "n d"], z: Tensor) -> LeaceEraser:
        """Of rows x and their labels: classes [n], whole numbers from 0; or quantities, [n] or [n, k]."""
        if len(x) != len(z):
            raise UserError(f"every row needs a label; got {len(x)} rows and {len(z)} labels")
        columns = one_hot(z) if not z.is_floating_point() else z.reshape(len(z), -1).double()
        return cls.of(Moments().update({"x": x, "z": columns.to(x.device)}))

    @property
    def width(self) -> int:
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        """Directions that are taken out: of k classes k - 1."""
        return self.left.shape[1]

    def __call__(self, x: Float[Tensor, "*batch d_x"]) -> Float[Tensor, "*batch d_x"]:
        """The erased rows, in the dtype and on the device of x."""
        if x.shape[-1] != self.width:
            raise UserError(f"this eraser reads rows of width {self.width}; got width {x.shape[-1]}")
        return x - ((x - self.mean.to(x)) @ self.right.to(x).T) @ self.left.to(x).T

    def adapter(
        self, site: Site | str | int, *, positions: str = "all", base: Mapping[str, str] | None = None
    ) -> Adapter:
        """The same as an adapter at a site, delta(h) = eraser(h) - h, of rank r: it is saved, blended and measured as any."""
        part = LowRank(self.right.T.float(), -(self.right.double() @ self.mean.double()).float(), -self.left.T.float())
        return Adapter({Site.parse(site): part}, positions, name="eraser", base=base or {}, meta={"kind": "eraser"})

    def on(self, model: Model, site: Site | str | int, *, positions: str = "all") -> AbstractContextManager[None]:
        """The model with the label erased at a site, for every pass inside the block; no hook is left behind."""
        return self.adapter(model.site(site), positions=positions).on(model)

    def to(self, *args: Any, **kwargs: Any) -> LeaceEraser:
        """As `Tensor.to`: another device or dtype."""
        return LeaceEraser(*(t.to(*args, **kwargs) for t in (self.mean, self.left, self.right)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LeaceEraser):
            return NotImplemented
        pairs = ((self.mean, other.mean), (self.left, other.left), (self.right, other.right))
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes eraser.json and eraser.safetensors. Raises UserError where `folder` exists, unless `overwrite`."""
        tensors = {name: getattr(self, name).cpu().contiguous() for name in ("mean", "left", "right")}
        with staged_folder(folder, marker=MARKER, overwrite=overwrite) as staged:
            (staged / MARKER).write_text(json.dumps({"format": FORMAT, "version": VERSION}) + "\n")
            (staged / "eraser.safetensors").write_bytes(to_bytes(tensors))

    @classmethod
    def load(cls, folder: str | Path) -> LeaceEraser:
        """Reads what `save` wrote; UserError for anything that is not whole."""
        file = Path(folder) / MARKER
        if not file.is_file():
            raise UserError(f"{folder} is not a saved eraser: it has no {MARKER}")
        read_header(file, file, "a saved eraser", format=FORMAT, version=VERSION, fields={})
        tensors, _ = read_safetensors(Path(folder) / "eraser.safetensors")
        whole = set(tensors) == {"mean", "left", "right"} and all(
            t.is_floating_point() and bool(torch.isfinite(t).all()) for t in tensors.values()
        )
        if not whole:
            raise damaged(
                Path(folder) / "eraser.safetensors", f"it holds {sorted(tensors)}, or values that are not finite"
            )
        try:
            return cls(**tensors)
        except UserError as err:
            raise damaged(Path(folder) / "eraser.safetensors", str(err)) from err


@dataclass(frozen=True, eq=False)
class Erasure:
    """An eraser of a label at a site, and what a probe finds before and after on prompts that neither has seen."""

    eraser: LeaceEraser
    site: Site
    label: str
    classes: tuple[str, ...]
    before: HeldOut
    after: HeldOut
    """of a new probe, trained on erased rows"""
    covariance: float
    """the largest covariance of an erased column with the label over the training rows (see `remaining`): rounding alone"""
    changed: float
    """mean squared change of the held-out rows, as a share of their variance"""
    base: Mapping[str, str]

    def __repr__(self) -> str:
        return (f"Erasure({self.label!r} at {self.site}, rank {self.eraser.rank}: {self.before.headline} before, "
                f"{self.after.headline} after, chance {self.after.chance:.3f})")  # fmt: skip

    def adapter(self, *, positions: str = "all") -> Adapter:
        """The eraser as an adapter of the store's model: `kl_on_text` tells what it costs."""
        return self.eraser.adapter(self.site, positions=positions, base=self.base)

    def frame(self) -> pd.DataFrame:
        """Figures before and after."""
        import pandas as pd

        return pd.DataFrame([{"arm": "before", **self.before.line()}, {"arm": "after", **self.after.line()}]).set_index(
            "arm"
        )

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(repr(self))}</p>" + self.frame().to_html(float_format=lambda v: f"{v:.3f}")


def erase_label(
    store: Store | ResidentRows, label: Any, site: Site | str | int, *, positions: str = "all", classes: Any = None,
    groups: Any = None, kind: str = "logistic", holdout: float = 0.25, max_rows: int = MOST_ROWS, seed: int = 0,
) -> Erasure:  # fmt: skip
    """Fits an eraser of a label (classes) on a store's training prompts and checks it on the held-out ones.

    Arguments as of `linear.train_probes`. Raises UserError as that does, and for a quantity.
    """
    rows = store if isinstance(store, ResidentRows) else ResidentRows(store, keep=False)
    place = Site.parse(site, rows.store.manifest["model"]["n_layers"])
    known = labels_of(rows.store, label, classes=classes, quantity=False, groups=groups)
    task = _Task.of(rows, known, positions, holdout, max_rows, seed)
    x = rows.take(place, torch.from_numpy(task.labels.rows)).float()
    if not bool(torch.isfinite(x).all()):
        raise UserError(f"{place} holds rows that are not finite, which no eraser can be fitted to; profile again")
    train = torch.from_numpy(~task.test).to(x.device)
    y = torch.from_numpy(task.labels.values).to(x.device)
    eraser = LeaceEraser.fit(x[train], y[train])
    erased = eraser(x.double())
    scores = []
    for some in (x, erased.float()):
        made = Solver(kind, len(known.classes), PENALTY[kind], rows.device).fit(
            some[train], task.labels.values[~task.test]
        )
        found = some[~train].double().cpu().numpy() @ made.weight + made.bias
        scores.append(_scores(found, task, task.labels.values))
    held = x[~train].double()
    changed = float((erased[~train] - held).square().sum() / (held - held.mean(0)).square().sum())
    return Erasure(eraser, place, known.name, task.labels.classes, scores[0], scores[1],
                   remaining(erased[train], one_hot(y[train]), x[train]), changed, dict(rows.store.fingerprint))  # fmt: skip


def one_hot(z: Int64[Tensor, " n"]) -> Float[Tensor, "n k"]:
    """One column for each class, float64.

    >>> one_hot(torch.tensor([0, 1])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if not len(z) or int(z.min()) < 0:
        raise UserError("classes must be whole numbers from 0 on, one for each row")
    return torch.nn.functional.one_hot(z.long()).double()


def remaining(erased: Float[Tensor, "n d"], z: Float[Tensor, "n k"], x: Float[Tensor, "n d"]) -> float:
    """The largest covariance of a column of erased rows with one of z, in units of the spread of the column of x that it was
    and of z: what rounding leaves."""
    a, b, before = (t.double() - t.double().mean(0) for t in (erased, z, x))
    tiny = np.finfo(float).tiny ** 0.5
    scale = before.norm(dim=0).clamp(min=tiny)[:, None] * b.norm(dim=0).clamp(min=tiny)
    return float(((a.T @ b).abs() / scale).max())
