"""Every parser of outside files as a `Target`."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

from . import corpus
from .bundles import Entry
from .corpus import draw, files, made
from .target import Target, entry_json


def _load_adapter(folder: Path, name: str = "") -> None:
    from workbench.adapters.adapter import Adapter

    found = Adapter.load(folder / name)
    repr(found), found.hash, found.layers
    for term in found.split():
        for site, part in term.parts.items():
            term.delta(site, torch.zeros(2, part.width))


def _store(folder: Path) -> None:
    from workbench.store import Store

    with Store.open(folder) as store:
        repr(store)
        for site in store.sites:
            store.read(site, slice(0, 3)), store.read(site, [0, store.n_rows - 1])
        store.verify()


def _tables(folder: Path) -> None:
    from workbench.store import Store
    from workbench.store.listing import describe_store

    describe_store(folder)
    with Store.open(folder) as store:
        store.rows(), store.prompts(["id", "text"]), store.rows_of(0), store.prompt_index
        store.prompt_set()


def _sized(entries: list[Entry], _: random.Random) -> list[Entry]:
    """A store whose manifest has the sizes and hashes that its files have."""
    found = entry_json(entries, 0)
    if found is None:
        return entries
    at, manifest = found
    held = {index: content for index, _, content in entries}
    shards = manifest.get("shards")
    tables = manifest.get("tables")
    listed = [(tables or {}).get(name) if isinstance(tables, dict) else None for name in corpus.STORE[1:3]]
    listed += (shards if isinstance(shards, list) else [])[:2]
    for index, entry in enumerate(listed, 1):
        if isinstance(entry, dict) and index in held:
            entry |= {"bytes": len(held[index]), "sha256": hashlib.sha256(held[index]).hexdigest()}
    entries[at] = (0, entries[at][1], json.dumps(manifest).encode("utf-8", "surrogatepass"))
    return entries


def _hashed(entries: list[Entry], _: random.Random) -> list[Entry]:
    """Moments whose folder says the hashes that its files have."""
    found = entry_json(entries, 0)
    if found is None:
        return entries
    at, about = found
    if isinstance(about.get("files"), dict):
        for index, _, content in entries:
            if index:
                about["files"][f"fold-{index - 1}.safetensors"] = hashlib.sha256(content).hexdigest()
    entries[at] = (0, entries[at][1], json.dumps(about).encode("utf-8", "surrogatepass"))
    return entries


def _moments(folder: Path) -> None:
    from workbench.profile.sums import load_moments

    for found in load_moments(folder):
        for name in found.names:
            if found.n:
                found.cov(name, name)


def _grouped(folder: Path) -> None:
    from workbench.maps.grouped import GroupedMoments

    found = GroupedMoments.load(folder)
    if found.groups:
        found.total()


def _map(folder: Path) -> None:
    from workbench.maps import LinearMap

    found = LinearMap.load(folder / "a.safetensors")
    found(torch.zeros(1, found.d_in)), repr(found)


def _lora(folder: Path) -> None:
    from workbench.adapters.peft_lora import is_lora, read

    is_lora(folder), repr(read(folder))


def _job(folder: Path) -> None:
    from workbench.jobs import Job

    job = Job.load(folder / "job.toml")
    assert Job.parse(_toml(job.text)) == job


def _toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def _prompts(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from workbench.prompts import PromptSet

        for chat in (None, True):
            found = PromptSet.load(folder / name, chat=chat)
            found.hash, repr(found)

    return read


def _answers(folder: Path) -> None:
    from workbench.evaluate.answer_files import read_answers

    names = [name for name in ("a.csv", "a.jsonl") if (folder / name).exists()]
    read_answers([folder / name for name in names] or folder / "a.csv")


def _dictionary(folder: Path) -> None:
    from probes.dictionaries import Dictionary

    found = Dictionary.load(folder)
    repr(found)
    found.decode(found.encode(torch.ones(2, found.width)), torch.ones(2, found.width))


def _lens(folder: Path) -> None:
    from probes.lens import Lens

    repr(Lens.load(folder))


def _probe(folder: Path) -> None:
    from probes.probe import Probe

    found = Probe.load(folder)
    repr(found)
    if found.classes:
        found.steering()


def _eraser(folder: Path) -> None:
    from probes.erasers import LeaceEraser

    found = LeaceEraser.load(folder)
    found(torch.zeros(1, found.width))


def _converters(folder: Path) -> None:
    from workbench.converter_files import load_converters, quality_rows

    found = load_converters(folder)
    quality_rows(found)
    for one in found:
        one.as_dict(), one.to_donor(torch.zeros(1, one.to_donor.d_in))


def _grid(folder: Path) -> None:
    from workbench.transport import TransportGrid

    found = TransportGrid.load(folder)
    repr(found)
    for pair in found.pairs:
        found.cell(*pair)
        if pair in found.operators:
            found.operators[pair]


def _training() -> Any:
    from workbench.adapters.training_state import TrainingState

    torch.manual_seed(0)
    parts = {"resid_post.1": torch.nn.Linear(3, 2)}
    state = TrainingState(parts, torch.optim.Adam([p for part in parts.values() for p in part.parameters()]))
    parts["resid_post.1"](draw(2, 3)).sum().backward()
    state.optimizer.step()
    state.step, state.curve, state.validation = 1, [(1, 0.5, 0.1)], [(1, 0.4)]
    state.best = {name: p.detach().clone() for name, p in state.parameters.items()}
    return state


def _resume(folder: Path) -> None:
    _STATE.setdefault("training", _training()).resume(folder / "a.safetensors", "key")


_STATE: dict[str, Any] = {}


def _run(folder: Path) -> None:
    """What the explorer's lists, the command line and a notebook read of a run."""
    from workbench.catalogue import catalogue
    from workbench.run_comparison import compare_runs
    from workbench.run_progress import run_progress
    from workbench.small_files import read_from
    from workbench.summary import headline, load_metrics, missing

    for entry in catalogue(folder).entries:
        run_progress(entry.path, entry.facts.get("job"))
    metrics = load_metrics(folder)
    with read_from(folder / "metrics.json"):
        missing(metrics), [headline(n, b) for n, b in (metrics.get("behaviours") or {}).items()]
    compare_runs([folder])


