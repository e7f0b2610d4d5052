"""What a store's tables say of some rows: a line for each, and its token where it stands in the prompt."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import index_of
from .checks import TABLES
from .sample import META, meta_of

if TYPE_CHECKING:
    import pandas as pd

    from .store import Rows, Store

MOST_KEYS = 20
"""keys of the prompts' meta that become columns, the commonest first"""
_ROWS = {"prompt": "prompt", "position": "position", "token_id": "token_id", "text": "token",
         "char_start": "char_start", "char_end": "char_end"}  # fmt: skip


def row_frame(store: Store, rows: Rows) -> pd.DataFrame:
    """One line per row asked for, in that order: row, prompt (index), position, token_id, token (its text), char_start,
    char_end, id and label of the prompt, and `meta.KEY` for the commonest keys of the prompts' meta.

    Only the row groups that hold them are read, and no activation. What a store does not say is empty. Raises UserError
    for rows that the store does not have.
    """
    import pandas as pd

    index = index_of(rows, store.n_rows, store.path).numpy()
    found = {"row": index} | {name: np.full(len(index), None, object) for name in _ROWS.values()}
    there = [column for column in _ROWS if column in store.tables.columns(TABLES[0])]
    table = store.tables.take(TABLES[0], index, there)
    for column in there:
        found[_ROWS[column]] = table[column].to_pandas().to_numpy()
    frame = pd.DataFrame(found)
    return frame.join(_prompt_frame(store, frame["prompt"]))


def _prompt_frame(store: Store, prompt: pd.Series) -> pd.DataFrame:
    """id, label and meta of the prompt of each row."""
    import pandas as pd

    numbers, which = np.unique(prompt.to_numpy().astype(np.int64), return_inverse=True)
    there = [c for c in ("id", "label", "meta") if c in store.tables.columns(TABLES[1])]
    table = store.tables.take(TABLES[1], numbers, there)
    columns: dict[str, Any] = {
        c: table[c].to_pylist() if c in there else [None] * len(numbers) for c in ("id", "label")
    }
    metas = [meta_of(text) for text in table["meta"].to_pylist()] if "meta" in there else []
    keys = Counter(key for meta in metas for key in meta)
    columns |= {f"{META}{key}": [meta.get(key) for meta in metas] for key, _ in keys.most_common(MOST_KEYS)}
    frame = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    return frame.iloc[which].set_axis(prompt.index)


def rows_in_context(store: Store, rows: Rows, width: int = 60, *, known: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows as one reads them: row, id, label, position, before, token, after; in the order asked for.

    before, after: at most `width` characters of the prompt on either side of the token, as it was rendered; empty where
    the store does not know them. known: what `row_frame` found of these very rows, which is then not read again. The
    texts are those of the prompts, not safe as HTML or Markdown.
    """
    frame = row_frame(store, rows) if known is None else known.reset_index(drop=True)
    numbers, which = np.unique(frame["prompt"].to_numpy().astype(np.int64), return_inverse=True)
    told = "text" in store.tables.columns(TABLES[1])
    texts = store.tables.take(TABLES[1], numbers, ["text"])["text"].to_pylist() if told else [None] * len(numbers)
    sides = [_sides(texts[i], start, end, width)
             for i, start, end in zip(which, frame["char_start"], frame["char_end"], strict=True)]  # fmt: skip
    return frame[["row", "id", "label", "position"]].assign(
        before=[before for before, _ in sides], token=frame["token"], after=[after for _, after in sides]
    )


def _sides(text: str | None, start: Any, end: Any, width: int) -> tuple[str, str]:
    if text is None or start is None or end is None or not 0 <= start <= end <= len(text):
        return "", ""
    first, last = int(start), int(end)
    return text[max(0, first - width) : first], text[last : last + width]
