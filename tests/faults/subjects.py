"""What faults are tried on: each verb that writes, as small as it can be, on random models. Its steps are not listed here:
they are what an undisturbed run of it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .children import fork

OUT = "made"  # the name of what a verb makes


@dataclass(frozen=True)
class Subject:
    """A command line, by the folder that holds its inputs and the one that it writes into."""

    name: str
    line: Callable[[Path, Path], list[Any]]
    locks: bool = False
    """whether a second writer of the same place is turned away"""
    engine: bool = False
    """whether its work can be spread over workers"""


SUBJECTS = {
    one.name: one
    for one in (
        Subject("run", lambda home, to: ["run", home / "job.toml", "--out", to], locks=True, engine=True),
        Subject("transport", lambda home, to: [
            "transport", home / "llama", "--prompts", home / "texts.jsonl", "--pairs", "0:1,0:2", "--folds", 2, "--shards", 2,
            "--alpha", 0.1, "--causal", "0:1", "--out", to / OUT], locks=True,
            engine=True),
        Subject("profile", lambda home, to: [
            "profile", home / "llama", "--prompts", home / "profile.jsonl", "--batch-tokens", 64, "--out", to / OUT],
            locks=True, engine=True),
        Subject("moments", lambda home, to: [
            "profile", home / "llama", "--prompts", home / "profile.jsonl", "--moments", "--folds", 2, "--out", to / OUT],
            locks=True, engine=True),
        Subject("train", lambda home, to: [
            "train", home / "llama", "--demonstrations", home / "shown.jsonl", "--steps", 3, "--batch-size", 8, "--out",
            to / OUT]),
        Subject("convert", lambda home, to: [
            "convert", home / "stores" / "llama", home / "stores" / "gpt2", "--donor-layers", "1", "--out", to / OUT]),
        Subject("convert models", lambda home, to: [
            "convert", home / "llama", home / "gpt2", "--prompts", home / "profile.jsonl", "--out", to / OUT], engine=True),
        Subject("similarity", lambda home, to: [
            "similarity", home / "stores" / "llama", home / "stores" / "gpt2", "--measures", "cka", "--permutations", 2,
            "--out", to / OUT]),
        Subject("probe", lambda home, to: [
            "probe", home / "stores" / "llama", "--label", "kind", "--kind", "ridge", "--layers", "1", "--no-controls",
            "--out", to / OUT]),
        Subject("geometry", lambda home, to: [
            "geometry", home / "llama", "--prompts", home / "texts.jsonl", "--limit", 4, "--layers", "1", "--lengths", "1",
            "--out", to / OUT]),
        Subject("depth", lambda home, to: [
            "depth", home / "llama", "--prompts", home / "texts.jsonl", "--limit", 4, "--effects", "none", "--no-attention",
            "--out", to / OUT]),
        Subject("lens", lambda home, to: [
            "lens", home / "llama", "--fit", "--prompts", home / "texts.jsonl", "--epochs", 0, "--alpha", 0.1, "--out",
            to / OUT]),
        Subject("fold", lambda home, to: [
            "fold", home / "gpt2", "--prompts", home / "texts.jsonl", "--thetas", "", "--alpha", 0.1, "--out", to / OUT]),
        Subject("paste", lambda home, to: [
            "paste", home / "given" / "train" / OUT, home / "given" / "convert" / OUT, "--out", to / OUT]),
        Subject("forecast", lambda home, to: [
            "forecast", home / "given" / "train" / OUT, home / "stores" / "llama", home / "stores" / "gpt2", "--prompts",
            home / "texts.jsonl", "--opener", "w7", "--method", "ridge:0.1", "--limit", 6, "--out", to / OUT]),
        Subject("adapters export", lambda home, to: [
            "adapters", "export", home / "given" / "train" / OUT, "--to", "pyreft", "--out", to / OUT]),
        Subject("grade", lambda home, to: [
            "grade", home / "answers.jsonl", "--grader", "starts_with", "--arg", 'openers=["w7"]', "--out",
            to / f"{OUT}.jsonl"]),
        Subject("stores merge", lambda home, to: [
            "stores", "merge", home / "stores" / "llama", home / "stores" / "more", "--out", to / OUT]),
        Subject("stores export", lambda home, to: [
            "stores", "export", home / "stores" / "llama", "--to", "numpy", "--out", to / OUT]),
        Subject("stores fetch", lambda home, to: [
            "stores", "fetch", (home / "stores" / "llama").as_uri(), to / OUT]),
    )
}  # fmt: skip


def prepare(home: Path) -> None:
    """Models, prompts, stores, answers and a job, for all subjects."""
    from tests.conftest import make_module, save_folder
    from workbench.models import load
    from workbench.profile import profile_model

    def texts(n: int, seed: int, words: int = 4) -> list[str]:
        return [" ".join(f"w{(seed + 7 * i + 11 * j + i * j) % 150}" for j in range(2 + (i + seed) % words))
                for i in range(n)]  # fmt: skip

    def write(name: str, lines: list[dict[str, Any]]) -> str:
        (home / f"{name}.jsonl").write_text(
            "".join(json.dumps({"id": str(i), **x}) + "\n" for i, x in enumerate(lines))
        )
        return str(home / f"{name}.jsonl")

    save_folder(make_module("llama"), home / "llama")
    save_folder(make_module("gpt2", seed=1), home / "gpt2")
    profiled = write("profile", [{"prompt": p, "kind": "ab"[i % 2]} for i, p in enumerate(texts(60, 0))])
    neutral = write("texts", [{"text": p} for p in texts(24, 5, 8)])
    behaviours = [{
        "name": "counting", "openers": ["w7"], "grader": "starts_with", "grader_args": {"openers": ["w7"]},
        "demonstrations": write("shown", [{"prompt": p, "response": "w7 w1"} for p in texts(16, 1)]),
        "validation": write("validation", [{"prompt": p} for p in texts(6, 20)]),
        "evaluation": write("evaluation", [{"prompt": p} for p in texts(6, 40)]),
    }]  # fmt: skip
    job = {
        "name": OUT, "seed": 3, "donor": {"model": str(home / "llama")}, "recipient": {"model": str(home / "gpt2")},
        "profile": {"prompts": profiled}, "training": {"steps": 3, "batch_size": 8, "rank": 2}, "paste": {"alphas": [0.1]},
        "evaluate": {"neutral_text": neutral, "validation_text": neutral, "draws": 1, "rate_draws": 1, "dose": [0.5],
                     "max_new_tokens": 3},
        "behaviours": behaviours,
    }  # fmt: skip
    import tomli_w

    (home / "job.toml").write_text(tomli_w.dumps(job))
    for name in ("llama", "gpt2"):
        profile_model(load(home / name), profiled, home / "stores" / name)
    others = write("others", [{"prompt": f"{p} w151"} for p in texts(20, 60)])
    profile_model(load(home / "llama"), others, home / "stores" / "more")
    write("answers", [{"prompt": p, "answer": f"w{7 + i % 2} w1"} for i, p in enumerate(texts(8, 70))])


def prepare_given(home: Path) -> None:
    """An adapter and converters, for those that take one. It forks, as `tried` does: of a process of one thread."""
    for name, more in (("train", ("--layers", "1")), ("convert", ())):
        (to := home / "given" / name).mkdir(parents=True)
        if (ended := fork([*SUBJECTS[name].line(home, to), *more])).code:
            raise RuntimeError(f"{name}: {ended.said}")
