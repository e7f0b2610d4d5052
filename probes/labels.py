"""Labels of a store's rows: a column of its prompts or rows, or values of one's own, with the prompt that each row is of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from jaxtyping import Int64

from workbench.errors import UserError
from workbench.store import Store
from workbench.store.checks import TABLES

MOST_CLASSES = 100
LEAST_GROUPS = 4
"""prompts that a class needs, so that some are on either side of the split"""
ROW_COLUMNS = ("position", "token_id", "text")
TOKENS = "text:"
"""`text:plus,minus` labels a row by whether its token, without spaces around it, is one of these"""
OTHER = "other"


@dataclass(frozen=True, eq=False)
class Labels:
    """The label of some rows of a store, and the group of each: rows of one group are never on both sides of a split."""

    name: str
    rows: Int64[np.ndarray, " n"]
    """rows of the store that have a label, ascending"""
    values: np.ndarray
    """[n]: the number of the class, int64; or where `classes` is empty a quantity, float64"""
    classes: tuple[str, ...]
    groups: Int64[np.ndarray, " n"]
    """a hash of the prompt's content: the same prompt has the same in every store, twice in one store too"""
    per_group: bool
    """whether every row of a group has the same label"""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        what = f"{len(self.classes)} classes" if self.classes else "a quantity"
        return f"Labels({self.name!r}, {what}, {len(self):,} rows of {len(np.unique(self.groups)):,} prompts)"

    def take(self, index: np.ndarray, note: str = "") -> Labels:
        """Those of some of the rows, by their place in `rows`."""
        notes = (*self.notes, note) if note else self.notes
        return replace(self, rows=self.rows[index], values=self.values[index], groups=self.groups[index], notes=notes)


def label_columns(store: Store) -> list[str]:
    """The names that `labels_of` takes: of the prompts `label` (where there is one) and the keys of their meta, then those
    of the rows. Only the first few thousand prompts are looked at."""
    table = next(iter(store.tables.batches(TABLES[1], ["label", "meta"], 4096)), None)
    found: list[str] = []
    if table is not None:
        if any(value for value in table["label"].to_pylist()):
            found.append("label")
        keys = Counter(
            key for text in table["meta"].to_pylist() for key, value in _meta(text).items() if _is_plain(value)
        )
        found += [key for key in sorted(keys) if key not in ("label", *ROW_COLUMNS)]
    present = store.tables.columns(TABLES[0])
    return found + [name for name in ROW_COLUMNS if name in present]


def class_counts(store: Store, label: Any) -> dict[str, int]:
    """How many rows each class of a label has, the commonest first; UserError as `labels_of` for a column that is not there."""
    values = _values(store, label, "label")
    return dict(Counter(map(_spelt, values[_present(values)].tolist())).most_common())


def labels_of(
    store: Store,
    label: Any,
    *,
    classes: Sequence[str] | None = None,
    quantity: bool | None = None,
    groups: Any = None,
    name: str = "",
) -> Labels:
    """The labels of a store's rows.

    Args:
        label: `label`, a key of the prompts' meta, a column of the rows (`position`, `token_id`, `text`), `text:plus,minus`
            (whether the token is one of these), or values: one for each row, or for each prompt. None, NaN and "" are none.
        classes: those that are kept, in this order; one alone stands against all others. All unless given, by name.
        quantity: whether the values are a quantity to be predicted, not classes; None: where they are not whole numbers.
        groups: what must not be on both sides of a split, as `label`; None: the content of the prompt.

    Raises:
        UserError: an unknown column; values that fit neither rows nor prompts; no label at all; a label that is constant,
            or has more than 100 classes; classes that are not there.

    >>> labels_of(store, "label", classes=["refusal"])                                     # doctest: +SKIP
    Labels('label', 2 classes, 1,400 rows of 1,400 prompts)
    """
    said = name or (label if isinstance(label, str) else "values")
    raw = _values(store, label, "label")
    present = _present(raw)
    if not present.any():
        raise UserError(f"label {said!r}: none of the {len(raw):,} rows of store {store.path} has one")
    rows = np.flatnonzero(present)
    grouping = _prompt_hashes(store) if groups is None else _hashes(_values(store, groups, "groups"))
    kept, mine = raw[rows], grouping[rows]
    notes = (
        [f"{len(raw) - len(rows):,} of {len(raw):,} rows have no {said} and were left out"]
        if len(rows) < len(raw)
        else []
    )
    numbers = _numbers(kept)
    if quantity is None:
        quantity = classes is None and numbers is not None and not np.array_equal(numbers, np.round(numbers))
    if quantity:
        if numbers is None:
            raise UserError(
                f"label {said!r} is no quantity: it holds {str(kept[0])[:40]!r}; leave quantity out for classes"
            )
        if np.ptp(numbers) == 0:
            raise UserError(f"label {said!r} is {numbers[0]:g} in every row; a probe needs values that differ")
        return Labels(said, rows, numbers, (), mine, _per_group(mine, numbers), tuple(notes))
    return _classed(said, rows, kept, mine, classes, notes)


