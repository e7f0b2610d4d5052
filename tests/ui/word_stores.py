"""Small stores of labelled prompts whose tokens are words."""

from __future__ import annotations

from pathlib import Path

from workbench.sites import Site
from workbench.store import Store

from ..store.made import made_store, noise

TEXTS = [" ".join(["start", *(f"word{(7 * i + j) % 23}" for j in range(1, 12 + i % 4))]) for i in range(40)]
N = sum(len(one.split()) for one in TEXTS)


def word_store(path: Path, seed: int = 0, model: str = "first-model", tokenizer: str = "t") -> Store:
    """A row for each word, noise at two sites, a label and a topic for each prompt."""
    values = {Site(layer): noise(N, 12, 10 * seed + layer) * (1 + layer) for layer in range(2)}
    return made_store(path, values, TEXTS, labels=["even", "odd"] * 20, metas=[{"topic": i % 3} for i in range(40)],
                      model=model, tokenizer=tokenizer)  # fmt: skip
