"""Every parser of outside files as a `Target`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from safetensors.torch import save as to_bytes

from . import corpus, openers
from .corpus import draw, files, made
from .target import Target


def _metrics() -> dict[str, Any]:
    from ..metrics_example import metrics

    return metrics()


def _jobs() -> list[bytes]:
    import tomli_w

    from workbench.bundled import located
    from workbench.jobs import Job

    return [
        located("bundled:demo", "jobs", ".toml").read_bytes(),
        tomli_w.dumps(Job.load(located("bundled:demo", "jobs", ".toml")).model_dump(exclude_none=True)).encode(),
    ]


ROWS = [
    {"prompt": "What is 1 + 1?", "id": "a", "label": "x", "n": 1.5},
    {"prompt": "two, or\nmore", "id": "b", "label": None, "n": None},
]
CHAT = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}], "id": 3}]
TURNS = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}]
ANSWERS = [{"prompt": "p", "answer": "4", "gold": "4", "id": 0}, {"prompt": "q", "answer": "", "gold": "5", "id": 1}]
CSV = 'prompt,id,label\n"a, ""b""",1,x\nc,2,\n'
CONFIGS = ({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9,
            "architectures": ["LlamaForCausalLM"], "rope_theta": 1e4, "torch_dtype": "float32"},
           {"model_type": "folded-gpt2", "folding": {"base": "gpt2", "class": "GPT2LMHeadModel", "layers": []}})  # fmt: skip
PROBE_RUN = {
    "kind": "logistic", "label": "l", "score": "accuracy", "best": {"site": "resid_post.1", "positions": "last"},
    "lines": [{"site": "resid_post.1", "positions": "last", "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 1.0,
               "n_held_out": 9, "prompts_held_out": 9, "selectivity": 0.4, "control": 0.5}],
}  # fmt: skip


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def _transport_seed() -> list[bytes]:
    (entries,) = made(TRANSPORT, lambda path: corpus.grid(path / "grid"))
    metrics = {"format": "workbench.transport", "job": {"n_prompts": 3}, "warnings": [], "efficiency": {"sizes": [
        {"source": "resid_post.0", "target": "resid_post.1", "sum_rho2": 5.5}]}}  # fmt: skip
    return [entries + files(TRANSPORT, {"metrics.json": metrics})[0]]


TRANSPORT = ("metrics.json", "efficiency.parquet", *(f"grid/{name}" for name in corpus.GRID))
CATALOGUE = ("job.toml", "transport.toml", "adapter.json", "config.json", "params.safetensors", "probe.json", "manifest.json",
             "moments.json", "metrics.json", "log.txt", "steps/a.json", "similarity.toml", "journal.jsonl")  # fmt: skip
RUN = ("metrics.json", "job.toml", "log.txt", "steps/profile-donor.json", "environment.json")
LENS = ("config.json", "params.safetensors", "params.pt")


def _command_v_seed() -> bytes:
    meta = {"activation_point": "Layer.out", "aggregation": "last", "num_prompts": "3", "hidden_size": "4", "num_layers": "2",
            "model_name": "x/instruct"}  # fmt: skip
    return to_bytes({f"model.layers.{i}": draw(3, 4) for i in (0, 1)}, meta)


def _map_seed() -> bytes:
    from workbench.maps import LinearMap

    return corpus.one_file(lambda file: LinearMap(draw(3, 4), draw(4), {"k": 1}).save(file), ".safetensors")


def _catalogue_seeds() -> list[bytes]:
    job = "[donor]\nmodel = 'm'\n[[behaviours]]\nname = 'x'\n"
    own = {"base": {"name": "m"}, "site": "resid_post.1", "label": "l", "classes": ["a"]}
    about = {"format": "workbench.profile_moments", "model": {"name": "m"}, "prompts": {"name": "p"}, "n_rows": 5,
             "sites": ["a"], "tokens": "all"}  # fmt: skip
    lens = {"base_model_name_or_path": "m", "d_model": 3, "num_hidden_layers": 2, "workbench": {"base": {"name": "m"}}}
    return files(
        CATALOGUE,
        {"job.toml": job.encode(), "log.txt": b"a\nb", "steps/a.json": {"seconds": 1.5}, "metrics.json": {"schema": 1}},
        {"transport.toml": b'model = "m"\nprompts = "p"\nsites = ["0", "1"]\nfolds = 4\n'},
        {"probe.json": own},
        {"adapter.json": {"base": {"name": "m"}, "name": "n"}},
        {"config.json": lens, "params.safetensors": b""},
        {"moments.json": about},
        {"manifest.json": {"format": "workbench.store", "schema": 2}},
        {"similarity.toml": b'a = "s"\n'},
    )


