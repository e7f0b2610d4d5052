"""What the tokens alone say of a label: the features of the baseline that every probe stands beside."""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.store import Store
from workbench.store.checks import TABLES

from .labels import Labels

WORDS = r"\w+|[^\w\s]"
MOST_WORDS = 20_000


def word_features(store: Store, labels: Labels) -> Any:
    """A sparse matrix [n, features] of the rows of `labels`: of a prompt's label the words of the prompt, counted; else which
    token the row is. None where the store does not know them."""
    from scipy.sparse import csr_matrix

    if not labels.per_group:
        tokens = store.rows(["token_id"])["token_id"].to_numpy()[labels.rows]
        if (tokens != tokens).any():
            return None
        known, which = np.unique(tokens, return_inverse=True)
        n = len(which)
        return csr_matrix((np.ones(n), (np.arange(n), which)), shape=(n, len(known)))
    texts = [t for table in store.tables.batches(TABLES[1], ["text"], 4096) for t in table["text"].to_pylist()]
    prompts, which = np.unique(store.prompt_index.numpy()[labels.rows], return_inverse=True)
    mine = [texts[p] for p in prompts]
    if any(text is None for text in mine):
        return None
    from sklearn.feature_extraction.text import CountVectorizer

    try:
        counts = CountVectorizer(token_pattern=WORDS, max_features=MOST_WORDS, lowercase=False).fit_transform(mine)
    except ValueError:  # no text has a word
        return None
    return counts[which].astype(np.float64)