def _report(folder: Path) -> None:
    from workbench.report import write_report

    write_report(folder, folder / "report.html")


def _catalogue(folder: Path) -> None:
    """Small files of every kind at once, as they lie in a folder of work."""
    from workbench.catalogue import catalogue
    from workbench.display import show

    entries = catalogue(folder).entries
    for entry in entries:
        repr(entry.facts)
        if entry.kind == "transport":
            from probes.transport_job import command_of, job_of

            command_of(job_of(entry.facts.get("job", {})), folder)
    if not entries:
        show(folder)


def _probe_run(folder: Path) -> None:
    from probes.probe_report import probe_headlines

    for line in probe_headlines(folder):
        assert isinstance(line, str)


def _transport(folder: Path) -> None:
    from probes.transport_report import run_headlines
    from probes.transport_results import load_transport

    found = load_transport(folder)
    found.size_of(0, 1)
    run_headlines(folder)


def _command_v(folder: Path) -> None:
    from workbench.store.command_v import open_command_v

    source = open_command_v(folder / "a.safetensors")
    source.read(0, 2)


def _config(folder: Path) -> None:
    from workbench.checkpoints import folder_of, open_config

    open_config(str(folder), folder_of(str(folder), None))


def _metrics() -> dict[str, Any]:
    from ..metrics_example import metrics

    return metrics()


def _jobs() -> list[bytes]:
    import tomli_w

    from workbench.bundled import located
    from workbench.jobs import Job

    return [located("bundled:demo", "jobs", ".toml").read_bytes(), tomli_w.dumps(Job.load(located("bundled:demo", "jobs", ".toml"))
            .model_dump(exclude_none=True)).encode()]  # fmt: skip


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
        CATALOGUE, {"job.toml": job.encode(), "log.txt": b"a\nb", "steps/a.json": {"seconds": 1.5}, "metrics.json": {"schema": 1}},
        {"transport.toml": b'model = "m"\nprompts = "p"\nsites = ["0", "1"]\nfolds = 4\n'}, {"probe.json": own},
        {"adapter.json": {"base": {"name": "m"}, "name": "n"}}, {"config.json": lens, "params.safetensors": b""},
        {"moments.json": about}, {"manifest.json": {"format": "workbench.store", "schema": 2}}, {"similarity.toml": b'a = "s"\n'},
    )  # fmt: skip


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