def _run_seeds() -> list[bytes]:
    return files(RUN, {"metrics.json": _metrics(), "job.toml": _jobs()[0], "log.txt": b"a\nb\n",
                       "steps/profile-donor.json": {"seconds": 1.0, "key": "k", "result": None}})  # fmt: skip


def _adapters(names: tuple[str, ...]) -> Callable[[], list[bytes]]:
    return lambda: made(names, *corpus.adapters())


ADAPTER, BOTTLENECK = ("adapter.json", "adapter.safetensors", "README.md"), ("adapter_config.json", "adapter.safetensors",
                                                                           "pytorch_adapter.bin")  # fmt: skip
LORA = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MOMENTS = ("moments.json", "fold-0.safetensors", "fold-1.safetensors")
SAE = ("cfg.json", "sae_weights.safetensors")
CONVERTERS = ("converters.json", "converters.safetensors")
VECTORS = ("layer_3.safetensors",)


def _vector_seeds() -> list[bytes]:
    meta = {"site": "resid_post.2", "positions": "last", "name": "n", "model": "m"}
    return files(VECTORS, *({VECTORS[0]: to_bytes(t, meta)} for t in ({"v": draw(4)}, {"resid_post.1": draw(4), "5": draw(4)},
                            {"m": draw(3, 4)}, corpus.adapter_bias())))  # fmt: skip


