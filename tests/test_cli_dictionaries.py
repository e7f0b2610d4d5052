"""`workbench transport --dictionary` as a user of some model meets it: every format, and every way in which one is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from probes.dictionaries import Dictionary

from .conftest import LAYERS, WIDTH, make_module, save_folder
from .test_cli import good, told, workbench

F = 24


def dictionary(width: int = WIDTH, site: str | None = "resid_post.1", model: str = "") -> Dictionary:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(F, width, generator=g) / width**0.5
    return Dictionary(w.T.contiguous(), torch.zeros(F), w, torch.zeros(width), "jumprelu", threshold=torch.full((F,), 0.1),
                      site=site, model=model)  # fmt: skip


def saelens(folder: Path, **options: Any) -> Path:
    dictionary(**options).save(folder)
    return folder


def gemma(folder: Path, layer: int = 1, kind: str = "res", **options: Any) -> Path:
    folder = folder / f"gemma-scope-2b-pt-{kind}" / f"layer_{layer}" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in dictionary(**options).tensors.items()})
    return folder


def learning(folder: Path, layer: int | None = 1, lm_name: str = "", **options: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(dictionary(**options).tensors, folder / "ae.pt")
    trainer = {"dict_class": "JumpReluAutoEncoder", "lm_name": lm_name, "layer": layer}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("dictionaries")
    for family in ("llama", "gpt2", "gemma2"):
        save_folder(make_module(family), home / family)
    lines = (" ".join(f"w{(7 * i + 11 * j + i * j) % 170}" for j in range(12)) + "\n" for i in range(60))
    (home / "prompts.txt").write_text("".join(lines))
    return home


def line(home: Path, out: Path, *more: Any, family: str = "llama") -> tuple[Any, ...]:
    return ("transport", home / family, "--prompts", home / "prompts.txt", "--pairs", "0:1,0:2", "--alpha", "0.1",
            "--folds", 2, "--shards", 2, "--causal", "none", "--out", out, *more)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "write"),
    [("llama", saelens), ("gpt2", learning), ("gemma2", gemma)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_each_format_is_read_at_its_site(home, tmp_path, family, write):
    good(*line(home, tmp_path / "run", "--dictionary", write(tmp_path / "d"), family=family))
    table = pd.read_parquet(tmp_path / "run" / "features.parquet")
    assert set(zip(table["source"], table["target"], strict=True)) == {("resid_post.0", "resid_post.1")}
    assert len(table) == F
    assert table["count"].sum() > 0


def test_a_site_can_be_said_and_what_goes_into_a_block_is_what_came_out_before(home, tmp_path):
    nameless = saelens(tmp_path / "nameless", site=None)
    good(*line(home, tmp_path / "run", "--dictionary", f"resid_post.2={nameless}"))
    assert set(pd.read_parquet(tmp_path / "run" / "features.parquet")["target"]) == {"resid_post.2"}
    before = saelens(tmp_path / "before", site="resid_pre.2")
    good(*line(home, tmp_path / "run", "--dictionary", before))
    assert set(pd.read_parquet(tmp_path / "run" / "features.parquet")["target"]) == {"resid_post.1"}


def test_a_dictionary_of_another_model_is_used_and_told(home, tmp_path):
    for write, options, name in ((saelens, {"model": "gpt2-small"}, "gpt2-small"),
                                 (learning, {"lm_name": "EleutherAI/pythia-70m"}, "EleutherAI/pythia-70m"),
                                 (gemma, {}, "google/gemma-2-2b")):  # fmt: skip
        folder = write(tmp_path / write.__name__, **options)
        result = good(*line(home, tmp_path / "run", "--dictionary", folder))
        assert f"warning: the dictionary at resid_post.1 says that it was trained on {name}" in result.stderr
    same = saelens(tmp_path / "same", model="owner/Llama")
    assert "was trained on" not in good(*line(home, tmp_path / "run", "--dictionary", same)).stderr


@pytest.mark.parametrize(
    ("write", "options", "words"),
    [
        (saelens, {"width": 40}, "reads width 40; resid_post.1 of"),
        (gemma, {"width": 40}, "reads width 40; resid_post.1 of"),
        (learning, {"width": 40}, "reads width 40; resid_post.1 of"),
        (saelens, {"site": f"resid_post.{LAYERS}"}, "layer 3 is out of range: the model has layers 0 to 2"),
        (gemma, {"layer": 20}, "layer 20 is out of range: the model has layers 0 to 2"),
        (learning, {"layer": 20}, "layer 20 is out of range: the model has layers 0 to 2"),
        (saelens, {"site": "resid_post.0"}, "belongs to resid_post.0, to which no pair leads; targets: resid_post.1, "),
        (saelens, {"site": "mlp_out.1"}, "belongs to mlp_out.1, to which no pair leads"),
        (gemma, {"kind": "mlp"}, "belongs to mlp_out.1, to which no pair leads"),
        (gemma, {"kind": "att"}, "does not say which site it belongs to; give the site before it"),
        (learning, {"layer": None}, "does not say which site it belongs to; give the site before it"),
        (saelens, {"site": None}, "does not say which site it belongs to; give the site before it"),
    ],
)
def test_what_does_not_fit_is_told_before_the_work(home, tmp_path, write, options, words):
    folder = write(tmp_path / "d", **options)
    told(workbench(*line(home, tmp_path / "run", "--dictionary", folder)), f"dictionary {folder}", words)
    assert not (tmp_path / "run").exists()


def test_a_place_that_is_no_site_is_named(home, tmp_path):
    folder = saelens(tmp_path / "d")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "blocks.1.attn.hook_z"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    told(
        workbench(*line(home, tmp_path / "run", "--dictionary", folder)),
        "belongs to blocks.1.attn.hook_z, which is no site",
    )


def test_dictionaries_that_get_in_each_others_way(home, tmp_path):
    one, two = saelens(tmp_path / "one"), saelens(tmp_path / "two")
    told(
        workbench(*line(home, tmp_path / "run", "--dictionary", f"{one},{two}")),
        "both belong to resid_post.1; give one",
    )
    told(workbench(*line(home, tmp_path / "run", "--dictionary", one, "--grid-only")), "grid_only measures no features")
    told(workbench(*line(home, tmp_path / "run", "--dictionary", tmp_path / "none")), "no such file or folder")
    (tmp_path / "empty").mkdir()
    told(
        workbench(*line(home, tmp_path / "run", "--dictionary", tmp_path / "empty")),
        "holds none of sae_weights.safetensors",
    )
    (one / "cfg.json").unlink()
    told(workbench(*line(home, tmp_path / "run", "--dictionary", one)), "cfg.json cannot be read")
    (two / "sae_weights.safetensors").write_bytes((two / "sae_weights.safetensors").read_bytes()[:200])
    told(workbench(*line(home, tmp_path / "run", "--dictionary", two)), "cannot be read as safetensors")


def test_ones_own_dictionary_takes_the_place_of_a_bundled_one(tmp_path):
    own = Dictionary.load("bundled:recipient.resid_post.1").select(range(10))
    own.save(tmp_path / "own")
    good("transport", "bundled:recipient", "--prompts", "bundled:profile", "--limit", 80, "--folds", 2, "--shards", 2,
         "--dtype", "float32", "--layers", "0,1", "--alpha", "0.1", "--causal", "none", "--dictionary", tmp_path / "own",
         "--out", tmp_path / "run")  # fmt: skip
    assert len(pd.read_parquet(tmp_path / "run" / "features.parquet")) == 10
