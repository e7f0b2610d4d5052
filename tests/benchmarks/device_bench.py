"""What a device can do, measured first, and what share of it profiling, moments, folding and generation reach.

Everything runs on a CPU too, at `Sizes.little()`: the figures of a GPU are made by `make bench-gpu`.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.conftest import word_tokenizer
from workbench import Adapter, Model, Site, load, profile_model, profile_moments
from workbench.maps import Moments, counts
from workbench.paste import fold_gram
from workbench.planning.steps import moments_step, store_step
from workbench.planning.texts import Counted
from workbench.profile.plan import make_plan
from workbench.work import Lengths, ModelShape, Work, forward, generation
from workbench.work.rates import Rates, copy_rate, disk_rate, matrix_rate

from .paste_bench import _part, _rows
from .profile_bench import batches_of, llama_8b, random_prompts
from .timing import in_turns, spread

DTYPES = ("bfloat16", "float16", "tf32", "float32", "float64")


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults keep a large GPU busy, and the whole under ten minutes."""

    matrix: int = 8192
    copied: int = 1 << 30
    look: float = 0.5
    """seconds of one look at a limit"""
    prompts: int = 64
    shortest: int = 128
    longest: int = 512
    batch_tokens: int = 16384
    rows: int = 1 << 16
    width: int = 4096
    folded: int = 1030
    donor: int = 3072
    answers: int = 16
    prompt: int = 128
    new_tokens: int = 32
    repeats: int = 3

    @classmethod
    def little(cls) -> Sizes:
        """For a CPU and the smoke test."""
        return cls(64, 1 << 16, 0.002, 4, 8, 16, 64, 256, 32, 24, 48, 2, 8, 3, 1)


