"""The dictionaries that come with the project: small, honest about their quality, and made by a training that finds what
was planted."""

from __future__ import annotations

import json

import pytest
import torch

from data.build.dictionaries import LAYERS, Recipe, train, unit_decoder
from probes.dictionaries import Dictionary
from probes.feature_tokens import top_tokens
from probes.features import store_batches
from probes.verdicts import feature_verdicts
from tests.conftest import ROOT
from workbench.maps.fit import fit_ridge
from workbench.models import load
from workbench.profile import profile_model
from workbench.prompts import PromptSet

FOLDER = ROOT / "data" / "dictionaries"


def test_they_are_small_and_load_by_name():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 1.5e6
    assert {p.name for p in FOLDER.iterdir()} == {f"recipient.resid_post.{layer}" for layer in LAYERS}
    for layer in LAYERS:
        found = Dictionary.load(f"bundled:recipient.resid_post.{layer}")
        assert (found.site, found.model, found.width) == (f"resid_post.{layer}", "bundled:recipient", 128)
        torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(found.n_features), atol=1e-3, rtol=0)


def test_their_recorded_quality_is_found_again():
    """On prompts of the profile instead of the held-out sequences: near what is recorded, and far above nothing."""
    model = load("bundled:recipient")
    prompts = PromptSet.load("bundled:profile")[:60]
    with profile_model(model, prompts, sites=list(LAYERS), tokens="all") as store:
        for layer in LAYERS:
            d = Dictionary.load(f"bundled:recipient.resid_post.{layer}")
            assert d.meta["model_fingerprint"]
            h, told = store.read(layer), d.meta["quality"]
            a = d.encode(h)
            explained = 1 - float((h - d.decode(a)).square().sum() / (h - h.mean(0)).square().sum())
            assert told["variance_explained"]["value"] > 0.9
            assert abs(explained - told["variance_explained"]["value"]) < 0.05
            assert abs(float((a > 0).sum(1).double().mean()) - told["l0"]["value"]) < 4
            for name in ("variance_explained", "l0", "dead_share", "loss_recovered"):
                figure = told[name]
                assert figure["low"] <= figure["value"] <= figure["high"], name
        d = Dictionary.load("bundled:recipient.resid_post.2")
        named = top_tokens(d, store, 5)
        assert len(named.names) == d.n_features
        assert sum(name != "(silent)" for name in named.names) > d.n_features / 2
        operator = fit_ridge(store.read(1), store.read(2), alpha=1e-3, groups=store.prompt_index).map
        verdicts = feature_verdicts(operator, d, store_batches(store, 1, 2))
        assert verdicts.counts["transported"] > 0


def planted(n: int = 6000, d: int = 16, f: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(f, d, generator=g), dim=1)
    on = torch.rand(n, f, generator=g) < 0.06
    return (on * (1 + torch.rand(n, f, generator=g))) @ words + 0.5, words


def test_the_training_finds_planted_directions_twice_alike():
    rows, words = planted()
    recipe = Recipe(layer=0, features=32, k=2, steps=400, batch=256, peak=5e-3)
    once, again = (unit_decoder(train(rows, recipe, log=lambda _: None)) for _ in range(2))
    assert once == again
    best = (words @ once.W_dec.T).amax(1)
    assert float((best > 0.9).double().mean()) > 0.8
    left = (rows - once(rows)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert float(left) < 0.15


@pytest.mark.parametrize("layer", LAYERS)
def test_they_are_in_the_format_of_saelens(layer):
    folder = FOLDER / f"recipient.resid_post.{layer}"
    assert {p.name for p in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu"
    assert cfg["metadata"]["hook_name"] == f"blocks.{layer}.hook_resid_post"
