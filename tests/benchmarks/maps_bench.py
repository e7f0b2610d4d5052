"""What fitting maps costs: one pair beside scikit-learn's grid search, all pairs of a model, and the memory of both.

Functions return dicts of numbers (seconds, bytes, ratios) and print nothing. The claims are of d = 2304, n = 30,000 for
one pair and of 26 layers, d = 512, n = 50,000 for all; every size is an argument.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold

from workbench.maps import REFERENCE_ALPHAS, GroupedMoments, Moments, fit_ridge_targets
from workbench.maps.moments import total

from .timing import spread

ROOT = Path(__file__).resolve().parents[2]
FOLDS = 5
CHUNK = 4096


def stream(n: int, d: int, layers: int, *, chunk: int = CHUNK, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of a made-up residual stream in batches, float32: an uneven spectrum, an offset, a small step per layer."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, d)
    steps = [torch.randn(d, d, generator=g) / d**0.5 for _ in range(layers - 1)]
    for start in range(0, n, chunk):
        x = torch.randn(min(chunk, n - start), d, generator=g) * spread + 0.5
        rows = {"l00": x}
        for i, step in enumerate(steps):
            x = x + 0.3 * torch.tanh(x @ step) + 0.1 * spread * torch.randn(x.shape, generator=g)
            rows[f"l{i + 1:02d}"] = x
        yield rows


def fold_of(start: int, stop: int, n: int) -> torch.Tensor:
    """The fold of rows start..stop, as KFold(shuffle=False) cuts n rows."""
    sizes = torch.tensor([n // FOLDS + (i < n % FOLDS) for i in range(FOLDS)])
    return torch.searchsorted(sizes.cumsum(0), torch.arange(start, stop), right=True)


def accumulate(
    batches: Iterator[dict[str, torch.Tensor]], n: int, pairs: Sequence[tuple[str, str]], products: torch.dtype
) -> list[Moments]:
    """Moments of the folds, batch by batch."""
    grouped, start = GroupedMoments("fold", pairs=pairs, products=products), 0
    for rows in batches:
        stop = start + len(next(iter(rows.values())))
        grouped.update(rows, fold=fold_of(start, stop, n))
        start = stop
    return list(grouped.parts("fold").values())


def grid_search(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """One pair as the released code fits it: 8 penalties x 5 contiguous folds, and the refit."""
    start = time.perf_counter()
    options = {"scoring": "r2", "cv": KFold(FOLDS), "refit": True}
    search = GridSearchCV(Ridge(fit_intercept=True), {"alpha": list(REFERENCE_ALPHAS)}, **options).fit(x, y)
    seconds = time.perf_counter() - start
    scores = np.stack([search.cv_results_[f"split{i}_test_score"] for i in range(FOLDS)])
    return {"seconds": seconds, "alpha": float(search.best_params_["alpha"]), "scores": scores.tolist()}


def engine(rows: list[dict[str, torch.Tensor]], n: int, products: torch.dtype) -> tuple[dict[str, float], Any, Any]:
    """Seconds (moments; moments and choice by folds; moments and choice by GCV), and the two fits."""
    start = time.perf_counter()
    parts = accumulate(iter(rows), n, [("l00", "l01")], products)
    accumulated = time.perf_counter()
    options: dict[str, Any] = {"alphas": REFERENCE_ALPHAS, "absolute": True}
    by_folds = fit_ridge_targets(parts, "l00", ["l01"], **options)["l01"]
    chosen = time.perf_counter()
    by_gcv = fit_ridge_targets([total(parts)], "l00", ["l01"], alpha="gcv", **options)["l01"]
    gcv_s = accumulated - start + time.perf_counter() - chosen
    return {"moments_s": accumulated - start, "cv_s": chosen - start, "gcv_s": gcv_s}, by_folds, by_gcv


def one_pair(
    d: int = 2304, n: int = 30_000, *, products: torch.dtype = torch.float32, reference: bool = True, repeats: int = 1
) -> dict[str, Any]:
    """The engine and scikit-learn (float64) on the same arrays: seconds, ratios, the same choice, the same scores."""
    rows = list(stream(n, d, 2))
    turns = [engine(rows, n, products) for _ in range(repeats)]
    by_folds, by_gcv = turns[0][1:]
    spent = {key: statistics.median(turn[0][key] for turn in turns) for key in turns[0][0]}
    result: dict[str, Any] = {
        "d": d, "n": n, "threads": torch.get_num_threads(), "products": str(products),
        "repeats": repeats, **spent, "spread": {key: spread([turn[0][key] for turn in turns]) for key in spent},
        "alpha": by_folds.alpha_absolute, "alpha_gcv": by_gcv.alpha_absolute,
    }  # fmt: skip
    if reference:
        x, y = (torch.cat([batch[name] for batch in rows]).double().numpy() for name in ("l00", "l01"))
        known = grid_search(x, y)
        difference = np.abs(np.array(by_folds.folds) - np.array(known["scores"])).max()
        result |= {
            "sklearn_s": known["seconds"], "cv_ratio": known["seconds"] / result["cv_s"],
            "gcv_ratio": known["seconds"] / result["gcv_s"], "same_alpha": known["alpha"] == by_folds.alpha_absolute,
            "largest_score_difference": float(difference),
        }  # fmt: skip
    return result


def all_pairs(
    layers: int = 26, d: int = 512, n: int = 50_000, *, alpha: str = "cv", sklearn_s: float | None = None
) -> dict[str, Any]:
    """All layer pairs of one model, rows made on the way (not counted), beside as many grid searches of one pair.

    sklearn_s: seconds of one pair, where they were measured before.
    """
    names = [f"l{i:02d}" for i in range(layers)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    spent, grouped, start = 0.0, GroupedMoments("fold", pairs=pairs, products=torch.float32), 0
    for rows in stream(n, d, layers):
        stop = start + len(rows["l00"])
        begun = time.perf_counter()
        grouped.update(rows, fold=fold_of(start, stop, n))
        spent += time.perf_counter() - begun
        start = stop
    begun = time.perf_counter()
    parts = list(grouped.parts("fold").values())
    options: dict[str, Any] = {"alpha": alpha, "alphas": REFERENCE_ALPHAS, "absolute": True}
    fitted = sum(
        len(fit_ridge_targets(parts, source, names[i + 1 :], **options)) for i, source in enumerate(names[:-1])
    )
    fit_s = time.perf_counter() - begun
    if sklearn_s is None:
        two = [rows for rows in stream(n, d, 2)]
        sklearn_s = grid_search(*(torch.cat([b[name] for b in two]).double().numpy() for name in ("l00", "l01")))[
            "seconds"
        ]
    return {
        "layers": layers, "d": d, "n": n, "alpha": alpha, "pairs": fitted, "moments_s": spent, "fit_s": fit_s,
        "sklearn_one_pair_s": sklearn_s, "ratio": fitted * sklearn_s / (spent + fit_s),
    }  # fmt: skip


def targets_of_one_source(targets: Sequence[int] = (13, 25), d: int = 512, n: int = 10_000) -> dict[str, Any]:
    """Seconds of fitting many targets of one source, moments given: the decompositions are shared."""
    names = [f"l{i + 1:02d}" for i in range(max(targets))]
    parts = accumulate(stream(n, d, max(targets) + 1), n, [("l00", name) for name in names], torch.float32)
    seconds = {}
    for count in targets:
        start = time.perf_counter()
        fit_ridge_targets(parts, "l00", names[:count], alphas=REFERENCE_ALPHAS, absolute=True)
        seconds[str(count)] = time.perf_counter() - start
    return {"d": d, "n": n, "seconds": seconds}


def features(count: int = 819, n: int = 50_000, d: int = 2304, *, size: int = 8192) -> dict[str, Any]:
    """Seconds of measuring features of one map on made-up rows: all figures of `feature_metrics`, in one pass."""
    from probes.dictionaries import Dictionary
    from probes.features import feature_metrics
    from workbench.maps import LinearMap

    g = torch.Generator().manual_seed(0)
    draw = torch.randn(d, count, generator=g) / d**0.5
    dictionary = Dictionary(
        draw,
        torch.full((count,), -1.0),
        draw.T.contiguous(),
        torch.zeros(d),
        "jumprelu",
        threshold=torch.full((count,), 0.1),
    )
    operator = LinearMap(torch.eye(d) * 0.9, torch.zeros(d))
    spent, start = 0.0, time.perf_counter()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        nonlocal spent
        for first in range(0, n, size):
            begun = time.perf_counter()
            x = torch.randn(min(size, n - first), d, generator=g)
            y = x + 0.3 * torch.randn(x.shape, generator=g)
            group = torch.arange(first, first + len(x)) // 50
            spent += time.perf_counter() - begun  # of making the rows, which is not counted
            yield x, y, group

    found = feature_metrics(operator, dictionary, batches())
    return {"features": count, "n": n, "d": d, "seconds": time.perf_counter() - start - spent,
            "measured": int(found.r2.isfinite().sum())}  # fmt: skip


def device_rate(device: str = "cuda", d: int = 2304, n: int = 1 << 16, *, repeats: int = 20) -> dict[str, Any]:
    """The moment pass of two blocks on a device beside plain float32 products there of the same rows and as many FLOPs.

    `fraction` is the time of the three plain products x'x, x'y, y'y over that of `Moments.update`, which makes half of
    two of them, and the sums.
    """
    g = torch.Generator(device=device).manual_seed(0)
    x, y = (torch.randn(n, d, generator=g, device=device) for _ in range(2))
    torch.set_float32_matmul_precision("highest")
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)

    def timed(work: Callable[[], Any]) -> float:
        work()
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        return (time.perf_counter() - start) / repeats

    moments = Moments(pairs=[("x", "y")], products=torch.float32)
    ours = timed(lambda: moments.update({"x": x, "y": y}))
    plain = timed(lambda: (x.T @ x, x.T @ y, y.T @ y))
    return {"d": d, "n": n, "device": device, "plain_s": plain, "moments_s": ours, "fraction": plain / ours,
            "tflops": 6 * n * d * d / ours / 1e12}  # fmt: skip


def peak_memory(sizes: Sequence[int] = (10_000, 40_000), d: int = 512, layers: int = 4) -> dict[str, Any]:
    """Peak resident bytes of a process that streams n rows into moments and fits all pairs, for every n."""
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from tests.benchmarks.maps_bench import all_pairs\n"
        f"all_pairs({layers}, {d}, int(sys.argv[1]), sklearn_s=0.0)\n"
        # not ru_maxrss, which a child inherits from the process that started it
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    peaks = {}
    for n in sizes:
        done = subprocess.run(
            [sys.executable, "-c", code, str(n)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks[str(n)] = 1024 * int(done.stdout.splitlines()[-1])
    return {"d": d, "layers": layers, "bytes": peaks}