TARGETS = {target.name: target for target in (
    Target("store", corpus.STORE, _store, corpus.stores, _sized),
    Target("tables", corpus.STORE, _tables, corpus.stores, _sized, rate=0.3),
    Target("map", ("a.safetensors",), _map, lambda: files(("a.safetensors",), {"a.safetensors": _map_seed()}), named=True),
    Target("moments", MOMENTS, _moments, lambda: files(MOMENTS, corpus.moment_folder()), _hashed),
    Target("grouped", ("groups.json", "0000.safetensors", "0001.safetensors"), _grouped,
           lambda: made(("groups.json", "0000.safetensors", "0001.safetensors"), corpus.grouped)),
    Target("adapter", ADAPTER, _load_adapter, _adapters(ADAPTER)),
    Target("pyreft", corpus.PYREFT, _load_adapter, lambda: made(corpus.PYREFT, corpus.pyreft), rate=0.6),
    Target("bottleneck", BOTTLENECK, _load_adapter, lambda: files(BOTTLENECK, corpus.bottleneck_files())),
    Target("lora", LORA, _lora, lambda: files(LORA, corpus.lora_files())),
    Target("gguf", ("a.gguf",), lambda f: _load_adapter(f, "a.gguf"),
           lambda: files(("a.gguf",), *({"a.gguf": one} for one in corpus.control_vectors())), named=True),
    Target("torch", ("layer_3.pt",), lambda f: _load_adapter(f, "layer_3.pt"),
           lambda: files(("layer_3.pt",), *({"layer_3.pt": one} for one in corpus.torch_files())), rate=0.6, named=True),
    Target("vectors", VECTORS, lambda f: _load_adapter(f, VECTORS[0]), _vector_seeds, named=True),
    Target("job", ("job.toml",), _job, lambda: files(("job.toml",), *({"job.toml": one} for one in _jobs())), named=True),
    Target("prompts-csv", ("a.csv",), _prompts("a.csv"), lambda: files(("a.csv",), {"a.csv": CSV.encode()}), named=True),
    Target("prompts-jsonl", ("a.jsonl",), _prompts("a.jsonl"),
           lambda: files(("a.jsonl",), *({"a.jsonl": _lines(rows)} for rows in (ROWS, CHAT, TURNS))), named=True),
    Target("prompts-json", ("a.json",), _prompts("a.json"),
           lambda: files(("a.json",), *({"a.json": rows} for rows in (ROWS, CHAT, ["a", ["b", "c"]]))), named=True),
    Target("prompts-txt", ("a.txt",), _prompts("a.txt"), lambda: files(("a.txt",), {"a.txt": "one\n\ntwo \u00e9\n".encode()}), named=True),
    Target("prompts-parquet", ("a.parquet",), _prompts("a.parquet"),
           lambda: files(("a.parquet",), *({"a.parquet": corpus.parquet(rows)} for rows in (ROWS, CHAT, TURNS))), rate=0.5, named=True),
    Target("answers", ("a.csv", "a.jsonl"), _answers,
           lambda: files(("a.csv", "a.jsonl"), {"a.jsonl": _lines(ANSWERS)}, {"a.csv": b"prompt,answer,gold\np,4,4\nq,,5\n"}), named=True),
    Target("saelens", SAE, _dictionary, lambda: made(SAE, *(corpus.dictionary(k).save for k in ("relu", "topk", "jumprelu", "gated")))),
    Target("gemma-scope", ("params.npz",), _dictionary, lambda: files(("params.npz",), {"params.npz": corpus.gemma()})),
    Target("dictionary-learning", ("config.json", "ae.pt"), _dictionary,
           lambda: files(("config.json", "ae.pt"), corpus.learned()), rate=0.6),
    Target("lens", LENS, _lens, lambda: files(LENS, *corpus.lens_files())),
    Target("probe", ("probe.json", "probe.safetensors"), _probe, lambda: made(("probe.json", "probe.safetensors"), corpus.probe)),
    Target("eraser", ("eraser.json", "eraser.safetensors"), _eraser,
           lambda: made(("eraser.json", "eraser.safetensors"), corpus.eraser)),
    Target("converters", CONVERTERS, _converters, lambda: made(CONVERTERS, corpus.converters)),
    Target("grid", corpus.GRID, _grid, lambda: made(corpus.GRID, corpus.grid), rate=0.3),
    Target("transport", TRANSPORT, _transport, _transport_seed, rate=0.2),
    Target("training", ("a.safetensors",), _resume,
           lambda: files(("a.safetensors",), {"a.safetensors": corpus.training_checkpoint(_training())}), named=True),
    Target("run", RUN, _run, _run_seeds, rate=0.2),
    Target("report", ("metrics.json",), _report, lambda: files(("metrics.json",), {"metrics.json": _metrics()}), rate=0.02),
    Target("catalogue", CATALOGUE, _catalogue, _catalogue_seeds),
    Target("probe-run", ("metrics.json",), _probe_run, lambda: files(("metrics.json",), {"metrics.json": PROBE_RUN})),
    Target("command-v", ("a.safetensors",), _command_v, lambda: files(("a.safetensors",), {"a.safetensors": _command_v_seed()}), named=True),
    Target("model-config", ("config.json",), _config, lambda: files(("config.json",), *({"config.json": c} for c in CONFIGS)), named=True, rate=0.2),
)}  # fmt: skip
