"""GroupedMoments: moments kept apart by fold, shard, token class, and added up again as asked."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..atomic import staged_folder
from ..errors import UserError
from .headers import damaged, read_header
from .moment_files import load_moments
from .moments import Moments, Pair, lower, total

FORMAT = "workbench.grouped_moments"
VERSION = 1
SAMPLE = 256
"""rows of the first batch whose median all groups have as their shift"""
Label = str | int


class GroupedMoments:
    """Moments of named blocks, one for every combination of labels that occurs, all about one shift.

    Args:
        axes: what rows are told apart by, for instance ("fold", "kind").
        pairs, products: as `Moments`.
        waiting: rows that may wait in all until their group has many: a product is as dear to add for 10 rows as for
            1,000. What is asked for is always complete.

    >>> x = torch.arange(6.0)[:, None]
    >>> grouped = GroupedMoments("fold", "kind")
    >>> labels = {"fold": [0, 0, 0, 1, 1, 1], "kind": ["bos", "word", "word", "bos", "word", "word"]}
    >>> _ = grouped.update({"x": x}, **labels)
    >>> grouped.total(kind="word").mean("x").item(), [part.n for part in grouped.parts("fold", kind="word").values()]
    (3.0, [2, 2])
    """

    def __init__(
        self,
        *axes: str,
        pairs: Iterable[Pair] | None = None,
        products: torch.dtype = torch.float64,
        waiting: int = 4096,
    ) -> None:
        if not axes or len(set(axes)) != len(axes):
            raise UserError(f"grouped moments need axes with names of their own; got {list(axes)}")
        self.axes = axes
        self.meta: dict[str, Any] = {}
        self._groups: dict[tuple[Label, ...], Moments] = {}
        self._waiting: dict[tuple[Label, ...], list[dict[str, Tensor]]] = {}
        self._most = waiting
        self._shift: dict[str, Tensor] = {}
        self._pairs = None if pairs is None else list(pairs)
        self._products = products

    @property
    def groups(self) -> dict[tuple[Label, ...], Moments]:
        """The moments of every combination of labels, one label per axis: these themselves, which further rows change."""
        for key in list(self._waiting):
            self._add(key)
        return self._groups

    @property
    def n(self) -> int:
        """Rows in all."""
        return sum(group.n for group in self.groups.values())

    def labels(self, axis: str) -> list[Label]:
        """The labels that occur on an axis, in the order in which they came."""
        at = self._axis(axis)
        return list(dict.fromkeys(key[at] for key in self.groups))

    def update(
        self, blocks: Mapping[str, Float[Tensor, "_n _d"]], **labels: Sequence[Label] | Tensor | Label
    ) -> GroupedMoments:
        """Adds a batch of rows. Returns self.

        Args:
            blocks: as `Moments.update`.
            labels: for every axis one label per row, or one for the whole batch.

        Raises:
            UserError: an axis without labels, or with another number of labels than rows; other blocks than before.
        """
        if set(labels) != set(self.axes):
            raise UserError(f"every batch needs labels for {', '.join(self.axes)}; got {', '.join(labels) or 'none'}")
        n = len(next(iter(blocks.values()))) if blocks else 0
        if not n:
            return self
        if not self._shift:
            # no mean: what few rows of one group have (the massive activations of BOS) would take it far from all others,
            # and float32 products lose what they are far from the shift
            self._shift = {name: block[:SAMPLE].double().median(0).values for name, block in blocks.items()}
        widths, shapes = ({k: len(v) for k, v in self._shift.items()}, {k: list(v.shape) for k, v in blocks.items()})
        if shapes != {name: [n, width] for name, width in widths.items()}:
            raise UserError(f"every batch needs the blocks {widths} (name: width) with equal rows; got shapes {shapes}")
        columns = [_column(axis, labels[axis], n) for axis in self.axes]
        rows: dict[tuple[Label, ...], list[int]] = {}
        for i, key in enumerate(zip(*columns, strict=True)):
            rows.setdefault(key, []).append(i)
        for key, index in rows.items():
            if key not in self._groups:
                self._groups[key] = Moments(pairs=self._pairs, products=self._products, shift=self._shift)
            if len(index) == n:
                self._groups[key].update(blocks)
            else:
                self._waiting.setdefault(key, []).append({name: _rows(block, index) for name, block in blocks.items()})
        self._settle()
        return self

    def _settle(self) -> None:
        """Adds the rows of the fullest groups until few enough wait."""
        counts = {key: sum(len(next(iter(b.values()))) for b in batches) for key, batches in self._waiting.items()}
        while counts and sum(counts.values()) > self._most:
            fullest = max(counts, key=counts.__getitem__)
            self._add(fullest)
            del counts[fullest]

    def _add(self, key: tuple[Label, ...]) -> None:
        batches = self._waiting[key]
        self._groups[key].update({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
        del self._waiting[key]

    def total(self, **where: Label | Sequence[Label]) -> Moments:
        """The moments of all rows, or of those with the given labels: `total(kind="word")`, `total(fold=[0, 1])`.

        What is handed out is the reader's own, here and below: no later row changes it.
        """
        return _summed([self.groups[key] for key in self._keys(where)])

    def without(self, **where: Label | Sequence[Label]) -> Moments:
        """The moments of all other rows: total - group."""
        left_out = set(self._keys(where))
        return _summed([group for key, group in self.groups.items() if key not in left_out])

    def parts(self, axis: str, **where: Label | Sequence[Label]) -> dict[Label, Moments]:
        """The moments of every label on an axis, over the rows with the given labels on the others."""
        at, keys = self._axis(axis), self._keys(where)
        return {
            label: _summed([self.groups[key] for key in keys if key[at] == label])
            for label in self.labels(axis) if any(key[at] == label for key in keys)
        }  # fmt: skip

    def __add__(self, other: GroupedMoments) -> GroupedMoments:
        """Both sets of rows together, group by group."""
        if not isinstance(other, GroupedMoments):
            return NotImplemented
        if self.axes != other.axes:
            raise UserError(f"grouped moments of axes {list(self.axes)} and {list(other.axes)} do not add")
        result = GroupedMoments(*self.axes, pairs=self._pairs, products=lower(self._products, other._products))
        result._shift = self._shift or other._shift
        mine, theirs = self.groups, other.groups
        for key in dict.fromkeys((*mine, *theirs)):
            result._groups[key] = _summed([groups[key] for groups in (mine, theirs) if key in groups])
        return result

    def save(self, path: str | Path, *, overwrite: bool = False, meta: Mapping[str, Any] | None = None) -> None:
        """Writes a folder: groups.json and one .safetensors file per group; `meta` (JSON values) as in `Moments`."""
        with staged_folder(path, marker="groups.json", overwrite=overwrite) as folder:
            keys = list(self.groups)
            for i, key in enumerate(keys):
                self.groups[key].save(folder / f"{i:04d}.safetensors")
            header = {"format": FORMAT, "version": VERSION, "axes": self.axes, "keys": keys}
            header["meta"] = dict(self.meta if meta is None else meta)
            (folder / "groups.json").write_text(json.dumps(header, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> GroupedMoments:
        """Reads what `save` wrote."""
        file = Path(path) / "groups.json"
        if not file.is_file():
            raise UserError(f"{path} does not hold grouped moments: it has no groups.json")
        fields = {"axes": list, "keys": list, "meta": dict}
        header = read_header(file, file, "a folder of grouped moments", format=FORMAT, version=VERSION, fields=fields)
        axes, keys = header["axes"], header["keys"]
        if not axes or not all(isinstance(axis, str) for axis in axes) or len(set(axes)) != len(axes):
            raise damaged(file, f"its axes are {axes}")
        for key in keys:
            if (
                not isinstance(key, list)
                or len(key) != len(axes)
                or not all(isinstance(label, str | int) for label in key)
            ):
                raise damaged(file, f"the labels {key} are not one for each of its axes {axes}")
        grouped = cls(*axes)
        grouped.meta = header["meta"]
        for i, key in enumerate(keys):
            grouped._groups[tuple(key)] = load_moments(Path(path) / f"{i:04d}.safetensors", named=False)
        found = len(list(Path(path).glob("*.safetensors")))
        if len(grouped._groups) != found:
            raise damaged(file, f"it names {len(grouped._groups)} groups, and its folder holds {found}")
        first = next(iter(grouped._groups.values()), None)
        if first is not None:
            grouped._shift, grouped._pairs = first.shift, list(first.product)
            grouped._products = functools.reduce(lower, (group.products for group in grouped._groups.values()))
        return grouped

    def _axis(self, axis: str) -> int:
        if axis not in self.axes:
            raise UserError(f"no axis {axis!r}; these moments are grouped by {', '.join(self.axes)}")
        return self.axes.index(axis)

    def _keys(self, where: Mapping[str, Label | Sequence[Label]]) -> list[tuple[Label, ...]]:
        keys = list(self.groups)
        for axis, wanted in where.items():
            at = self._axis(axis)
            allowed = {wanted} if isinstance(wanted, str | int) else set(wanted)
            unknown = [label for label in allowed if label not in self.labels(axis)]
            if unknown:
                raise UserError(f"no rows have {axis} {unknown[0]!r}; there are {self.labels(axis)}")
            keys = [key for key in keys if key[at] in allowed]
        return keys


def _summed(parts: Sequence[Moments]) -> Moments:
    return parts[0].copy() if len(parts) == 1 else total(parts)


def _column(axis: str, labels: Sequence[Label] | Tensor | Label, n: int) -> list[Label]:
    if isinstance(labels, str | int):
        return [labels] * n
    column: list[Label] = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(column) != n:
        raise UserError(f"labels of {axis} must name one label per row; got {len(column)} for {n} rows")
    return column


def _rows(block: Tensor, index: list[int]) -> Tensor:
    return block.index_select(0, torch.tensor(index, device=block.device))


def plan_passes(widths: Mapping[str, int], pairs: Sequence[Pair], memory: int, *, copies: int = 7) -> list[list[Pair]]:
    """Divides the pairs into passes over the rows, so that what each accumulates fits into `memory`.

    Pairs of one source stay together: their spectrum is shared. A pass holds, per copy, the products of its pairs and
    of every block in them with itself, in float64.

    Args:
        widths: columns of every block; pairs: (source, target) to accumulate.
        memory: bytes, of the device that accumulates.
        copies: sets of moments held at once: 5 folds, their sum and one difference are 7.

    Raises:
        UserError: the pairs of one source alone do not fit.

    >>> [len(some) for some in plan_passes({"a": 10, "b": 10, "c": 10}, [("a", "b"), ("a", "c"), ("b", "c")], 30_000)]
    [2, 1]
    """
    sources: dict[str, list[Pair]] = {}
    for pair in pairs:
        sources.setdefault(pair[0], []).append(pair)

    def size(some: Sequence[Pair]) -> int:
        blocks = {tuple(sorted(pair)) for pair in some} | {(name, name) for pair in some for name in pair}
        return 8 * copies * sum(widths[a] * widths[b] for a, b in blocks)

    passes: list[list[Pair]] = []
    for source, some in sources.items():
        if size(some) > memory:
            raise UserError(
                f"the moments of {source} with {len(some)} targets need {size(some) / 2**30:.2f} GiB and "
                f"{memory / 2**30:.2f} GiB are free: ask for fewer targets or folds"
            )
        if passes and size([*passes[-1], *some]) <= memory:
            passes[-1].extend(some)
        else:
            passes.append(list(some))
    return passes