def limits(device: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """FLOP/s of square products by dtype, and bytes a second of copies: within the device, to and from the host, to disk."""
    rates = {
        name: matrix_rate("float32" if name == "tf32" else name, device, sizes.matrix, sizes.look, tf32=name == "tf32")
        for name in DTYPES
    }
    pinned = device.startswith("cuda")
    copies = {
        "within the device": copy_rate(device, sizes.copied, sizes.look),
        "from the host": _from_host(device, sizes, pinned=False),
        "from the host, pinned": _from_host(device, sizes, pinned=pinned),
        "to the host, pinned": copy_rate(device, sizes.copied, sizes.look, to="cpu", pinned=pinned),
        "to the disk": disk_rate(folder, max(1 << 20, min(sizes.copied, 1 << 28))),
    }
    return {"flops": rates, "bytes": copies}


def _from_host(device: str, sizes: Sizes, *, pinned: bool) -> float:
    from workbench.work.rates import once

    source = torch.empty(sizes.copied, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    return sizes.copied / once(lambda: target.copy_(source, non_blocking=True), device, sizes.look)


def small_llama(device: str) -> Model:
    """The same family, for the smoke test."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, vocab_size=199, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    return load(tf.LlamaForCausalLM(config).to(device).eval(), tokenizer=word_tokenizer())


def run(folder: Path, device: str = "cuda", sizes: Sizes | None = None, model: Model | None = None) -> dict[str, Any]:
    """Limits, then every use with its time, its counted work and the share of the limit that binds it."""
    sizes = sizes or (Sizes() if device.startswith("cuda") else Sizes.little())
    found = limits(device, sizes, folder)
    flops, copied = found["flops"], found["bytes"]
    rates = Rates("measured", flops, copied["within the device"], float("inf"), copied["to the disk"],
                  device=torch.device(device).type, reached=1.0)  # fmt: skip
    model = model or (llama_8b() if device.startswith("cuda") else small_llama(device))
    lines = [*_of_model(model, sizes, rates, folder), *_of_maps(device, sizes, rates)]
    return {"device": device, "sizes": dataclasses.asdict(sizes), "limits": found, "lines": lines,
            "model": repr(model), "repeats": sizes.repeats}  # fmt: skip


def _of_model(model: Model, sizes: Sizes, rates: Rates, folder: Path) -> list[dict[str, Any]]:
    shape, dtype = ModelShape.of(model), str(model.dtype).removeprefix("torch.")
    prompts = random_prompts(sizes.prompts, sizes.shortest, sizes.longest)
    plan = make_plan(model, prompts, tokens="all", batch_tokens=sizes.batch_tokens)
    counted = Counted(Lengths.of(plan.spool.lengths.tolist()), float(plan.n_rows))
    every, four = (
        shape.layers(),
        shape.layers(sorted({round((i + 1) * shape.n_layers / 4) - 1 for i in range(4)} - {-1})),
    )
    options: dict[str, Any] = {"tokens": "all", "batch_tokens": sizes.batch_tokens}
    stored: dict[str, Any] = {"dtype": dtype, "store_dtype": dtype, "batch_tokens": sizes.batch_tokens}
    batches = batches_of(model, prompts, sizes.batch_tokens)
    ids = torch.ones(sizes.answers, sizes.prompt, dtype=torch.long, device=model.device)
    decoding = {
        "max_new_tokens": sizes.new_tokens,
        "min_new_tokens": sizes.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    paste = Adapter({site: _part(shape.width, site.layer) for site in four}) * 1e-3

    def plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.module(**batch)

    def generate(adapter: Adapter | None) -> None:
        with torch.inference_mode():
            if adapter is None:
                model.module.generate(ids, attention_mask=torch.ones_like(ids), **decoding)
            else:
                with adapter.on(model):
                    model.module.generate(ids, attention_mask=torch.ones_like(ids), **decoding)

    def kept(sites: list[Site]) -> Callable[[], Any]:
        def profile() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                profile_model(model, prompts, Path(place) / "store", sites=sites, dtype=dtype, **options).close()

        return profile

    answers = generation(shape, Lengths.of([sizes.prompt] * sizes.answers), sizes.new_tokens, batch_size=sizes.answers,
                         dtype=dtype)  # fmt: skip
    ways: dict[str, tuple[Callable[[], Any], Work]] = {
        "plain forward pass, head and all": (plain, forward(shape, counted.texts, head="all", dtype=dtype,
                                                            batch_tokens=sizes.batch_tokens)),
        "profile, 4 sites, stored": (kept(four), store_step("p", shape, counted, four, **stored).work),
        "profile, all layers, stored": (kept(every), store_step("p", shape, counted, every, **stored).work),
        "profile, moments of 4 sites": (
            lambda: profile_moments(model, prompts, sites=four, **options),
            moments_step("m", shape, counted, four, dtype=dtype, batch_tokens=sizes.batch_tokens, device=rates.device).work
            + Work(disk=-moments_step("m", shape, counted, four, dtype=dtype).work.disk)),
        "generation": (lambda: generate(None), answers),
        "generation with a paste": (lambda: generate(paste), answers),
    }  # fmt: skip
    return _timed(ways, rates, sizes.repeats)


def _of_maps(device: str, sizes: Sizes, rates: Rates) -> list[dict[str, Any]]:
    n, d, kind = sizes.rows, sizes.width, torch.device(device).type
    blocks = {name: _rows(n, d, seed).to(device) for seed, name in enumerate(("x", "y"))}
    x, y = _rows(sizes.folded, d, 0).to(device), _rows(sizes.folded, sizes.donor, 1).to(device)
    part = _part(sizes.donor, 2).to(device)
    moments = Work({"float32": counts.moments_flops(n, [d, d], device=kind)}, moved=8.0 * n * d)
    fold = Work({"float64": counts.gram_fold_flops(sizes.folded, d, sizes.donor, 8, kind)})
    ways: dict[str, tuple[Callable[[], Any], Work]] = {
        "moments of two sites, rows at hand": (lambda: Moments(products=torch.float32).update(blocks), moments),
        "fold through the Gram": (lambda: fold_gram(part, x, y), fold),
    }
    return _timed(ways, rates, sizes.repeats)


def _timed(ways: dict[str, tuple[Callable[[], Any], Work]], rates: Rates, repeats: int) -> list[dict[str, Any]]:
    taken = in_turns({name: way for name, (way, _) in ways.items()}, repeats)
    lines = []
    for name, (_, work) in ways.items():
        seconds, parts = statistics.median(taken[name]), rates.seconds(work)
        binds = max(parts, key=parts.__getitem__)
        lines.append({"what": name, "seconds": seconds, "spread": spread(taken[name]), "flops": work.flops,
                      "by_dtype": dict(work.by_dtype), "moved": work.moved, "disk": work.disk, "binds": binds,
                      "share": parts[binds] / seconds})  # fmt: skip
    return lines


def tell(found: dict[str, Any]) -> str:
    """The section as markdown."""
    from .tables import table
    from .timing import shown

    limit = found["limits"]
    rates = [(name, f"{value / 1e12:.4g} TFLOP/s") for name, value in limit["flops"].items()]
    copies = [(name, f"{value / 1e9:.4g} GB/s") for name, value in limit["bytes"].items()]
    rows = [
        (x["what"], f"{x['seconds']:.3g}", shown(x["spread"], ".3g"), f"{x['flops'] / 1e9:,.4g}",
         f"{x['flops'] / x['seconds'] / 1e12:.3g}", f"{(x['moved'] + x['disk']) / 1e9:.3g}", x["binds"],
         f"{100 * x['share']:.0f} %") for x in found["lines"]
    ]  # fmt: skip
    size = found["sizes"]
    return "\n\n".join([
        f"What {found['device']} does, the best of looks of {size['look']:g} s: products of {size['matrix']:,} x "
        f"{size['matrix']:,}, and copies of {size['copied'] / 2**20:,.0f} MiB (within the device each byte is read and "
        "written).",
        table(["limit", "measured"], rates + copies),
        f"What is reached of it, with {found['model']}: the counted work (see [scale.md](scale.md)) over the limit that binds "
        f"it, as a share of the time that was taken; medians of {found['repeats']}. Of moments, matrix products in float32 "
        "without TF32; of folds, in float64.",
        table(["what", "seconds", "lowest to highest", "GFLOP", "TFLOP/s", "GB at least", "bound by", "share of the limit"],
              rows),
    ])  # fmt: skip
