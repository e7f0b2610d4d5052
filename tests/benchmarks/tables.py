"""The sections of docs/benchmarks.md: what is measured, and how the result is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .timing import shown

Row = Sequence[object]
MIB = 2**20

HEAD = """# Benchmarks

Every figure here was measured by `make bench` (`python -m tests.benchmarks SECTION` does one section again); a ratio is
of two things measured in one run, in turns, as medians; beside it the lowest and the highest of the turns, and a dash where a
section was measured before these were kept. A timing is never asserted in a test. GFLOP and GB are counted by the formulas of
[scale.md](scale.md) from the sizes, so that a figure can be judged on another machine. `make bench-gpu` does the sections of a
GPU.
"""


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    title: str
    measure: Callable[[Path], dict[str, Any]]
    """(an empty folder) -> numbers, as JSON values"""
    tell: Callable[[dict[str, Any]], str]
    """numbers -> markdown"""
    gpu: bool = False


def table(head: Row, rows: Sequence[Row]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def page(kept: dict[str, Any]) -> str:
    """The whole page, of the sections that were measured."""
    from . import claims

    lines = claims.rows(kept, {name: section.title for name, section in SECTIONS.items()})
    parts = [HEAD, "## In short\n\n" + table(["claim", "wanted", "measured", "section"], lines) + "\n"]
    for name, section in SECTIONS.items():
        if name in kept:
            on = kept[name]["on"]
            where = ", ".join(str(v) if k in ("date", "device") else f"{k} {v}" for k, v in on.items())
            parts.append(f"## {section.title}\n\n{section.tell(kept[name]['result'])}\n\n*{where}*\n")
    return "\n".join(parts)


def _speed(folder: Path) -> dict[str, Any]:
    from . import profile_bench

    return profile_bench.speed(others=True)


def _tell_speed(found: dict[str, Any]) -> str:
    from .counted import profile_flops, rate

    spreads, rows = found.get("spread", {}), []
    plain = found["tokens"] / found["plain"]
    for name, r in [("plain", 1.0), *found["ratio"].items()]:
        label = f"profile, {name}" if "layers" in name else "plain forward pass" if name == "plain" else name
        between = "-" if name == "plain" else shown(spreads.get(name))
        rows.append((label, f"{r:.2f}", between, *rate(profile_flops(found, name), plain / r)))
    shape = "GPT-2 small's shape (124M parameters, 12 layers)" if found["device"] == "cpu" else "Llama 3.1 8B's shape"
    return (
        "Tokens per second of a profile, written to disk and checksummed, over those of a plain `model(**batch)` with its "
        f"head on the same batches ({found['padding']:.0%} padding), for a random model of {shape}. "
        "The profile runs no head, stops after the last wanted layer, and gives attention no "
        "mask that right-padding does not need. Below it, tools that keep every token's `resid_post` of all layers in "
        f"memory and write nothing. Medians of {found['repeats']}; plain: {found['plain']:.0f} tokens/s.\n\n"
        + table(["what", "tokens/s, plain forward = 1", "lowest to highest", "GFLOP", "GFLOP/s"], rows)
    )


def _gpu_speed(folder: Path) -> dict[str, Any]:
    from . import profile_bench

    return profile_bench.large_speed()


def _profile_memory(folder: Path) -> dict[str, Any]:
    from . import profile_bench

    return {str(n): profile_bench.memory(n) for n in (10_000, 100_000, 1_000_000)}


def _tell_profile_memory(found: dict[str, Any]) -> str:
    rows = [(f"{int(n):,}", f"{one['bytes'] / MIB:.0f}", f"{one['grown']:.0f}", f"{one['bytes'] / one['seconds'] / 1e6:.0f}")
            for n, one in found.items()]  # fmt: skip
    return (
        "How far the peak memory of a process rises while it profiles so many rows of a tiny model (3 sites, 48 wide, "
        "`tokens='all'`), over what it had after a first small profile. A block of rows is 16,384 rows.\n\n"
        + table(["rows", "store, MiB", "memory, MiB", "written, MB/s"], rows)
    )


def _store(folder: Path) -> dict[str, Any]:
    from . import store_bench

    return {
        "open": [store_bench.open_time(folder, n_sites=n, block=b) for n, b in ((1, 16384), (32, 4096), (32, 1024))],
        "read": [store_bench.read_throughput(folder, n_sites=n) for n in (1, 4)],
        "memory": store_bench.memory(folder),
    }


def _tell_store(found: dict[str, Any]) -> str:
    opened = []
    for one in found["open"]:
        between = [1000 * x for x in one["open_spread"]] if "open_spread" in one else None
        time = f"{1000 * one['open_s']:.0f}" + (
            "" if between else " (the best)"
        )  # as it was kept before there were spreads
        opened.append((f"{one['rows']:,}", one["sites"], f"{one['shards']:,}", time, shown(between, ".0f")))
    read = []
    for one in found["read"]:
        for kind in ("cold", "warm"):
            ratios = [f"{one[f'ratio_{way}_{kind}']:.2f}" for way in ("batches", "summed", "read")]
            gb = [one[f"{way}_{kind}_bytes_per_s"] / 1e9 for way in ("dd", "batches")]
            between = one.get(f"batches_{kind}_spread")
            read.append((f"{one['sites']}, {kind}", f"{one['bytes'] / 1e9:.2f}", *(f"{x:.2f}" for x in gb),
                         shown(between and [x / 1e9 for x in between]), *ratios))  # fmt: skip
    rise = found["memory"]
    memory = [
        (f"{n:,}", *(f"{rise[what][i] / MIB:.0f}" for what in ("write", "read", "shuffled")))
        for i, n in enumerate(rise["rows"])
    ]
    return "\n\n".join(
        [
            "Opening: every file's name and size and every shard's header are checked, no activation is read.",
            table(["rows", "sites", "shards", "open, ms", "lowest to highest"], opened),
            f"Reading {found['read'][0]['bytes'] / 2**30:.0f} GiB of float32 rows back, over `dd bs=1M` of the same files; "
            f"cold: the caches were dropped ({found['read'][0]['dropped_by']}) before. `batches` is `iter_batches`, every "
            "page in memory when a batch is handed over; `summed` adds up every value too; `read` is `Store.read` of a whole "
            "site into fresh memory, which page faults bound.",
            table(
                [
                    "sites, caches",
                    "GB",
                    "dd, GB/s",
                    "batches, GB/s",
                    "lowest to highest",
                    "batches / dd",
                    "summed / dd",
                    "read / dd",
                ],
                read,
            ),
            f"Peak memory over what the process had before, MiB ({rise['width']} wide, float32):",
            table(["rows", "writing", "reading in order", "reading shuffled"], memory),
        ]
    )


def _faults(folder: Path) -> dict[str, Any]:
    from . import store_faults

    return {"kills": store_faults.kills(folder / "kills", 50), "races": store_faults.races(folder / "races", 10.0)}


def _tell_faults(found: dict[str, Any]) -> str:
    kills, races = found["kills"], found["races"]
    return (
        f"A profile killed with SIGKILL at {kills['kills']} seeded random moments ({kills['killed']} of them before it had "
        f"ended) and started again: **{kills['equal']} of {kills['kills']}** end byte for byte as an undisturbed run; "
        f"{kills['torn']} stores that were being overwritten could not be opened afterwards.\n\n"
        f"Two readers beside a writer that replaces their store: {races['right']:,} reads were right, {races['replaced']:,} "
        f"were told that the store was replaced, **{races['wrong']}** were wrong; exit codes {races['ended']}."
    )


def _maps(folder: Path) -> dict[str, Any]:
    from . import maps_bench

    small = maps_bench.one_pair(d=512, n=50_000, repeats=3)
    return {
        "one": maps_bench.one_pair(repeats=3),
        "small": small,
        "many": maps_bench.all_pairs(sklearn_s=small["sklearn_s"]),
        "targets": maps_bench.targets_of_one_source(d=1024),
        "memory": maps_bench.peak_memory(),
        "features": maps_bench.features(),
    }


def _gpu_maps(folder: Path) -> dict[str, Any]:
    from . import maps_bench

    return maps_bench.device_rate()


def _tell_gpu_maps(found: dict[str, Any]) -> str:
    return (
        f"Moments of two blocks of {found['n']:,} x {found['d']:,} rows on the GPU, float32 products, TF32 off: "
        f"{found['tflops']:.1f} TFLOP/s of nominal work, {100 * found['fraction']:.0f} % of the rate of the three plain "
        "products of the same rows."
    )


def _tell_maps(found: dict[str, Any]) -> str:
    from .counted import fit_flops, rate

    many, rows, said = found["many"], [], []
    for one in (found["one"], found["small"]):
        n, d = one["n"], one["d"]
        for label, key, folds in (("5-fold CV", "cv", 5), ("GCV", "gcv", 0)):
            seconds, between = one[f"{key}_s"], one.get("spread", {}).get(f"{key}_s")
            rows.append((f"one pair, {label}, d = {d:,}, n = {n:,}", f"{seconds:.1f}", shown(between, ".1f"),
                         f"{one[f'{key}_ratio']:.1f}", *rate(sum(fit_flops(n, d, folds=folds)), seconds)))  # fmt: skip
        said.append(f"{'the same penalty' if one['same_alpha'] else 'ANOTHER penalty'} chosen at d = {one['d']:,}, fold "
                    f"scores differ by at most {one['largest_score_difference']:.0e}")  # fmt: skip
    moments, fits = fit_flops(many["n"], many["d"], many["pairs"], many["layers"])
    size = f"all {many['pairs']} pairs of {many['layers']} layers, 5-fold CV, d = {many['d']}, n = {many['n']:,}"
    rows += [
        (size, f"{many['moments_s'] + many['fit_s']:.1f}", "-", f"{many['ratio']:.1f}",
         *rate(moments + fits, many["moments_s"] + many["fit_s"])),
        ("- of these the moments", f"{many['moments_s']:.1f}", "-", "", *rate(moments, many["moments_s"])),
        ("- of these the fits", f"{many['fit_s']:.1f}", "-", "", *rate(fits, many["fit_s"])),
    ]  # fmt: skip
    (few, few_s), (most, most_s) = found["targets"]["seconds"].items()
    memory = " and ".join(f"{b / 2**20:,.0f} MiB at n = {int(n):,}" for n, b in found["memory"]["bytes"].items())
    return (
        "Ridge maps from moments (float32 products, float64 sums and solves), over scikit-learn's "
        "`GridSearchCV(Ridge)` in float64 on the same arrays with the same 8 penalties and 5 folds, once for each pair: "
        f"{'; '.join(said)}. One pair is the median of {found['one']['repeats']}, scikit-learn is run once.\n\n"
        + table(["what", "seconds", "lowest to highest", "scikit-learn's time / this", "GFLOP", "GFLOP/s"], rows)
        + f"\n\n{most} targets of one source take {most_s / few_s:.2f} times what {few} take (d = {found['targets']['d']:,}). "
        f"Peak memory of all pairs of {found['memory']['layers']} layers, d = {found['memory']['d']}: {memory}. "
        f"All figures of {found['features']['features']} features on {found['features']['n']:,} rows of width "
        f"{found['features']['d']:,}: {found['features']['seconds']:.1f} s."
    )


def _cells(folder: Path) -> dict[str, Any]:
    from . import cells_bench

    return cells_bench.run()


def _tell_cells(found: dict[str, Any]) -> str:
    parts = [
        "The bundled pair both ways, three behaviours, adapters trained with a seed that nothing else uses, at one layer and "
        f"at three. A cell's share is the gain in mean log-odds on {found['evaluated']} evaluation prompts at strength 1, of "
        "the gain of native training at the same kind of layers. Means over behaviours and directions of shares cut to -1..1;"
        f" every cell by itself is in benchmarks.json."
    ]
    for kind, title in (("one", "One layer"), ("several", "Three layers at once")):
        rows = [r for r in found["table"] if r["kind"] == kind]
        columns = list(rows[0]["shares"])
        parts += [f"### {title}: mean share of native's gain, %", table(["converter", "layers by", *columns], [
            (r["method"], r["matching"], *(f"{100 * r['shares'][c]:.0f}" for c in columns)) for r in rows])]  # fmt: skip
    parts += [
        "### The default beside the best cell\n\nThe default (last tokens; "
        f"{found.get('default', 'layer, ridge and strength by the forecast')}) and the best of all cells of the same "
        "behaviour, direction and size, chosen after the fact by its measured effect; shares of at most 100 %.",
        table(["from", "layers", "behaviour", "prompts", "default, %", "best, %", "best is"], [
            (r["donor"], r["kind"], r["behaviour"], r["size"], f"{100 * r['default']:.0f}", f"{100 * r['best']:.0f}",
             r["best_is"]) for r in found["by_size"]]),
        "### Forecast against measurement\n\nAll distinct pastes at strength 1. Searched: one forward pass with the paste on "
        f"{found['tried']} validation prompts in place of the first-order forecast. Sign: of effects above 0.2 nats. Worked: "
        "at least 60 % of the donor's own effect; its AUROC is of the forecast over the donor's effect.",
        table(["cells", "n", "worked", *(f"{what}, {how}" for how in ("forecast", "searched")
                                         for what in ("Spearman", "sign", "AUROC"))], [
            (r["cells"], r["n"], r["worked"], *("-" if r[how][k] is None else f"{r[how][k]:.3f}"
             for how in ("forecast", "searched") for k in ("spearman", "sign", "auroc"))) for r in found["forecast"]]),
    ]  # fmt: skip
    if "damage" in found:
        rows = [(r["kind"], r["arm"], *(f"{r[k]:.3f}" for k in ("gain", "off", "over", "kl"))) for r in found["damage"]]
        parts += [
            "### What the default gains and harms\n\nMeans over the evaluation prompts: the rise of the behaviour's "
            "probability; the largest mean change of a probability on other prompts; that where the behaviour is not wanted; "
            "KL of the next token of neutral texts.",
            table(["layers", "which", "gain", "largest change elsewhere", "where not wanted", "KL, nats"], rows),
        ]
    return "\n\n".join(parts)


def _paste(folder: Path) -> dict[str, Any]:
    from . import paste_bench

    return paste_bench.run(folder)


def _tell_paste(found: dict[str, Any]) -> str:
    fold, run = found["fold"], found["generation"]

    def two(pair: list[float], unit: str = " s") -> str:
        return f"{pair[0]:.1f}{unit} ({pair[1]:.1f}{unit} of CPU)"

    from .counted import fold_flops, rate, step_flops

    work, steps = fold_flops(fold), step_flops(run)
    layers, spreads = fold["layers"], run.get("spread", {})
    kinds = {"float32": "bytes", "bfloat16": "bytes_bf16", "int8": "bytes_int8"}
    sizes = {kind: f"{fold[key] / 1e6:.2f}" for kind, key in kinds.items() if key in fold}
    rows = [
        ("fold through the Gram, one layer", two(fold["gram_s"]), shown(fold.get("gram_spread")),
         *rate(work["gram"], fold["gram_s"][0])),
        ("two dense pinvs and a fold, one layer", two(fold["dense_s"]), "-", *rate(work["dense"], fold["dense_s"][0])),
        ("the second over the first", two(fold["ratio"], ""), "-", "", ""),
        ("largest relative difference of the two", f"{fold['difference']:.1e}", "-", "", ""),
        (f"all {layers} layers folded through the Gram", two(fold["all_s"]), "-",
         *rate(layers * work["gram"], fold["all_s"][0])),
        ("all layers at ridge 0.1, factors kept for every other strength", two(fold["ridge_all_s"]), "-",
         *rate(layers * work["ridge"], fold["ridge_all_s"][0])),
        (f"the paste on disk, {layers} layers, {', '.join(sizes)}", f"{', '.join(sizes.values())} MB", "-", "", ""),
    ]  # fmt: skip
    tokens = run["batch"] * run["tokens"]
    ways = {"paste": "generation with the paste", "each_step": "generation, converting at each step"}
    seconds = {"plain": run["plain_s"], **{key: run[key] * run["plain_s"] for key in ways}}
    flops = {"plain": steps["plain"], **{key: steps["plain"] + steps[key] for key in ways}}
    each = [
        ("generation without", f"{run['plain_s']:.2f}", "1", "-", *rate(tokens * flops["plain"], run["plain_s"]), "", ""),
        *((label, f"{seconds[key]:.2f}", f"{run[key]:.3f}", shown(spreads.get(key), ".3f"),
           *rate(tokens * flops[key], seconds[key]), f"{steps[key] / 1e6:.3g}", "folded" if key == "paste" else "formed")
          for key, label in ways.items()),
    ]  # fmt: skip
    formed, folded = run["layers"] * fold["dense_s"][0], run["layers"] * fold["gram_s"][0]
    return (
        f"N = {fold['n']:,} prompts, widths {fold['widths'][0]} and {fold['widths'][1]}, rank 8, random rows, "
        f"{fold['threads']} threads.\n\n"
        + table(["what", "cost", "lowest to highest", "GFLOP", "GFLOP/s"], rows)
        + f"\n\nGeneration: a random model of GPT-2 small's shape, {run['layers']} edited layers, {run['tokens']} new tokens, "
        f"batch {run['batch']}, medians of {run['repeats']} in turns.\n\n"
        + table(["what", "seconds", "over without", "lowest to highest", "GFLOP", "GFLOP/s", "MFLOP a token beside the model",
                 "converters"], each)
        + f"\n\nBefore the first token, the paste of {run['layers']} layers is folded in {folded:.1f} s at the widths above; "
        f"converting at each step needs its converters formed, in {formed:.1f} s."
    )  # fmt: skip


def _lora(folder: Path) -> dict[str, Any]:
    from . import lora_bench

    return lora_bench.bench(folder)


def _tell_lora(found: dict[str, Any]) -> str:
    arms = list(next(iter(found.values()))["arms"])
    rows = []
    for arm in arms:
        row: list[object] = [arm]
        for one in found.values():
            rate, odds = one["arms"][arm]["rate"], one["arms"][arm]["log_odds"]
            row += [f"{rate['value']:.1%} [{rate['low']:.0%}, {rate['high']:.0%}]",
                    f"{odds['value']:+.2f} [{odds['low']:+.2f}, {odds['high']:+.2f}]"]  # fmt: skip
        rows.append(row)
    head = ["", *(text for name, one in found.items() for text in (f"{name}: {one['score']}", "log-odds"))]
    fits = [
        (name, one["site"], one["rank"], f"{one['r2']:.3f} ({one['r2_constant']:.3f})",
         f"{one['explained']:.3f} ({one['explained_constant']:.3f})", f"{one['kl_before']:.3g}", f"{one['kl_after']:.3g}",
         one["pasted_at"], f"{one['strength']:.2f}")
        for name, one in found.items()
    ]  # fmt: skip
    n = next(iter(found.values()))["n"]
    return "\n\n".join(
        [
            "A LoRA (rank 4, alpha 8; query, value and down projections, 100 steps of 32 demonstrations) of the bundled donor, "
            "turned into a residual adapter of the last prompt token by `residual_adapter` on the bundled profile prompts "
            "(every `resid_post` tried, the best kept, rank by cross-validation), and pasted into the recipient with the "
            "converter, layer and strength that a job chooses (forecast, then trials); beside the LoRA itself and a LoRA "
            f"trained on the recipient. Greedy answers to {n} evaluation prompts, 95 % intervals.",
            table(head, rows),
            "The fit on held-out prompts, the constant alone in brackets, and the mean KL of the next token from the model "
            "with the LoRA, without and with the adapter, in nats:",
            table(
                ["behaviour", "site", "rank", "R2", "explained", "KL without", "KL with", "pasted at", "strength"], fits
            ),
        ]
    )


def _third(folder: Path) -> dict[str, Any]:
    from . import third_bench

    return third_bench.bench(folder)


def _tell_third(found: dict[str, Any]) -> str:
    from . import third_bench

    return third_bench.tell(found)


def _explorer(folder: Path) -> dict[str, Any]:
    from . import explorer_bench

    for name in ("large", "sessions"):
        (folder / name).mkdir()
    return {
        "large": explorer_bench.large_store(folder / "large"),
        "sessions": explorer_bench.sessions(folder / "sessions"),
    }


def _tell_explorer(found: dict[str, Any]) -> str:
    large, many = found["large"], found["sessions"]
    rows = [
        ("the first page ever, of a small store: the browser loads the frontend", f"{large['browser_s']:.2f}"),
        ("the first page of the large store: at a glance", f"{large['overview_s']:.2f}"),
        ("its rows in a plane", f"{large['plane_s']:.2f}"),
        ("another site, seen for the first time", f"{large['first_change_s']:.2f}"),
        ("another site, median", f"{large['change_s']:.2f}"),
        (
            f"a box drawn in the plane until its rows are listed, median of {large['turns']}",
            f"{large['selection_s']:.2f}",
        ),
    ]
    return "\n\n".join(
        [
            f"A store of {large['rows']:,} rows x {large['width']:,} in bfloat16 at {large['sites']} sites, seen in headless "
            "Chromium on the same cores as the server, from the click to the page at rest:",
            table(["what", "seconds"], rows),
            f"The server held at most {large['memory_bytes'] / 2**20:,.0f} MiB more than before the store was opened.",
            f"{many['count']} readers at once, each clicking at random for {many['seconds']:.0f} s: {many['clicks']} clicks, "
            f"**{many['exceptions']}** exceptions, **{many['foreign']}** pages of another reader's store; the server's "
            f"own memory was {many['before_bytes'] / 2**20:,.0f} MiB after one reader had clicked as long alone and left, and "
            f"{many['after_bytes'] / 2**20:,.0f} MiB after all of them had.",
        ]
    )


def _probes(folder: Path) -> dict[str, Any]:
    from .probe_bench import probes

    return probes(folder)


def _tell_probes(found: dict[str, Any]) -> str:
    seconds, reading, spreads = found["seconds"], found["seconds"]["reading"], found.get("spread", {})
    gb = 2 * found["rows"] * found["width"] / 1e9  # of bfloat16
    rows = [(name, f"{value:.2f}", shown(spreads.get(name)), f"{value / reading:.1f}",
             f"{seconds['scikit-learn in a loop'] / value:.1f}", f"{gb:.3f}", f"{gb / value:.2f}")
            for name, value in seconds.items()]  # fmt: skip
    return "\n\n".join([
        f"A binary label of {found['rows']:,} rows x {found['width']:,} in bfloat16, {found['layers']} layers, on "
        f"{found['device']}; each probe with its score on held-out prompts and its interval:",
        table(["what", "seconds a layer", "lowest to highest", "of reading it once", "scikit-learn's loop over this", "GB",
               "GB/s"], rows),
        f"Held-out accuracy {found['accuracy']['probe']:.3f}, of the loop {found['accuracy']['loop']:.3f}.",
    ])  # fmt: skip


def _fold(folder: Path) -> dict[str, Any]:
    from . import fold_bench

    return fold_bench.cpu()


def _gpu_fold(folder: Path) -> dict[str, Any]:
    from . import fold_bench

    return fold_bench.gpu()


def _ffn_rates(one: dict[str, Any]) -> tuple[str, str]:
    """GFLOP/s of the dense network, 16 d^2 FLOPs a token, and of the folded one, which keeps a share of its weights."""
    dense = 16.0 * one["width"] ** 2 * one["ffn_tokens_per_s"] / 1e9
    return f"{dense:,.3g}", f"{one['weights'] * one['ffn_ratio'] * dense:,.3g}"


def _tell_fold(found: dict[str, Any]) -> str:
    rows = [
        (f"{one['tokens']:,}", one["dtype"], f"{one['ffn_ratio']:.2f}", shown(one.get("ffn_spread")),
         f"{one['ffn_tokens_per_s']:,.0f}", *_ffn_rates(one), one["layers"], f"{one['model_ratio']:.2f}",
         shown(one.get("model_spread")), f"{one['model_tokens_per_s']:,.0f}") for one in found["models"]
    ]  # fmt: skip
    paper, first = found["paper"], found["models"][0]
    return (
        f"Forward passes of a random GPT-2 of width {first['width']:,} whose networks have four times as many channels: dense, "
        f"and with three quarters of these folded into one linear map each ({first['weights']:.1%} of the networks' weights), "
        "in turns on the same batch. The first ratio is of one network, the second of the whole model with attention and "
        "head, which no fold makes faster.\n\n"
        + table(["tokens of the batch", "dtype", "network: folded / dense", "lowest to highest", "dense, tokens/s",
                 "dense, GFLOP/s", "folded, GFLOP/s", "layers", "model: folded / dense", "lowest to highest",
                 "dense, tokens/s"], rows)
        + f"\n\nThe form with BatchNorm runs {paper['folded']:.2f} times as fast folded as its dense twin, and before it is "
        f"folded {paper['idle']:.2f} times."
    )  # fmt: skip


def _device(folder: Path) -> dict[str, Any]:
    from . import device_bench

    return device_bench.run(folder)


def _tell_device(found: dict[str, Any]) -> str:
    from . import device_bench

    return device_bench.tell(found)


def _growth(folder: Path) -> dict[str, Any]:
    from . import growth_bench

    return growth_bench.run(folder)


def _tell_growth(found: dict[str, Any]) -> str:
    from . import growth_bench

    return growth_bench.tell(found)


def _engines(folder: Path) -> dict[str, Any]:
    from . import engine_bench

    return engine_bench.bench(folder)


def _tell_engines(found: dict[str, Any]) -> str:
    rows = [(name, f"{found['seconds'][name]:.2f}", f"{found['spread'][name]:.2f}", f"{found['ratio'][name]:.2f}")
            for name in found["seconds"]]  # fmt: skip
    same = f"The bytes of all {found['compared']} stores {'are equal' if found['equal'] else '**differ**'}."
    return "\n\n".join([
        f"A profile of the bundled recipient, every token in float32, in {found['pieces']} pieces, {found['repeats']} times in "
        f"turns on {found['cores']} cores; the workers had loaded their replicas (the first profile with Ray, which waits for "
        f"that, took {found['ready_s']:.1f} s):",
        table(["engine", "seconds, median", "largest - smallest", "over local"], rows),
        f"A piece that does nothing costs {1e3 * found['overhead_s']:.1f} ms by Ray. {same}",
    ])  # fmt: skip


SECTIONS: dict[str, Section] = {
    "speed": Section("Profiling against a plain forward pass", _speed, _tell_speed),
    "device-gpu": Section("A GPU's limits, and what is reached of them", _device, _tell_device, gpu=True),
    "speed-gpu": Section("Profiling on a GPU, an 8B shape", _gpu_speed, _tell_speed, gpu=True),
    "profile-memory": Section("Memory of a profile", _profile_memory, _tell_profile_memory),
    "store": Section("Stores: opening, reading, memory", _store, _tell_store),
    "maps": Section("Fitting maps from moments", _maps, _tell_maps),
    "maps-gpu": Section("Moments on a GPU", _gpu_maps, _tell_gpu_maps, gpu=True),
    "paste": Section("Pasting: cost", _paste, _tell_paste),
    "cells": Section("Every converter, layer matching and profile on the bundled pair", _cells, _tell_cells),
    "lora": Section("A LoRA as a residual adapter, pasted", _lora, _tell_lora),
    "third": Section("A transfer to a model that no default was tuned on", _third, _tell_third),
    "probes": Section("Probes of every layer", _probes, _tell_probes),
    "fold": Section("Folded feed-forward networks", _fold, _tell_fold),
    "fold-gpu": Section("Folded feed-forward networks on a GPU", _gpu_fold, _tell_fold, gpu=True),
    "growth": Section("How time grows with rows, width and layers", _growth, _tell_growth),
    "explorer": Section("The explorer on a large store, and under ten readers", _explorer, _tell_explorer),
    "engines": Section("Engines: one process against Ray", _engines, _tell_engines),
    "faults": Section("Stores: kills and races", _faults, _tell_faults),
}
