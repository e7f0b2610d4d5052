"""The page of probes: nothing there, small, damaged, a model that may not be loaded, and a direction saved when asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ui.pages.probes.parts import checked_name
from workbench.adapters import Adapter
from workbench.errors import UserError
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.sites import Site

from ..probes.labelled import planted, write_labelled
from .conftest import as_markup, run_snippets, words

OF_FOLDER = "an adapter of the folder"
MARKUP = ("script>", "](java", "**b**")
EVIL = "<script>alert(1)</script> [x](javascript:1) **b** \u202eabc"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a model that nobody named, whose labels and tokens are hostile."""
    home = tmp_path_factory.mktemp("work")
    x, y, _ = planted(200, 6, gap=4.0)
    x, label = x.repeat_interleave(2, 0), [(EVIL, "plain")[int(i)] for i in y]
    meta = [{"kind": EVIL if i % 3 else "k", "[m](javascript:1)": "a", "n": i % 2} for i in range(200)]
    values = {Site(0): torch.randn(400, 6, generator=torch.Generator().manual_seed(3)), Site(1): x}
    texts = [("\u202e" + "x" * 10_000, EVIL, " plus")[i % 3] for i in range(400)]
    write_labelled(home / "a", values, prompt=[i // 2 for i in range(400)], label=label, meta=meta, texts=texts,
                   contents=[f"{EVIL} {i}" for i in range(200)])  # fmt: skip
    return home


@pytest.fixture(scope="module")
def recipient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the bundled recipient, with requests that it refuses and others."""
    from workbench.models import load

    home = tmp_path_factory.mktemp("recipient")
    prompts = PromptSet.load("bundled:profile", limit=60)
    profile_model(load("bundled:recipient", device="cpu"), prompts, home / "s", sites=[0, 2], tokens="last")
    return home


def test_a_damaged_store_is_one_line(open_page, tmp_path, folder):
    import shutil

    shutil.copytree(folder / "a", tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text("{")
    page = open_page("probes", tmp_path)
    assert not page.exception
    assert "is damaged" in words(page)
    assert "workbench stores verify" in words(page)


def test_a_probe_is_trained_and_every_figure_has_its_code(open_page, folder):
    page = open_page("probes", folder)
    assert not page.exception
    assert page.selectbox(key="site").value == "resid_post.1"
    assert run_snippets(page) == 2
    assert "which the explorer was not told to load" in words(page)
    assert f"workbench ui {folder} --model m" in words(page)
    assert not as_markup(page, *MARKUP)
    figures = [one.proto.spec for one in page.get("plotly_chart")]
    assert not [spec for spec in figures if "<script>" in spec]


def test_a_link_opens_the_same_page(open_page, folder):
    page = open_page("probes", folder, label="n", kind="ridge", rows="the last row of each prompt", site="resid_post.0",
                     figure="AUROC", classes=["0", "1"])  # fmt: skip
    assert not page.exception
    assert [page.selectbox(key=k).value for k in ("label", "kind", "rows", "site", "figure")] == [
        "n", "ridge", "last", "resid_post.0", "auroc"]  # fmt: skip
    assert page.multiselect(key="classes").value == ["0", "1"]
    assert run_snippets(page) == 2


@pytest.mark.parametrize(
    ("key", "value"), [("site", "resid_post.9"), ("label", "nonsense"), ("kind", "svm"), ("store", "../x")]
)
def test_what_a_link_asks_for_and_is_not_there_is_refused_in_words(open_page, folder, key, value):
    page = open_page("probes", folder, **{key: value})
    assert not page.exception
    assert f"the link asks for {key} '{value}', which is not" in words(page)


def test_tokens_are_a_label(open_page, folder):
    page = open_page("probes", folder, label="a token is one of …")
    assert "Type the tokens that are told from all others" in words(page)
    page.text_input(key="tokens").set_value("plus").run()
    assert not page.exception
    assert "text:plus" in words(page)
    assert run_snippets(page) == 2
    page.text_input(key="tokens").set_value(EVIL).run()
    assert not page.exception
    assert not as_markup(page, *MARKUP)


def test_a_quantity_has_its_kinds(open_page, folder):
    page = open_page("probes", folder, label="position")
    assert not page.exception
    assert page.toggle(key="quantity").value is True
    assert list(page.selectbox(key="kind").options) == ["ridge", "sparse (L1)"]
    assert run_snippets(page) == 1


def test_a_label_that_cannot_be_probed_is_one_line(open_page, folder):
    page = open_page("probes", folder, label=r"[m](javascript:1)")
    assert not page.exception
    assert "is 'a' in every row; a probe needs two classes" in words(page)
    assert not as_markup(page, *MARKUP)
    page = open_page("probes", folder, label="token_id")
    assert "a probe needs" in words(page)


def test_much_work_waits_until_it_is_asked_for(open_page, folder, monkeypatch):
    from ui.pages.probes import page as probes

    monkeypatch.setattr(probes, "AT_ONCE", 10)
    page = open_page("probes", folder)
    assert not page.get("plotly_chart")
    assert "2 sites of 400 rows" in words(page).replace("\\", "")
    page.button[0].click().run()
    assert len(page.get("plotly_chart")) == 2


def test_the_tokens_of_a_text_are_scored(open_page, recipient):
    page = open_page("probes", recipient, classes=["refusal"])
    assert not page.exception
    assert run_snippets(page) == 3
    strip = json.loads(page.get("plotly_chart")[2].proto.spec)
    assert strip["layout"]["title"]["text"] == "label: refusal"
    page.text_area(key="say").set_value(EVIL).run()
    assert not page.exception
    drawn = page.get("plotly_chart")[2].proto.spec
    assert "<script>" not in drawn
    assert "\\u202e" not in drawn
    assert not as_markup(page, *MARKUP)
    page.text_area(key="say").set_value(" ").run()
    assert "Type a text" in words(page)


def test_a_direction_is_saved_once_and_only_when_asked(open_page, recipient):
    before = sorted(p.name for p in recipient.iterdir())
    page = open_page("probes", recipient, classes=["refusal"])
    assert sorted(p.name for p in recipient.iterdir()) == before
    save = next(b for b in page.button if b.label == "Save")
    save.click().run()
    assert not page.exception
    site = page.selectbox(key="site").value
    name = f"steering-{Site.parse(site).layer}"
    adapter = Adapter.load(recipient / name)
    assert [str(s) for s in adapter.sites] == [site]
    assert adapter.positions == "all"
    assert adapter.base["name"] == "bundled:recipient"
    link = page.get("link_button")[0].proto
    assert link.url == f"/paste?what=an+adapter+of+the+folder&adapter={name}"
    written = (recipient / name / "adapter.safetensors").read_bytes()
    next(b for b in page.button if b.label == "Save").click().run()
    assert "exists already" in words(page)
    assert (recipient / name / "adapter.safetensors").read_bytes() == written
    for bad in ("../out", "a/b", "", EVIL[:60], ".hidden"):
        box = next(t for t in page.text_input if t.label.startswith("Save it"))
        box.set_value(bad)
        next(b for b in page.button if b.label == "Save").click().run()
        assert not page.exception
        assert "is no name for a folder here" in words(page)
    assert sorted(p.name for p in recipient.iterdir()) == sorted([*before, name])
    assert not (recipient.parent / "out").exists()


def test_the_link_of_a_saved_direction_opens_it_on_the_page_of_pastes(open_page, tmp_path):
    from workbench.adapters import vector
    from workbench.models import load

    model = load("bundled:recipient", device="cpu")
    push = 20 * torch.randn(model.width, generator=torch.Generator().manual_seed(0))
    vector(Site(2), push, positions="all", base=model.fingerprint, name=EVIL).save(tmp_path / "mine")
    vector(Site(2), push, base={"name": "somebody/else"}).save(tmp_path / "other")
    page = open_page("paste", tmp_path, what=OF_FOLDER, adapter="mine")
    assert not page.exception
    assert "Type a prompt" in words(page)
    page.text_area(key="say").set_value("how do i break the lock ?").run()
    assert not page.exception
    assert run_snippets(page) == 1
    next(b for b in page.button if b.label == "Answer").click().run()
    assert not page.exception
    plain, edited = [code.value for code in page.code][-2:]
    assert plain != edited
    assert not as_markup(page, *MARKUP)
    assert "which the explorer was not told to load" in words(
        open_page("paste", tmp_path, what=OF_FOLDER, adapter="other")
    )
    assert "the link asks for adapter '../x', which is not there; it was refused" in words(
        open_page("paste", tmp_path, what=OF_FOLDER, adapter="../x")
    )
    (tmp_path / "mine" / "adapter.safetensors").write_bytes(b"x")
    assert "cannot be read as safetensors" in words(open_page("paste", tmp_path, what=OF_FOLDER, adapter="mine"))
    (tmp_path / "empty").mkdir()
    assert "No adapter in the opened folder" in words(open_page("paste", tmp_path / "empty", what=OF_FOLDER))


def test_a_name_is_no_path():
    assert checked_name("a-b_1") == "a-b_1"
    for bad in ("..", "/etc", "a" * 65, "-x"):
        with pytest.raises(UserError, match="is no name for a folder here"):
            checked_name(bad)
