"""The page of lenses: plain, tuned, with a paste; what is missing, damaged or not allowed; and text that is no markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from probes.lens import Lens, translated_sites
from workbench.adapters.adapter import vector
from workbench.catalogue import catalogue
from workbench.maps.linear_map import LinearMap
from workbench.models import Model, load
from workbench.sites import Site

from ..metrics_example import EVIL
from .conftest import as_markup, charts, run_snippets, words

MODEL = "bundled:recipient"
PROMPT = "the toy of the queen"


@pytest.fixture(scope="module")
def model() -> Model:
    return load(MODEL, device="cpu")


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lens and an adapter of the bundled recipient, and one of each that is not."""
    made = tmp_path_factory.mktemp("lenses")
    shift = torch.linspace(-1, 1, model.width)
    figures = [{"site": "resid_post.0", "layer": "0", **{f"kl_{lens}{end}": 0.5 for lens in ("logit", "start", "tuned")
                for end in ("", "_low", "_high")}}]  # fmt: skip
    lens = Lens("tuned", {site: LinearMap(torch.zeros(model.width, model.width), shift) for site in translated_sites(model)},
                model.fingerprint, {"figures": figures})  # fmt: skip
    lens.save(made / "lens", model)
    vector(Site(1), 5 * shift, base=model.fingerprint, name=EVIL).save(made / "mine")
    vector(Site(1), 5 * shift, base={"name": "other", "weights": "0"}).save(made / "other")
    return made


def options(page, key: str) -> list[str]:
    return next(list(one.options) for one in page.selectbox if one.key == key)


def test_the_logit_lens_of_a_prompt_needs_nothing_but_a_model(open_page, tmp_path):
    page = open_page("lens", tmp_path, model=MODEL, text=PROMPT)
    assert not page.exception
    assert options(page, "layer") == ["3", "2", "1", "0", "embeddings"]
    assert f"workbench lens {MODEL} --fit --prompts FILE --out {tmp_path}/lens" in words(page)
    assert "No adapter in the opened folder belongs to this model" in words(page).replace("\\", "")
    assert run_snippets(page) == 4


def test_a_tuned_lens_and_a_paste_of_the_model_are_offered_and_compared(open_page, folder):
    page = open_page("lens", folder, model=MODEL, lens="lens", adapter="mine", text=PROMPT, layer="1", at="3",
                     colour="rank of the answer")  # fmt: skip
    assert not page.exception
    assert options(page, "lens") == ["logit lens", "lens"]
    assert options(page, "adapter") == ["none", "mine"]
    assert "refused" not in words(page)
    assert run_snippets(page) == 7


def test_a_folder_of_tuned_lens_is_offered_for_the_model_that_it_names(open_page, model, tmp_path):
    """Its params.pt is an archive of tensors, of which tensors alone are read."""
    width = model.width
    config = {"base_model_name_or_path": MODEL, "d_model": width, "num_hidden_layers": model.n_layers, "bias": True}
    for name, base in (("tuned", MODEL), ("elsewhere", f"somebody/{EVIL}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        params = {f"{i}.{part}": torch.zeros((width, width) if part == "weight" else width)
                  for i in range(model.n_layers) for part in ("weight", "bias")}  # fmt: skip
        torch.save(params, tmp_path / name / "params.pt")
    page = open_page("lens", tmp_path, model=MODEL, lens="tuned", text=PROMPT)
    assert not page.exception
    assert options(page, "lens") == ["logit lens", "tuned"]
    assert f"Left out: 1 of somebody/{EVIL}" in words(page).replace("\\", "")
    assert not as_markup(page, EVIL)
    assert f"Lens.load({str(tmp_path / 'tuned')!r})" in words(page)
    assert len(charts(page)) == 4
    assert "saved without figures of its own" in words(page).replace("\\", "")


def test_a_link_that_asks_for_what_is_not_there_is_refused_in_words(open_page, folder):
    page = open_page(
        "lens", folder, model="bundled:donor", lens="../x", layer="77", at="10000", colour="magic", text=PROMPT
    )
    assert not page.exception
    for asked in ("lens '../x'", "layer '77'", "at '10000'", "colour 'magic'"):
        assert f"the link asks for {asked}, which is not there; it was refused" in words(page)
    elsewhere = open_page("lens", folder, model="/etc/model", text=PROMPT)
    assert not elsewhere.exception
    assert "the link asks for model '/etc/model', which is not there; it was refused" in words(elsewhere)
    assert options(elsewhere, "model") == ["bundled:recipient", "bundled:donor"]


def test_without_a_prompt_the_page_asks_for_one(open_page, folder):
    page = open_page("lens", folder, model=MODEL)
    page.text_area[0].set_value("  ").run()
    assert not page.exception
    assert "No prompt: type one above" in words(page)
    assert charts(page) == []


def test_a_damaged_lens_is_one_line(open_page, model, tmp_path):
    tmp_path = tmp_path / "deeper"  # the parent is opened later: what a folder holds is kept for some seconds
    Lens("tuned", {}, model.fingerprint).save(tmp_path / "cut", model)
    (tmp_path / "cut" / "params.safetensors").write_bytes(b"x")
    page = open_page("lens", tmp_path, model=MODEL, lens="cut", text=PROMPT)
    assert not page.exception
    assert "cannot be read as safetensors" in words(page)
    (tmp_path / "cut" / "config.json").write_text("{")
    assert [(e.kind, e.state) for e in catalogue(tmp_path).entries] == [("lens", "damaged")]
    said = words(open_page("lens", tmp_path.parent, model=MODEL, text=PROMPT))
    assert "config.json cannot be read" in said


def test_damage_in_the_small_print_of_a_lens_is_one_line_too(open_page, model, tmp_path):
    Lens("tuned", {}, {**model.fingerprint, "revision": "x"}, {"figures": [{"site": 1}]}).save(tmp_path / "odd", model)
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    config["workbench"]["base"]["name"] = 5
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    page = open_page("lens", tmp_path, model=MODEL, lens="odd", text=PROMPT)
    assert not page.exception
    assert "the figures that this lens was saved with cannot be read" in words(page)


def test_a_prompt_that_is_too_long_is_one_line(open_page, tmp_path):
    page = open_page("lens", tmp_path, model=MODEL, text="the toy " * 300)
    assert not page.exception
    assert "tokens and bundled:recipient reads 256" in words(page)


@pytest.mark.parametrize("evil", ["<script>alert(1)</script> [x](javascript:1) **b** \u202eolleh", "x" * 10_000 + " <b>"],
                         ids=["markup", "long"])  # fmt: skip
def test_text_of_others_is_no_markup(open_page, tmp_path, evil):
    page = open_page("lens", tmp_path, model=MODEL, text=evil[:200])
    assert not page.exception
    assert not as_markup(page, "<script>", "javascript:1)", "<b>", "**b**")


def test_a_prompt_of_a_store_is_read(open_page, model, tmp_path):
    from workbench.profile import profile_model

    profile_model(model, [{"text": "the toy"}, {"text": f"the queen {EVIL}"}], tmp_path / "s", sites=[0])
    page = open_page("lens", tmp_path, model=MODEL, **{"from": "s", "prompt": "1"})
    assert not page.exception
    assert json.dumps({"text": f"the queen {EVIL}"}, ensure_ascii=False)[:30] in words(page)
    assert run_snippets(page) == 4
