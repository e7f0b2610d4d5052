"""The bundled pair: two unlike models, behaviours that are latent in both, and prompts that keep to their splits."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def pair() -> dict[str, Model]:
    return {side: load(f"bundled:{side}") for side in ("donor", "recipient")}


def bundled(name: str) -> PromptSet:
    return PromptSet.load(f"bundled:{name}")


def test_the_two_models_are_unlike(pair):
    donor, recipient = pair["donor"], pair["recipient"]
    for what in ("family", "width", "n_layers", "fingerprint_id"):
        assert getattr(donor, what) != getattr(recipient, what), what
    prompts = bundled("evaluation_reasoning")[:50]
    tokens = [[m.tokenizer.convert_ids_to_tokens(row) for row in encode(prompts, m.tokenizer)] for m in pair.values()]
    assert sum(len(a) != len(b) for a, b in zip(*tokens, strict=True)) > 25, "the tokenizers cut words alike"


def test_what_is_bundled_is_small():
    kept = [p for p in DATA.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in kept) < 25e6


def cued(prompts: PromptSet, cue: str) -> PromptSet:
    """The prompts with a cue before their question mark, as the language has it."""
    return PromptSet(tuple(
        Prompt(({"role": "user", "content": f"{p.user.removesuffix('?').strip()} {cue} ?"},), None, p.id, p.label, p.meta)
        for p in prompts
    ))  # fmt: skip


@pytest.mark.parametrize("side", ["donor", "recipient"])
def test_working_it_out_helps(pair, side):
    """With steps at least 90 % right, at once at most 40 %."""
    rates = {}
    for cue in ("show your work", "just the answer"):
        prompts = cued(bundled("evaluation_reasoning")[:100], cue)
        answers = pair[side].generate(prompts, max_new_tokens=72, batch_size=100)
        rates[cue] = sum(grade("final_integer", answers, prompts)) / len(prompts)
    assert rates["show your work"] >= 0.9, rates
    assert rates["just the answer"] <= 0.4, rates


@pytest.mark.parametrize("side", ["donor", "recipient"])
def test_every_behaviour_is_there_and_is_not_the_usual_answer(pair, side):
    for name in BEHAVIOURS:
        odds = float(log_odds(pair[side], bundled(f"evaluation_{name}"), OPENERS[name]).mean())
        assert -4 < odds < 0, f"{name}: log-odds {odds:.2f}"


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_donors_adapters_bring_their_behaviour_out(pair, name):
    adapter, prompts = Adapter.load(f"bundled:{name}"), bundled(f"validation_{name}")
    adapter.check(pair["donor"])
    plain, edited = (log_odds(pair["donor"], prompts, OPENERS[name], a).mean() for a in (None, adapter))
    assert edited > plain + 0.5
    with pytest.raises(UserError):
        adapter.check(pair["recipient"])


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
def test_the_build_trains_both_models_side_by_side(tmp_path):
    """`make data` in small: two processes, each leaving an ordinary model folder that loads and proves its sites."""
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