def _classed(
    said: str, rows: np.ndarray, kept: np.ndarray, groups: np.ndarray, classes: Sequence[str] | None, notes: list[str]
) -> Labels:
    names = np.array([_spelt(value) for value in kept], dtype=object)
    known = Counter(names.tolist())
    if classes is not None:
        missing = [c for c in classes if c not in known and not (c == OTHER and len(classes) == 2)]
        if missing or len(set(classes)) < len(classes) or not classes:
            raise UserError(f"label {said!r} has no class {', '.join(map(repr, missing)) or 'given twice'}; it has "
                            f"{_some(known)}")  # fmt: skip
        if len(classes) == 1 or (OTHER in classes and OTHER not in known):
            wanted = next(c for c in classes if c in known)
            names = np.where(names == wanted, names, OTHER)
            classes = (OTHER, wanted) if len(classes) == 1 else classes
        inside = np.isin(names, np.array(list(classes), dtype=object))
        if not inside.all():
            notes.append(f"{int((~inside).sum()):,} rows of other classes were left out")
        names, rows, groups = names[inside], rows[inside], groups[inside]
        known = Counter(names.tolist())
    if len(known) > MOST_CLASSES:
        raise UserError(f"label {said!r} has {len(known):,} classes and a probe takes at most {MOST_CLASSES}; name those that "
                        "matter with classes=, or take it as a quantity")  # fmt: skip
    order = list(classes) if classes is not None else sorted(known, key=_natural)
    few = {c for c in order if len(np.unique(groups[names == c])) < LEAST_GROUPS}
    left = [c for c in order if c not in few]
    if len(order) < 2:
        raise UserError(f"label {said!r} is {order[0][:40]!r} in every row; a probe needs two classes")
    if len(left) < 2:
        raise UserError(f"label {said!r}: only {len(left)} of its {len(order)} classes is in {LEAST_GROUPS} prompts or more: "
                        "none could be both learned and tested; give more prompts, or other groups")  # fmt: skip
    if few:
        inside = ~np.isin(names, np.array(list(few), dtype=object))
        notes.append(f"{len(few)} of {len(order)} classes ({_some(Counter({c: known[c] for c in few}))}) are in fewer than "
                     f"{LEAST_GROUPS} prompts: their {int((~inside).sum()):,} rows were left out")  # fmt: skip
        names, rows, groups = names[inside], rows[inside], groups[inside]
    place = {c: i for i, c in enumerate(left)}
    values = np.array([place[n] for n in names.tolist()], dtype=np.int64)
    return Labels(said, rows, values, tuple(left), groups, _per_group(groups, values), tuple(notes))


def _values(store: Store, given: Any, what: str) -> np.ndarray:
    """One value for each row of the store."""
    if isinstance(given, str):
        return _column(store, given, what)
    values = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    if values.ndim == 1 and len(values) == store.n_rows:
        return values
    if values.ndim == 1 and len(values) == store.tables.n_prompts:
        return values[store.prompt_index.numpy()]
    raise UserError(f"{what} must have one value for each of the {store.n_rows:,} rows of store {store.path}, or for each of "
                    f"its {store.tables.n_prompts:,} prompts; got shape {list(values.shape)}")  # fmt: skip


def _column(store: Store, name: str, what: str) -> np.ndarray:
    if name.startswith(TOKENS):
        wanted = {token.strip() for token in name.removeprefix(TOKENS).split(",")} - {""}
        if not wanted:
            raise UserError(f"{what} {name!r} names no token; write such as {TOKENS}plus,minus")
        texts = store.rows(["text"])["text"].to_numpy()
        return np.array(
            [None if t is None or t != t else "yes" if t.strip() in wanted else "no" for t in texts], dtype=object
        )
    known = label_columns(store)
    if name in ROW_COLUMNS and name in known:
        return store.rows([name])[name].to_numpy()
    if name not in known:
        raise UserError(f"store {store.path} has no column {name!r} to take as {what}; it has {', '.join(known)}, and "
                        f"{TOKENS}WORD,WORD for its tokens")  # fmt: skip
    column = "label" if name == "label" else "meta"
    found: list[Any] = []
    for table in store.tables.batches(TABLES[1], [column], 4096):
        values = table[column].to_pylist()
        found += values if name == "label" else [_meta(text).get(name) for text in values]
    by_prompt = np.empty(len(found), dtype=object)
    by_prompt[:] = [value if _is_plain(value) else None for value in found]
    return by_prompt[store.prompt_index.numpy()]


def _prompt_hashes(store: Store) -> np.ndarray:
    """The group of each row: its prompt's content, its text where that is unknown, else its place in the store."""
    found: list[int] = []
    for table in store.tables.batches(TABLES[1], ["content", "text"], 4096):
        for content, text in zip(table["content"].to_pylist(), table["text"].to_pylist(), strict=True):
            known = content if content not in (None, "null") else text
            found.append(_hash(known if known is not None else f"{store.prompt_hash} {len(found)}"))
    return np.array(found, dtype=np.int64)[store.prompt_index.numpy()]


def _hashes(values: np.ndarray) -> np.ndarray:
    known: dict[str, int] = {}
    return np.array([known.setdefault(text, _hash(text)) for text in map(_spelt, values.tolist())], dtype=np.int64)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True)


def _present(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        return np.isfinite(values)
    if values.dtype.kind in "iub":
        return np.ones(len(values), dtype=bool)
    return np.array([v is not None and v == v and v != "" for v in values.tolist()], dtype=bool)


def _numbers(values: np.ndarray) -> np.ndarray | None:
    """As float64, where all are numbers."""
    if values.dtype.kind in "iuf":
        return values.astype(np.float64)
    plain = values.tolist()
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in plain):
        return np.array(plain, dtype=np.float64)
    return None


def _per_group(groups: np.ndarray, values: np.ndarray) -> bool:
    order = np.argsort(groups, kind="stable")
    same = groups[order][1:] == groups[order][:-1]
    return bool((values[order][1:] == values[order][:-1])[same].all())


def _spelt(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value == int(value) else str(value)


def _natural(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _some(known: Counter[str], most: int = 6) -> str:
    names = ", ".join(name[:40] for name, _ in known.most_common(most))
    return names + (f" and {len(known) - most:,} more" if len(known) > most else "")


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _meta(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
