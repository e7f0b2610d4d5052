"""The bundled models: three unlike ones, behaviours that are latent in all, and prompts that keep to their splits."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.build import prompts as built
from data.build.language import BEHAVIOURS, split_of
from workbench.adapters.adapter import Adapter
from workbench.bundled import bundled_path, located
from workbench.errors import UserError
from workbench.evaluate.behaviour import log_odds
from workbench.evaluate.graders import grade
from workbench.job_options import open_job
from workbench.models import Model, load
from workbench.prompts import Prompt, PromptSet, encode

from .conftest import ROOT

OPENERS = {b.name: b.openers for b in open_job("bundled:demo").behaviours}
DATA = ROOT / "data"
MODELS = ("donor", "recipient", "outsider")


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: load(f"bundled:{name}") for name in MODELS}


def bundled(name: str) -> PromptSet:
    return PromptSet.load(f"bundled:{name}")


def test_no_two_models_are_alike(models):
    for what in ("family", "width", "n_layers", "fingerprint_id"):
        assert len({getattr(model, what) for model in models.values()}) == len(models), what
    prompts = bundled("evaluation_reasoning")[:50]
    tokens = [[m.tokenizer.convert_ids_to_tokens(row) for row in encode(prompts, m.tokenizer)] for m in models.values()]
    for one, other in itertools.combinations(tokens, 2):
        assert sum(len(a) != len(b) for a, b in zip(one, other, strict=True)) > 25, "the tokenizers cut words alike"


def test_what_is_bundled_is_small():
    kept = [p for p in DATA.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in kept) < 25e6


def cued(prompts: PromptSet, cue: str) -> PromptSet:
    """The prompts with a cue before their question mark, as the language has it."""
    return PromptSet(tuple(
        Prompt(({"role": "user", "content": f"{p.user.removesuffix('?').strip()} {cue} ?"},), None, p.id, p.label, p.meta)
        for p in prompts
    ))  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_working_it_out_helps(models, name):
    """With steps at least 90 % right, at once at most 40 %."""
    rates = {}
    for cue in ("show your work", "just the answer"):
        prompts = cued(bundled("evaluation_reasoning")[:100], cue)
        answers = models[name].generate(prompts, max_new_tokens=72, batch_size=100)
        rates[cue] = sum(grade("final_integer", answers, prompts)) / len(prompts)
    assert rates["show your work"] >= 0.9, rates
    assert rates["just the answer"] <= 0.4, rates


@pytest.mark.parametrize("name", MODELS)
def test_every_behaviour_is_there_and_is_not_the_usual_answer(models, name):
    for behaviour, openers in OPENERS.items():
        odds = float(log_odds(models[name], bundled(f"evaluation_{behaviour}"), openers).mean())
        assert -4 < odds < 0, f"{behaviour}: log-odds {odds:.2f}"


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_donors_adapters_bring_their_behaviour_out(models, name):
    adapter, prompts = Adapter.load(f"bundled:{name}"), bundled(f"validation_{name}")
    adapter.check(models["donor"])
    plain, edited = (log_odds(models["donor"], prompts, OPENERS[name], a).mean() for a in (None, adapter))
    assert edited > plain + 0.5
    with pytest.raises(UserError):
        adapter.check(models["recipient"])


def contents(file: Path) -> list[tuple[str, str]]:
    """(kind, content) of each prompt: what decides the split, cleared of asks and cues."""
    return [content_of(json.loads(line)) for line in file.read_text().splitlines()]


def content_of(line: dict) -> tuple[str, str]:
    text = line["text"] if "text" in line else line["messages"][0]["content"]
    return (line["label"], text) if line["label"] == "plain" else (line["label"], key_in(line["label"], text))


def key_in(kind: str, text: str) -> str:
    """The content inside a prompt, without the words of asks and cues: what the language hashes to choose a split."""
    if kind == "reasoning":
        return " ".join(w for w in text.split() if w in ("plus", "minus") or w.isdigit())
    from data.build.language import CREATURES, DEEDS, LOOKS, OBJECTS

    words = text.replace("?", " ").replace(",", " ").split()
    if kind == "refusal":
        start = next(i for i, w in enumerate(words) if w in DEEDS and "the" in words[i + 1 : i + 2])
        end = next(i for i in range(start, len(words)) if words[i] in OBJECTS)
        owner = words[end + 1 : end + 4]
        return " ".join(words[start : end + 1] + owner)
    start = next(i for i, w in enumerate(words) if w in LOOKS)
    end = next(i for i in range(start, len(words)) if words[i] in CREATURES)
    return " ".join(words[start - 1 : end + 4])  # the ... of an owner of two words


def test_the_splits_share_no_content():
    files = {p.stem: set(contents(p)) for p in sorted((DATA / "prompts").glob("*.jsonl"))}
    evaluation = set().union(*(found for name, found in files.items() if name.startswith("evaluation")))
    validation = set().union(*(found for name, found in files.items() if name.startswith("validation")))
    trained = set().union(
        *(found for name, found in files.items() if name.split("_")[0] in ("profile", "demonstrations"))
    )
    assert len(evaluation) > 1000
    assert not evaluation & trained
    assert not evaluation & validation
    assert not validation & trained
    for split, found in (("evaluation", evaluation), ("validation", validation)):
        assert {split_of(key) for kind, key in found if kind != "plain"} == {split}


def test_there_are_enough_prompts_and_no_two_are_alike():
    for name in BEHAVIOURS:
        assert len(bundled(f"evaluation_{name}")) >= 300
        for split in ("validation", "evaluation"):
            users = [p.user for p in bundled(f"{split}_{name}")]
            assert len(set(users)) == len(users)


def test_the_prompts_are_made_again_to_the_byte(tmp_path):
    built.build(tmp_path)
    made = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert made == {p.name: p.read_bytes() for p in (DATA / "prompts").glob("*.jsonl")}


def test_a_bundled_name_is_found_and_another_is_told():
    assert located("bundled:demo", "jobs", ".toml") == bundled_path("bundled:demo", "jobs", ".toml")
    assert located("some/folder", "adapters") == Path("some/folder")
    assert located("~/x", "adapters") == Path.home() / "x"
    for wrong in ("bundled:nonsense", "bundled:../models"):
        with pytest.raises(UserError, match=r"not bundled; allowed: .*bundled:refusal"):
            Adapter.load(wrong)


@pytest.mark.slow
def test_the_build_trains_the_models_side_by_side(tmp_path):
    """`make data` in small: a process each, each leaving an ordinary model folder that loads and proves its sites."""
    shutil.copytree(ROOT / "data" / "build", tmp_path / "data" / "build")
    (tmp_path / "data" / "__init__.py").touch()
    recipes = tmp_path / "data" / "build" / "train.py"
    text = re.sub(r"steps=\d+", "steps=2", recipes.read_text()).replace("batch: int = 96", "batch: int = 8")
    recipes.write_text(text)
    subprocess.run(
        [sys.executable, "-m", "data.build", "models"], cwd=tmp_path, check=True, capture_output=True, timeout=300
    )
    assert load(tmp_path / "data" / "models" / "donor").family == "llama"
    assert load(tmp_path / "data" / "models" / "recipient").family == "gpt2"
    assert load(tmp_path / "data" / "models" / "outsider").family == "gpt_neox"