TARGETS = {
    target.name: target
    for target in (
        Target("store", corpus.STORE, openers.store, corpus.stores, openers.sized),
        Target("tables", corpus.STORE, openers.tables, corpus.stores, openers.sized, rate=0.3),
        Target(
            "map",
            ("a.safetensors",),
            openers.linear_map,
            lambda: files(("a.safetensors",), {"a.safetensors": _map_seed()}),
            named=True,
        ),
        Target("moments", MOMENTS, openers.moments, lambda: files(MOMENTS, corpus.moment_folder()), openers.hashed),
        Target(
            "grouped",
            ("groups.json", "0000.safetensors", "0001.safetensors"),
            openers.grouped,
            lambda: made(("groups.json", "0000.safetensors", "0001.safetensors"), corpus.grouped),
        ),
        Target("adapter", ADAPTER, openers.load_adapter, _adapters(ADAPTER)),
        Target("pyreft", corpus.PYREFT, openers.load_adapter, lambda: made(corpus.PYREFT, corpus.pyreft), rate=0.6),
        Target("bottleneck", BOTTLENECK, openers.load_adapter, lambda: files(BOTTLENECK, corpus.bottleneck_files())),
        Target("lora", LORA, openers.lora, lambda: files(LORA, corpus.lora_files())),
        Target(
            "gguf",
            ("a.gguf",),
            lambda f: openers.load_adapter(f, "a.gguf"),
            lambda: files(("a.gguf",), *({"a.gguf": one} for one in corpus.control_vectors())),
            named=True,
        ),
        Target(
            "torch",
            ("layer_3.pt",),
            lambda f: openers.load_adapter(f, "layer_3.pt"),
            lambda: files(("layer_3.pt",), *({"layer_3.pt": one} for one in corpus.torch_files())),
            rate=0.6,
            named=True,
        ),
        Target("vectors", VECTORS, lambda f: openers.load_adapter(f, VECTORS[0]), _vector_seeds, named=True),
        Target(
            "job",
            ("job.toml",),
            openers.job,
            lambda: files(("job.toml",), *({"job.toml": one} for one in _jobs())),
            named=True,
        ),
        Target(
            "prompts-csv",
            ("a.csv",),
            openers.prompts("a.csv"),
            lambda: files(("a.csv",), {"a.csv": CSV.encode()}),
            named=True,
        ),
        Target(
            "prompts-jsonl",
            ("a.jsonl",),
            openers.prompts("a.jsonl"),
            lambda: files(("a.jsonl",), *({"a.jsonl": _lines(rows)} for rows in (ROWS, CHAT, TURNS))),
            named=True,
        ),
        Target(
            "prompts-json",
            ("a.json",),
            openers.prompts("a.json"),
            lambda: files(("a.json",), *({"a.json": rows} for rows in (ROWS, CHAT, ["a", ["b", "c"]]))),
            named=True,
        ),
        Target(
            "prompts-txt",
            ("a.txt",),
            openers.prompts("a.txt"),
            lambda: files(("a.txt",), {"a.txt": "one\n\ntwo \u00e9\n".encode()}),
            named=True,
        ),
        Target(
            "prompts-parquet",
            ("a.parquet",),
            openers.prompts("a.parquet"),
            lambda: files(("a.parquet",), *({"a.parquet": corpus.parquet(rows)} for rows in (ROWS, CHAT, TURNS))),
            rate=0.5,
            named=True,
        ),
        Target(
            "answers",
            ("a.csv", "a.jsonl"),
            openers.answers,
            lambda: files(
                ("a.csv", "a.jsonl"), {"a.jsonl": _lines(ANSWERS)}, {"a.csv": b"prompt,answer,gold\np,4,4\nq,,5\n"}
            ),
            named=True,
        ),
        Target(
            "saelens",
            SAE,
            openers.dictionary,
            lambda: made(SAE, *(corpus.dictionary(k).save for k in ("relu", "topk", "jumprelu", "gated"))),
        ),
        Target(
            "gemma-scope",
            ("params.npz",),
            openers.dictionary,
            lambda: files(("params.npz",), {"params.npz": corpus.gemma()}),
        ),
        Target(
            "dictionary-learning",
            ("config.json", "ae.pt"),
            openers.dictionary,
            lambda: files(("config.json", "ae.pt"), corpus.learned()),
            rate=0.6,
        ),
        Target("lens", LENS, openers.lens, lambda: files(LENS, *corpus.lens_files())),
        Target(
            "probe",
            ("probe.json", "probe.safetensors"),
            openers.probe,
            lambda: made(("probe.json", "probe.safetensors"), corpus.probe),
        ),
        Target(
            "eraser",
            ("eraser.json", "eraser.safetensors"),
            openers.eraser,
            lambda: made(("eraser.json", "eraser.safetensors"), corpus.eraser),
        ),
        Target("converters", CONVERTERS, openers.converters, lambda: made(CONVERTERS, corpus.converters)),
        Target("grid", corpus.GRID, openers.grid, lambda: made(corpus.GRID, corpus.grid), rate=0.3),
        Target("transport", TRANSPORT, openers.transport, _transport_seed, rate=0.2),
        Target(
            "training",
            ("a.safetensors",),
            openers.resume,
            lambda: files(("a.safetensors",), {"a.safetensors": corpus.training_checkpoint(openers.training())}),
            named=True,
        ),
        Target("run", RUN, openers.run, _run_seeds, rate=0.2),
        Target(
            "report",
            ("metrics.json",),
            openers.report,
            lambda: files(("metrics.json",), {"metrics.json": _metrics()}),
            rate=0.02,
        ),
        Target("catalogue", CATALOGUE, openers.catalogue, _catalogue_seeds),
        Target(
            "probe-run",
            ("metrics.json",),
            openers.probe_run,
            lambda: files(("metrics.json",), {"metrics.json": PROBE_RUN}),
        ),
        Target(
            "command-v",
            ("a.safetensors",),
            openers.command_v,
            lambda: files(("a.safetensors",), {"a.safetensors": _command_v_seed()}),
            named=True,
        ),
        Target(
            "model-config",
            ("config.json",),
            openers.config,
            lambda: files(("config.json",), *({"config.json": c} for c in CONFIGS)),
            named=True,
            rate=0.2,
        ),
    )
}
