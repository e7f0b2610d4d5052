"""docs/scale.md: what large models cost, by the formulas of `workbench plan`, and how these compare with what is measured.

`measure` computes the tables and makes the check, and returns the numbers as JSON values (kept in docs/scale.json); `page`
tells them. What the text says of them in words is asserted in tests/pages/test_scale_page.py.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
import transformers as tf
from jinja2 import Environment, StrictUndefined

from workbench import Model, load, plan_profile, profile_model, profile_moments, train_adapter
from workbench.adapters.demonstrations import encode_demonstrations
from workbench.maps import counts
from workbench.maps.ridge import fit_ridge_targets
from workbench.planning.plan import duration, size
from workbench.planning.steps import moments_step, store_step
from workbench.planning.texts import Counted
from workbench.profile.plan import make_plan
from workbench.sites import Site
from workbench.work import Lengths, ModelShape, Work, cache_bytes, forward, generation, store_bytes, training
from workbench.work.rates import PRESETS, measured

from ..benchmarks.tables import table
from ..conftest import word_tokenizer
from ..work.counting import counted
from .transport import rounded

ROOT = Path(__file__).resolve().parents[2]
KEPT, PAGE = ROOT / "docs" / "scale.json", ROOT / "docs" / "scale.md"
TEMPLATE = Path(__file__).with_name("scale.md.jinja")
TOKENS = (1e6, 1e7, 1e8, 1e9, 1e10)
LENGTH, GPU, NODE = 1024, "H100", 8
Line = dict[str, Any]


def _llama(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
            "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip


MODELS = {
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "Llama-3.3-70B": _llama(8192, 28672, 80, 64),
    "Llama-3.1-405B": _llama(16384, 53248, 126, 128),
}
"""from their config.json (huggingface.co/meta-llama) and The Llama 3 Herd of Models, arXiv:2407.21783, table 3"""


def ways(shape: ModelShape) -> dict[str, dict[str, Any]]:
    """What is kept of a profile of all tokens: options of `plan_profile`."""
    some = [round((i + 1) * shape.n_layers / 4) - 1 for i in range(4)]
    near = [(layer, layer + 1) for layer in range(shape.n_layers - 1)]
    return {
        "stored, 4 sites": {"sites": some, "store_dtype": "bfloat16"},
        "stored, all layers": {"store_dtype": "bfloat16"},
        "moments, 4 sites, all pairs": {"sites": some, "moments": True},
        "moments, all layers, neighbours": {"moments": True, "pairs": near},
        "moments, all layers, all pairs": {"moments": True},
    }


def measure(_folder: Path | None = None) -> Line:
    """Everything the page tells: a minute on 2 cores."""
    shapes = {name: ModelShape.of_numbers(name, numbers) for name, numbers in MODELS.items()}
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        check = checked(Path(folder))
    return rounded({
        "models": [_model(shape) for shape in shapes.values()],
        "costs": [line for shape in shapes.values() for line in costs(shape)],
        "gpus": [{"name": r.name, "source": r.source, "half": r.flops["bfloat16"], "single": r.flops["float32"],
                  "double": r.flops["float64"], "memory": r.memory, "capacity": r.capacity} for r in PRESETS.values()],
        "reached": PRESETS[GPU].reached, "disk": PRESETS[GPU].disk, "gpu": GPU, "length": LENGTH, "node": NODE, "check": check,
    })  # fmt: skip


def _model(shape: ModelShape) -> Line:
    one = Lengths.even(LENGTH, LENGTH)
    whole = Lengths.of([LENGTH])
    ridge = counts.ridge_flops(shape.width, [shape.width], alphas=11, folds=5, device="cuda")
    train = training(shape, one, [Site(2 * shape.n_layers // 3)])
    return {
        "name": shape.name, "layers": shape.n_layers, "width": shape.width, "parameters": shape.parameters,
        "bytes": shape.bytes(), "forward": forward(shape, one).flops / LENGTH,
        "half": forward(shape, one, stop_after=shape.n_layers // 2 - 1).flops / LENGTH,
        "head": 2.0 * shape.head, "training": train.flops / LENGTH, "row": store_bytes(shape, None, 1, "bfloat16"),
        "cache": cache_bytes(shape, 1), "answer": generation(shape, whole, 128).flops, "ridge": ridge,
        "fold": counts.gram_fold_flops(1030, shape.width, shape.width, 8, "cuda"),
    }  # fmt: skip


def costs(shape: ModelShape) -> list[Line]:
    """A line for each way and number of tokens, on as many GPUs as a replica needs, in whole machines of `NODE`."""
    found = []
    for way, options in ways(shape).items():
        for tokens in TOKENS:
            plan = plan_profile(shape, tokens=tokens, length=LENGTH, policy="all", rates=PRESETS[GPU], **options)
            (step,) = plan.steps
            gpus = NODE * -(-plan.needed(step) // NODE)
            whole = plan_profile(
                shape, tokens=tokens, length=LENGTH, policy="all", rates=PRESETS[GPU], gpus=gpus, **options
            )
            found.append({"model": shape.name, "way": way, "tokens": tokens, "flops": step.work.flops,
                          "disk": step.work.disk, "device": step.device, "needed": plan.needed(step), "gpus": gpus,
                          "seconds": whole.seconds(step), "compute": whole.parts(step)["compute"],
                          "binds": whole.binds(step)})  # fmt: skip
    return found


# -- the check ---------------------------------------------------------------------------------------------------------


def small_model(width: int = 384, layers: int = 6) -> Model:
    """A random Llama that is wide enough for its products to keep a core busy."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
                            num_attention_heads=width // 32, num_key_value_heads=width // 64, vocab_size=8000, bos_token_id=1,
                            eos_token_id=2, pad_token_id=0)  # fmt: skip
    return load(tf.LlamaForCausalLM(config).eval(), tokenizer=word_tokenizer())


