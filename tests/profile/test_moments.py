"""Moments of the pass itself are those of the stored rows, fold by fold, however the run was stopped and resumed."""

from __future__ import annotations

import json

import pytest
import torch

from workbench.errors import UserError
from workbench.maps.moments import Moments, total
from workbench.models import load
from workbench.profile import plan as profile_plan
from workbench.profile import profile_model, room
from workbench.profile import sums as profile_sums
from workbench.profile.cost import profile_cost
from workbench.profile.plan import make_plan
from workbench.profile.sums import load_moments, moments_bytes, profile_moments
from workbench.prompts import encode

from ..conftest import make_model
from .test_profile import PROMPTS, Killed, contents, interrupt_after


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 20)
    monkeypatch.setattr(profile_sums, "SAVE_EVERY", -1.0)


def of_store(store) -> Moments:
    return Moments().update({str(site): store.read(site) for site in store.sites})


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("products", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_they_are_those_of_the_stored_rows(llama, products, rtol):
    options = {"sites": [0, 2, "resid_pre.1"], "tokens": "all"}
    folds = profile_moments(llama, PROMPTS, folds=3, products=products, **options)
    exact, found = of_store(profile_model(llama, PROMPTS, **options)), total(folds)
    assert (len(folds), found.n, found.names) == (3, exact.n, exact.names)
    for a in exact.names:
        torch.testing.assert_close(found.mean(a), exact.mean(a), rtol=1e-9, atol=1e-9)
        for b in exact.names:
            scale = float(exact.cov(a, b).abs().max())
            torch.testing.assert_close(found.cov(a, b), exact.cov(a, b), rtol=rtol, atol=rtol * scale)


def test_folds_part_the_prompts_and_the_seed_deals_them(llama):
    one, other = (profile_moments(llama, PROMPTS, folds=4, seed=seed, sites=[0]) for seed in (0, 1))
    assert [m.n for m in one] == [3, 3, 3, 3]
    assert not torch.equal(one[0].mean("resid_post.0"), other[0].mean("resid_post.0"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("after", [0, 2, 5])
def test_killed_and_started_again_ends_with_the_same_bytes(gpt2, tmp_path, monkeypatch, after):
    options = {"tokens": "all", "folds": 2, "batch_tokens": 40, "pairs": [(0, 2)]}
    profile_moments(gpt2, PROMPTS, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_after(gpt2, patch, after)
        with pytest.raises(Killed):
            profile_moments(gpt2, PROMPTS, tmp_path / "again", **options)
    again = profile_moments(gpt2, PROMPTS, tmp_path / "again", **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "whole"]
    for a, b in zip(load_moments(tmp_path / "whole"), again, strict=True):
        assert torch.equal(a.cov("resid_post.0", "resid_post.2"), b.cov("resid_post.0", "resid_post.2"))
    with pytest.raises(UserError, match="name the pair"):
        again[0].cov("resid_post.0", "resid_post.1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folds": 0}, "folds=0 is not within 1 to 12"),
        ({"folds": 13}, "folds=13 is not within 1 to 12"),
        ({"sites": [0], "pairs": [(0, 1)]}, r"the pair names resid_post\.1, which is not profiled"),
    ],
)
def test_bad_arguments_are_named(llama, options, said):
    with pytest.raises(UserError, match=said):
        profile_moments(llama, PROMPTS, **options)


def test_a_folder_that_is_there_or_is_damaged_is_refused(llama, tmp_path):
    profile_moments(llama, PROMPTS, tmp_path / "m", sites=[0])
    with pytest.raises(UserError, match="exists already"):
        profile_moments(llama, PROMPTS, tmp_path / "m", sites=[0])
    file = tmp_path / "m" / "fold-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"fold-0\.safetensors changed since it was written"):
        load_moments(tmp_path / "m")
    with pytest.raises(UserError, match="holds no moments that can be read"):
        load_moments(tmp_path)


@pytest.mark.usefixtures("small_blocks")
def test_an_unfinished_store_of_the_same_name_is_left_alone(gpt2, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(gpt2, patch, 3)
        with pytest.raises(Killed):
            profile_model(gpt2, PROMPTS, tmp_path / "x", tokens="all")
    (tmp_path / ".x.partial" / "old").mkdir()
    (tmp_path / ".x.partial" / "old" / "manifest.json").write_text("the only copy")
    before = contents(tmp_path / ".x.partial")
    profile_moments(gpt2, PROMPTS, tmp_path / "x", tokens="all")
    assert contents(tmp_path / ".x.partial") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.partial", "x"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("damage", ["one bit", "no list of files", "not JSON", "a list"])
def test_saved_sums_that_were_damaged_are_made_anew(gpt2, tmp_path, monkeypatch, damage):
    monkeypatch.setattr("workbench.profile.sums.SAVE_EVERY", -1.0)
    monkeypatch.setattr("workbench.profile.sums.SAVE_SHARE", 0)
    profile_moments(gpt2, PROMPTS, tmp_path / "whole", tokens="all")
    with monkeypatch.context() as patch:
        interrupt_after(gpt2, patch, 4)
        with pytest.raises(Killed):
            profile_moments(gpt2, PROMPTS, tmp_path / "again", tokens="all")
    saved = tmp_path / ".again.moments-partial"
    (file,) = saved.glob("after-*/fold-0.safetensors")
    if damage == "one bit":
        data = bytearray(file.read_bytes())
        data[-9] ^= 4
        file.write_bytes(data)
    else:
        now = json.loads((saved / "now.json").read_text())
        now.pop("files")
        texts = {"no list of files": json.dumps(now), "not JSON": "{", "a list": "[]"}
        (saved / "now.json").write_text(texts[damage])
    profile_moments(gpt2, PROMPTS, tmp_path / "again", tokens="all")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "whole"]


@pytest.mark.usefixtures("small_blocks")
def test_what_others_put_among_unfinished_sums_stays(llama, tmp_path):
    (tmp_path / ".m.moments-partial" / "mine").mkdir(parents=True)
    (tmp_path / ".m.moments-partial" / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / ".m.moments-partial" / "after-9").symlink_to(tmp_path / ".m.moments-partial" / "mine")
    profile_moments(llama, PROMPTS, tmp_path / "m")
    assert (tmp_path / ".m.moments-partial" / "mine" / "thesis.txt").exists()
    (tmp_path / ".n.moments-partial").symlink_to(tmp_path / "m")
    with pytest.raises(UserError, match="is a link, and unfinished work lies in folders of its own"):
        profile_moments(llama, PROMPTS, tmp_path / "n")


@pytest.mark.parametrize("pairs", [None, [], [("resid_post.0", "resid_post.2"), ("resid_post.1", "resid_post.1")]])
def test_the_bytes_are_those_that_are_then_held(llama, pairs):
    folds = profile_moments(llama, PROMPTS, folds=3, pairs=pairs)
    held = sum(t.nbytes for m in folds for part in (m.shift, m.sum, m.product) for t in part.values())
    widths = {name: folds[0].width(name) for name in folds[0].names}
    assert moments_bytes(widths, pairs, folds=3) == held
    assert profile_cost(llama, PROMPTS, moments=True, folds=3, pairs=pairs).bytes == held


def test_sums_that_do_not_fit_are_refused_before_any_pass(llama, tmp_path, monkeypatch):
    size = moments_bytes({f"resid_post.{i}": llama.width for i in range(llama.n_layers)})
    monkeypatch.setattr(room, "memory_free", lambda _: 2 * size)
    profile_moments(llama, PROMPTS, tmp_path / "m")
    monkeypatch.setattr(llama, "run", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(UserError, match=r"of 3 sites in 2 folds need .* GiB on cpu, which has .*; give fewer sites"):
        profile_moments(llama, PROMPTS, tmp_path / "n", folds=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_the_memory_that_is_free_is_told():
    assert room.memory_free(torch.device("cpu")) > 0


def test_a_model_in_float64_keeps_its_rows():
    model = load(make_model("llama").module.double(), tokenizer=make_model("llama").tokenizer)
    found = profile_moments(model, PROMPTS, sites=[0], products=torch.float64)[0]
    seen = []
    with model.read([model.site(0)]) as states, torch.inference_mode():
        for ids in encode(PROMPTS, model.tokenizer):
            model.run(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), stop_after=0)
            seen.append(states[model.site(0)][0, -1])
    torch.testing.assert_close(found.mean("resid_post.0"), torch.stack(seen).mean(0), rtol=1e-12, atol=1e-12)


def test_a_prompt_that_is_larger_than_a_block_is_summed_in_parts(llama, monkeypatch):
    whole = profile_moments(llama, PROMPTS, tokens="all")[0]
    monkeypatch.setattr(profile_plan, "BLOCK_BYTES", 7 * make_plan(llama, PROMPTS).row_bytes)
    parts, update = [], Moments.update
    monkeypatch.setattr(Moments, "update", lambda m, b: (parts.extend(map(len, b.values())), update(m, b))[1])
    found = profile_moments(llama, PROMPTS, tokens="all")[0]
    assert max(parts) == 7
    scale = float(whole.cov("resid_post.0", "resid_post.2").abs().max())
    torch.testing.assert_close(found.cov("resid_post.0", "resid_post.2"), whole.cov("resid_post.0", "resid_post.2"),
                               rtol=1e-4, atol=1e-4 * scale)  # fmt: skip
