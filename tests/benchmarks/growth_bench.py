"""How profiling, moments, fits, folds and store reads grow with rows, width and layers: slopes, with what is expected.

`growth` of timing.py makes a line; what grows with workers is measured where there are some (the section `engines`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.conftest import word_tokenizer
from workbench.maps import Moments, counts, fit_ridge_targets
from workbench.models import Model, load
from workbench.paste import fold_gram
from workbench.profile import profile_model
from workbench.store import Store
from workbench.work import Lengths, ModelShape, forward

from .paste_bench import _part, _rows
from .profile_bench import random_prompts
from .store_bench import make_store
from .timing import growth

Made = tuple[Callable[[], Any], float]
ALPHAS = (0.01, 0.1, 1.0)
FOLDS = 5
SIZES: dict[str, tuple[int, ...]] = {
    "profile rows": (32, 64, 128, 256, 512), "profile width": (128, 192, 256, 384, 512), "profile layers": (2, 4, 6, 9, 12),
    "moments rows": (8192, 16384, 24576, 40960, 65536), "moments width": (128, 256, 384, 512, 768),
    "moments layers": (3, 5, 8, 11, 16), "fit rows": (2048, 4096, 8192, 16384, 32768), "fit width": (96, 160, 256, 384, 512),
    "fit layers": (1, 2, 4, 8, 16), "fold rows": (128, 256, 384, 512, 768), "fold width": (1024, 1536, 2048, 3072, 4096),
    "fold layers": (1, 2, 3, 5, 8), "read rows": (8192, 16384, 32768, 65536, 131072), "read width": (64, 128, 256, 512, 1024),
    "read layers": (1, 2, 3, 5, 8),
}  # fmt: skip
"""of each line: chosen so that all of them take less than five minutes on 2 cores"""
TINY: dict[str, tuple[int, ...]] = {
    "profile rows": (2, 4, 6), "profile width": (64, 128, 192), "profile layers": (1, 2, 3), "moments rows": (64, 128, 256),
    "moments width": (8, 16, 32), "moments layers": (2, 3, 4), "fit rows": (128, 256, 512), "fit width": (8, 16, 24),
    "fit layers": (1, 2, 3), "fold rows": (16, 24, 32), "fold width": (64, 96, 128), "fold layers": (1, 2, 3),
    "read rows": (64, 128, 256), "read width": (8, 16, 32), "read layers": (1, 2, 3),
}  # fmt: skip
"""of the smoke test"""


def run(folder: Path, sizes: dict[str, tuple[int, ...]] | None = None, repeats: int = 3) -> dict[str, Any]:
    """Every line of the table."""
    kept = sizes or SIZES
    fold_ = [
        (f"{way}", alpha, folds) for way, alpha, folds in (("fit, 5-fold CV", "cv", FOLDS), ("fit, GCV", "gcv", 0))
    ]
    lines: list[tuple[str, str, str, float, Callable[[int], Made]]] = [
        ("profile rows", "profile, stored", "rows", 1, lambda n: _profile(folder, n, 192, 4)),
        ("profile width", "profile, stored", "width", 2, lambda d: _profile(folder, 24, d, 3)),
        ("profile layers", "profile, stored", "layers", 1, lambda l: _profile(folder, 24, 192, l)),
        ("moments rows", "moments, all pairs", "rows", 1, lambda n: _moments(n, 256, 2)),
        ("moments width", "moments, all pairs", "width", 2, lambda d: _moments(8192, d, 2)),
        ("moments layers", "moments, all pairs", "layers", 2, lambda l: _moments(8192, 128, l)),
        *((f"fit {by}", way, label, expected, _fit(by, alpha, folds)) for way, alpha, folds in fold_
          for by, label, expected in (("rows", "rows", 0.0), ("width", "width", 3.0), ("layers", "targets", 1.0))),
        ("fold rows", "fold through the Gram", "rows", 2, lambda n: _fold(n, 2048, 1)),
        ("fold width", "fold through the Gram", "width", 1, lambda d: _fold(256, d, 1)),
        ("fold layers", "fold through the Gram", "layers", 1, lambda l: _fold(256, 1024, l)),
        ("read rows", "read a store", "rows", 1, lambda n: _read(folder, n, 256, 1)),
        ("read width", "read a store", "width", 1, lambda d: _read(folder, 16384, d, 1)),
        ("read layers", "read a store", "layers", 1, lambda l: _read(folder, 16384, 256, l)),
    ]  # fmt: skip
    made = [growth(what, by, expected, kept[key], make, repeats) for key, what, by, expected, make in lines]
    return {"lines": made, "repeats": repeats, "threads": torch.get_num_threads()}


def _model(width: int, layers: int) -> Model:
    torch.manual_seed(0)
    config = tf.LlamaConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                            num_attention_heads=width // 32, num_key_value_heads=width // 32, vocab_size=199, bos_token_id=1,
                            eos_token_id=2, pad_token_id=0)  # fmt: skip
    return load(tf.LlamaForCausalLM(config).eval(), tokenizer=word_tokenizer(), prove=False)


def _profile(folder: Path, prompts: int, width: int, layers: int) -> Made:
    model, texts = _model(width, layers), random_prompts(prompts, 64, 64)
    tokens = len(model.tokenizer(texts[0].text)["input_ids"])
    work = forward(ModelShape.of(model), Lengths.of([tokens] * prompts))
    path = folder / "profile"
    return lambda: profile_model(model, texts, path, tokens="all", overwrite=True).close(), work.flops


def _blocks(n: int, width: int, layers: int) -> dict[str, torch.Tensor]:
    return {f"l{i:02d}": _rows(n, width, i) for i in range(layers)}


def _moments(n: int, width: int, layers: int) -> Made:
    blocks = _blocks(n, width, layers)
    work = counts.moments_flops(n, [width] * layers)
    return lambda: Moments(products=torch.float32).update(blocks), work


def _fit(by: str, alpha: Any, folds: int) -> Callable[[int], Made]:
    def make(size: int) -> Made:
        n, width, targets = {"rows": (size, 192, 1), "width": (4096, size, 1), "layers": (4096, 128, size)}[by]
        blocks = _blocks(n, width, targets + 1)
        source, *names = blocks
        pairs = [(source, name) for name in names]
        parts = [Moments(pairs=pairs).update({k: x[i::FOLDS] for k, x in blocks.items()}) for i in range(FOLDS)]
        work = counts.ridge_flops(width, [width] * targets, alphas=len(ALPHAS), folds=folds)
        return lambda: fit_ridge_targets(parts, source, names, alpha=alpha, alphas=ALPHAS), work

    return make


def _fold(n: int, width: int, layers: int) -> Made:
    donor = 3 * width // 4
    made = [(_part(donor, i), _rows(n, width, i), _rows(n, donor, 50 + i)) for i in range(layers)]
    work = layers * counts.gram_fold_flops(n, width, donor, 8)
    return lambda: [fold_gram(part, x, y) for part, x, y in made], work


def _read(folder: Path, rows: int, width: int, layers: int) -> Made:
    path = folder / f"read-{rows}-{width}-{layers}"  # one size is on two lines
    store = Store.open(path) if path.exists() else make_store(path, rows, n_sites=layers, width=width)

    def read() -> None:
        for batch in store.iter_batches(list(store.sites), 4096):
            for x in batch.values():
                x.sum()

    return read, 4.0 * rows * width * layers


def tell(found: dict[str, Any]) -> str:
    """The section as markdown."""
    from .tables import table

    rows = [
        (x["what"], x["by"], f"{x['expected']:g}", "-" if x["counted"] is None else f"{x['counted']:.2f}",
         f"{x['slope']:.2f} ± {x['half']:.2f}", f"{x['sizes'][0]:,} to {x['sizes'][-1]:,}",
         f"{x['seconds'][0]:.3g} to {x['seconds'][-1]:.3g}") for x in found["lines"]
    ]  # fmt: skip
    return (
        "The slope of log time over log size, by least squares on medians "
        f"of {found['repeats']} at {len(found['lines'][0]['sizes'])} sizes, with its 95 % interval; beside it the exponent "
        "for large sizes, and the slope of the counted work (FLOPs; of reads bytes) at the very sizes that were run. What "
        "starting takes, and caches that are outgrown, move a slope away from it. Growth with workers is in the section on "
        "engines.\n\n"
        + table(["what", "grows with", "expected", "counted work", "measured slope", "sizes", "seconds"], rows)
    )  # fmt: skip
