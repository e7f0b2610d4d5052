"""What folding gains: a folded feed-forward network against the dense one, and whole models beside, in turns, as medians.

Functions return dicts of numbers (seconds, ratios) and print nothing. The claim is of d = 1024, rho = 4, theta = 0.75.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers as tf
from torch import nn

from workbench.folding.batch_norm import ChannelIdleFFN, reparameterise
from workbench.folding.ffn import find_ffns
from workbench.folding.plan import FoldPlan, swapped
from workbench.maps.linear_map import LinearMap

from .timing import in_turns, ratios, spread

WIDTH, RHO, THETA = 1024, 4, 0.75


def gpt2(layers: int, device: str, dtype: torch.dtype, width: int = WIDTH) -> Any:
    """A random GPT-2 of `width` (16 heads of 64 at 1024) without a download."""
    torch.manual_seed(0)
    config = tf.GPT2Config(n_embd=width, n_layer=layers, n_head=max(1, width // 64), n_inner=RHO * width)
    return tf.GPT2LMHeadModel(config).eval().to(device=device, dtype=dtype)


def plan_of(model: Any, theta: float = THETA) -> FoldPlan:
    """A fold of as many channels as theta says; which, and by what map, is the same to a clock."""
    ids = torch.arange(16, device=model.device).view(2, 8)
    ffns = tuple(find_ffns(model, list(model.transformer.h), lambda: model(ids)))
    idle = tuple(torch.arange(int(theta * ffn.hidden)) for ffn in ffns)
    maps = tuple(LinearMap.zeros(ffn.width, ffn.width) for ffn in ffns)
    return FoldPlan(ffns, idle, maps)


def language(rows: int, length: int, layers: int, *, width: int = WIDTH, device: str = "cpu", repeats: int = 7,
             dtype: torch.dtype = torch.float32) -> dict[str, Any]:  # fmt: skip
    """A GPT-2's network and the whole model, dense and folded, on the same batch."""
    model = gpt2(layers, device, dtype, width)
    plan = plan_of(model)
    modules = plan.modules(model)
    ids = torch.randint(0, 50_000, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    x = torch.randn(rows, length, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    path, folded = next(iter(modules.items()))
    dense = model.get_submodule(path)

    def whole(used: Mapping[str, nn.Module]) -> None:
        with swapped(model, used):
            model(input_ids=ids, use_cache=False)

    with torch.inference_mode():
        one_taken = in_turns({"dense": lambda: dense(x), "folded": lambda: folded(x)}, 3 * repeats, device)
        all_taken = in_turns({"dense": lambda: whole({}), "folded": lambda: whole(modules)}, repeats, device)
    one, all_ = ({name: statistics.median(v) for name, v in taken.items()} for taken in (one_taken, all_taken))
    tokens = rows * length
    return {
        "tokens": tokens, "layers": layers, "dtype": str(dtype).removeprefix("torch."), "weights": plan.ratio,
        "width": width, "repeats": repeats, "ffn_ratio": one["dense"] / one["folded"],
        "ffn_tokens_per_s": tokens / one["dense"], "model_ratio": all_["dense"] / all_["folded"],
        "model_tokens_per_s": tokens / all_["dense"],
        "ffn_spread": spread(ratios(one_taken, "dense")["folded"]),
        "model_spread": spread(ratios(all_taken, "dense")["folded"]),
    }  # fmt: skip


def paper(rows: int, length: int, *, width: int = WIDTH, device: str = "cpu", repeats: int = 21,
          dtype: torch.dtype = torch.float32) -> dict[str, float]:  # fmt: skip
    """The BatchNorm form: dense, with idle channels, and folded; times over that of the dense network."""
    torch.manual_seed(0)
    dense, idle = (ChannelIdleFFN(width, RHO * width, theta).eval().to(device, dtype) for theta in (0.0, THETA))
    folded = reparameterise(idle)
    x = torch.randn(rows, length, width).to(device, dtype)
    with torch.inference_mode():
        runs: dict[str, Callable[[], Any]] = {
            "dense": lambda: dense(x),
            "idle": lambda: idle(x),
            "folded": lambda: folded(x),
        }
        found = {name: statistics.median(v) for name, v in in_turns(runs, repeats, device).items()}
    return {name: found["dense"] / found[name] for name in ("idle", "folded")}


def cpu(batches: Sequence[tuple[int, int]] = ((4, 128), (1, 128), (8, 1)), layers: int = 6) -> dict[str, Any]:
    """Every batch on the CPU in float32."""
    return {"models": [language(rows, length, layers) for rows, length in batches], "paper": paper(4, 128)}


def gpu(batches: Sequence[tuple[int, int]] = ((16, 512), (4, 128), (8, 1)), layers: int = 24) -> dict[str, Any]:
    """The same on a GPU, in float32 and bfloat16."""
    dtypes = (torch.float32, torch.bfloat16)
    return {
        "models": [language(rows, length, layers, device="cuda", dtype=dtype, repeats=21)
                   for dtype in dtypes for rows, length in batches],
        "paper": paper(16, 512, device="cuda", dtype=torch.bfloat16),
    }  # fmt: skip