def checked(
    folder: Path, *, width: int = 384, layers: int = 6, texts: int = 32, words: int = 120, repeats: int = 3
) -> Line:
    """Predicted and counted FLOPs, predicted and written bytes, and seconds by this machine's measured rates."""
    model = small_model(width, layers)
    shape, rates = ModelShape.of(model), measured("cpu", folder)
    g = torch.Generator().manual_seed(0)
    prompts = [" ".join(f"w{i}" for i in torch.randint(0, 190, (words,), generator=g).tolist()) for _ in range(texts)]
    known = make_plan(model, prompts, tokens="all")
    counted_texts = Counted(Lengths.of(known.spool.lengths.tolist()), float(known.n_rows))
    short = [{"prompt": p[:40], "response": p[40:200]} for p in prompts]
    lines = [
        _line(name, work, run, shape, rates, repeats)
        for name, work, run in _runs(model, shape, counted_texts, prompts, short, folder)
    ]
    with profile_model(model, prompts, sites=[0, 2], tokens="all", dtype="bfloat16") as store:
        written = sum(store.read(site).nbytes for site in store.sites)
        predicted = store_bytes(shape, [0, 2], store.n_rows, "bfloat16")
    (moments,) = profile_moments(model, prompts, sites=[0, 2], tokens="all")
    held = sum(t.nbytes for t in (*moments.product.values(), *moments.sum.values(), *moments.shift.values()))
    step = moments_step("m", shape, counted_texts, shape.layers([0, 2]), dtype="float32")
    ids = torch.ones(2, 50, dtype=torch.long)
    with torch.inference_mode():
        kept = model.module(input_ids=ids, use_cache=True).past_key_values
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    sizes = [("activations of a store", predicted, written), ("moments of two sites", step.work.disk, held),
             ("cache of 100 tokens", cache_bytes(shape, 100), cached)]  # fmt: skip
    return {"lines": lines, "bytes": [{"what": w, "predicted": round(p), "found": f} for w, p, f in sizes], "width": width,
            "layers": layers, "tokens": counted_texts.texts.tokens, "repeats": repeats,
            "rates": {"name": rates.name, "float32": rates.flops["float32"], "float64": rates.flops["float64"],
                      "memory": rates.memory, "disk": rates.disk}}  # fmt: skip


