"""How each kind of outside file is opened, and what of it is then used."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import corpus
from .bundles import Entry
from .corpus import draw
from .target import entry_json


def load_adapter(folder: Path, name: str = "") -> None:
    from workbench.adapters.adapter import Adapter

    found = Adapter.load(folder / name)
    repr(found), found.hash, found.layers
    for term in found.split():
        for site, part in term.parts.items():
            term.delta(site, torch.zeros(2, part.width))


def store(folder: Path) -> None:
    from workbench.store import Store

    with Store.open(folder) as store:
        repr(store)
        for site in store.sites:
            store.read(site, slice(0, 3)), store.read(site, [0, store.n_rows - 1])
        store.verify()


def tables(folder: Path) -> None:
    from workbench.store import Store
    from workbench.store.listing import describe_store

    describe_store(folder)
    with Store.open(folder) as store:
        store.rows(), store.prompts(["id", "text"]), store.rows_of(0), store.prompt_index
        store.prompt_set()


def sized(entries: list[Entry], _: random.Random) -> list[Entry]:
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


def hashed(entries: list[Entry], _: random.Random) -> list[Entry]:
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


def moments(folder: Path) -> None:
    from workbench.profile.sums import load_moments

    for found in load_moments(folder):
        for name in found.names:
            if found.n:
                found.cov(name, name)


def grouped(folder: Path) -> None:
    from workbench.maps.grouped import GroupedMoments

    found = GroupedMoments.load(folder)
    if found.groups:
        found.total()


def linear_map(folder: Path) -> None:
    from workbench.maps import LinearMap

    found = LinearMap.load(folder / "a.safetensors")
    found(torch.zeros(1, found.d_in)), repr(found)


def lora(folder: Path) -> None:
    from workbench.adapters.peft_lora import is_lora, read

    is_lora(folder), repr(read(folder))


def job(folder: Path) -> None:
    from workbench.jobs import Job

    job = Job.load(folder / "job.toml")
    assert Job.parse(toml(job.text)) == job


def toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def prompts(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from workbench.prompts import PromptSet

        for chat in (None, True):
            found = PromptSet.load(folder / name, chat=chat)
            found.hash, repr(found)

    return read


def answers(folder: Path) -> None:
    from workbench.evaluate.answer_files import read_answers

    names = [name for name in ("a.csv", "a.jsonl") if (folder / name).exists()]
    read_answers([folder / name for name in names] or folder / "a.csv")


def dictionary(folder: Path) -> None:
    from probes.dictionaries import Dictionary

    found = Dictionary.load(folder)
    repr(found)
    found.decode(found.encode(torch.ones(2, found.width)), torch.ones(2, found.width))


def lens(folder: Path) -> None:
    from probes.lens import Lens

    repr(Lens.load(folder))


def probe(folder: Path) -> None:
    from probes.probe import Probe

    found = Probe.load(folder)
    repr(found)
    if found.classes:
        found.steering()


def eraser(folder: Path) -> None:
    from probes.erasers import LeaceEraser

    found = LeaceEraser.load(folder)
    found(torch.zeros(1, found.width))


def converters(folder: Path) -> None:
    from workbench.converter_files import load_converters, quality_rows

    found = load_converters(folder)
    quality_rows(found)
    for one in found:
        one.as_dict(), one.to_donor(torch.zeros(1, one.to_donor.d_in))


def grid(folder: Path) -> None:
    from workbench.transport import TransportGrid

    found = TransportGrid.load(folder)
    repr(found)
    for pair in found.pairs:
        found.cell(*pair)
        if pair in found.operators:
            found.operators[pair]


def training() -> Any:
    from workbench.adapters.training_state import TrainingState

    torch.manual_seed(0)
    parts = {"resid_post.1": torch.nn.Linear(3, 2)}
    state = TrainingState(parts, torch.optim.Adam([p for part in parts.values() for p in part.parameters()]))
    parts["resid_post.1"](draw(2, 3)).sum().backward()
    state.optimizer.step()
    state.step, state.curve, state.validation = 1, [(1, 0.5, 0.1)], [(1, 0.4)]
    state.best = {name: p.detach().clone() for name, p in state.parameters.items()}
    return state


def resume(folder: Path) -> None:
    _STATE.setdefault("training", training()).resume(folder / "a.safetensors", "key")


_STATE: dict[str, Any] = {}


def run(folder: Path) -> None:
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


def report(folder: Path) -> None:
    from workbench.report import write_report

    write_report(folder, folder / "report.html")


def catalogue(folder: Path) -> None:
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


def probe_run(folder: Path) -> None:
    from probes.probe_report import probe_headlines

    for line in probe_headlines(folder):
        assert isinstance(line, str)


def transport(folder: Path) -> None:
    from probes.transport_report import run_headlines
    from probes.transport_results import load_transport

    found = load_transport(folder)
    found.size_of(0, 1)
    run_headlines(folder)


def command_v(folder: Path) -> None:
    from workbench.store.command_v import open_command_v

    source = open_command_v(folder / "a.safetensors")
    source.read(0, 2)


def config(folder: Path) -> None:
    from workbench.checkpoints import folder_of, open_config

    open_config(str(folder), folder_of(str(folder), None))