def _runs(
    model: Model, shape: ModelShape, texts: Counted, prompts: list[str], short: list[dict[str, str]], folder: Path
) -> list[tuple[str, Work, Callable[[], Any]]]:
    """(name, predicted work, what does it)."""
    sites, new = shape.layers(), 16
    names = [str(s) for s in sites]
    parts = profile_moments(model, prompts, tokens="all", folds=4)
    length = int(max(texts.texts.counts))
    ids = torch.randint(6, 190, (8, length), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    alphas, steps = (0.01, 0.1, 1.0), 4
    samples = encode_demonstrations(model, load_prompts(short))
    shown = Lengths.of(len(p) + len(a) for p, a in samples).scaled(steps * 8 / len(samples))
    scale = profile_model(model, short)  # temporary: it goes with what holds it

    def generate() -> None:
        with torch.inference_mode():
            model.module.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def whole() -> None:
        with torch.inference_mode():
            model.module(input_ids=ids, use_cache=False)

    d = shape.width
    ridge = counts.ridge_flops(d, [d] * (len(names) - 1), alphas=len(alphas), folds=4)
    return [
        ("forward pass, head and all", forward(shape, Lengths.of([length] * 8), head="all"), whole),
        ("profile of all layers, stored", store_step("p", shape, texts, sites, dtype="float32").work,
         lambda: profile_model(model, prompts, folder / "store", tokens="all", overwrite=True)),
        ("moments of all pairs of layers", moments_step("m", shape, texts, sites, dtype="float32").work,
         lambda: profile_moments(model, prompts, tokens="all")),
        ("ridge by 4 folds, one source to all", Work({"float64": ridge}),
         lambda: fit_ridge_targets(parts, names[0], names[1:], alphas=alphas)),
        (f"generation, {new} tokens", generation(shape, Lengths.of([length] * 8), new), generate),
        ("training an adapter", training(shape, shown, [Site(shape.n_layers // 2)]),
         lambda: train_adapter(model, short, shape.n_layers // 2, steps=steps, batch_size=8, profile=scale)),
    ]  # fmt: skip


def load_prompts(lines: list[dict[str, str]]) -> Any:
    from workbench import PromptSet

    return PromptSet.load(lines)


def _line(name: str, work: Work, run: Callable[[], Any], shape: ModelShape, rates: Any, repeats: int) -> Line:
    flops = counted(run)
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    parts = rates.seconds(work)
    unseen = 0.0
    if "ridge" in name:  # decompositions, which no counter sees
        unseen = 5 * counts.eigh_flops(shape.width)
    return {"what": name, "flops": work.flops - unseen, "counted": flops, "ratio": (work.flops - unseen) / flops,
            "predicted_s": max(parts.values()), "binds": max(parts, key=parts.__getitem__),
            "measured_s": statistics.median(taken), "low_s": min(taken), "high_s": max(taken)}  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------------


def figures(_folder: Path | None, kept: Line) -> dict[str, go.Figure]:
    """None: its tables are read across."""
    return {}


def page(kept: Line) -> str:
    """The page as markdown: the template, and every number of it from what was kept."""
    source = TEMPLATE.read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(source)
    names = list(dict.fromkeys(line["model"] for line in kept["costs"]))
    tables = {name: _costs([line for line in kept["costs"] if line["model"] == name]) for name in names}

    def more(model: str, way: str) -> float:
        return line(kept, model, way, 1e9)["compute"] / line(kept, model, "stored, all layers", 1e9)["compute"]

    return template.render(kept=kept, more=more, tables=tables, models=_models(kept["models"]), gpus=_gpus(kept["gpus"]),
                           check=_check(kept["check"]["lines"]), sizes=_sizes(kept["check"]["bytes"]), size=size,
                           duration=duration, line=lambda *key: line(kept, *key))  # fmt: skip


def line(kept: Line, model: str, way: str, tokens: float) -> Line:
    """One line of the costs."""
    return next(x for x in kept["costs"] if (x["model"], x["way"], x["tokens"]) == (model, way, tokens))


def _models(lines: Sequence[Line]) -> str:
    head = ("model", "parameters", "weights, bfloat16", "forward, FLOPs a token", "to half of the depth", "head",
            "training an adapter",
            "all layers of a token", "cache of a token", "one ridge map, 5 folds", "one fold, rank 8")  # fmt: skip
    rows = [(m["name"], f"{m['parameters'] / 1e9:.2f}e9", size(m["bytes"]), f"{m['forward']:.2e}", f"{m['half']:.2e}",
             f"{m['head']:.2e}", f"{m['training']:.2e}", size(m["row"]), size(m["cache"]), f"{m['ridge']:.1e}",
             f"{m['fold']:.1e}") for m in lines]  # fmt: skip
    return table(head, rows)


def _costs(lines: Sequence[Line]) -> str:
    powers = sorted({x["tokens"] for x in lines})
    head = ("what is kept", "FLOPs a token", "memory of a replica", "its GPUs", "GPUs in all", "bound by",
            *(f"1e{len(str(int(n))) - 1} tokens" for n in powers))  # fmt: skip
    rows = []
    for way in dict.fromkeys(x["way"] for x in lines):
        mine = [x for x in lines if x["way"] == way]
        last = mine[-1]
        rows.append((way, f"{last['flops'] / last['tokens']:.2e}", size(last["device"]), f"{last['needed']:,}",
                     f"{last['gpus']:,}", last["binds"],
                     *(f"{size(x['disk'])}, {duration(x['seconds'])}" for x in mine)))  # fmt: skip
    return table(head, rows)


def _gpus(lines: Sequence[Line]) -> str:
    head = ("GPU", "bfloat16, TFLOP/s", "float32", "float64", "memory, GB/s", "GB", "source")
    return table(head, [(x["name"], f"{x['half'] / 1e12:.4g}", f"{x['single'] / 1e12:.3g}", f"{x['double'] / 1e12:.3g}",
                         f"{x['memory'] / 1e9:,.0f}", f"{x['capacity'] / 1e9:.0f}", x["source"]) for x in lines])  # fmt: skip


def _check(lines: Sequence[Line]) -> str:
    head = ("what", "FLOPs by formula", "counted while it ran", "ratio", "predicted", "measured (lowest to highest)",
            "measured / predicted", "bound by")  # fmt: skip
    rows = [(x["what"], f"{x['flops']:.3e}", f"{x['counted']:.3e}", f"{x['ratio']:.3f}", f"{x['predicted_s']:.2f} s",
             f"{x['measured_s']:.2f} s ({x['low_s']:.2f} to {x['high_s']:.2f})",
             f"{x['measured_s'] / x['predicted_s']:.1f}", x["binds"]) for x in lines]  # fmt: skip
    return table(head, rows)


def _sizes(lines: Sequence[Line]) -> str:
    return table(("what", "bytes by formula", "bytes found"),
                 [(x["what"], f"{x['predicted']:,.0f}", f"{x['found']:,.0f}") for x in lines])  # fmt: skip
