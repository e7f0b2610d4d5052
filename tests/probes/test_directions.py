"""Directions find what was planted, steer by the gap between the means; LEACE erases, and changes least among what does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from probes.directions import METHODS, find_directions
from probes.erasers import LeaceEraser, erase_label, one_hot, remaining
from tests.conftest import make_model
from workbench.errors import UserError
from workbench.evaluate.behaviour import kl_on_text
from workbench.maps.moments import Moments
from workbench.sites import Site

from .labelled import planted, write_labelled


def paired_store(path, n=2000, d=8, gap=6.0):
    """Prompts in pairs: one of each class, with a part of their own in common."""
    x, y, directions = planted(n, d, gap=gap)
    label = [("no", "yes")[i] for i in y]
    return write_labelled(path, {Site(1): x}, label=label, meta=[{"pair": f"p{i // 2}"} for i in range(n)]), directions[
        1
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_found_by_every_method(method, tmp_path):
    store, direction = paired_store(tmp_path / "s", n=4000, gap=3.0)
    (found,) = find_directions(store, "label", "yes", "no", methods=[method], pairs="pair")
    assert found.cosine(direction) > 0.99
    assert abs(found.gap - 3.0) < 0.2
    assert abs(found.auroc.value - 0.983) < 0.01  # of two Gaussians 3 apart
    delta = found.adapter().delta(Site(1), torch.zeros(8))
    written = found.vector if found.written is None else found.written
    assert torch.allclose(delta, found.length * written)
    assert abs(found.length - 3.0) < 0.2
    assert found.adapter().base == {"name": "m", "weights": "w"}
    (back,) = find_directions(store, "label", "no", "yes", methods=[method], pairs="pair")
    assert back.cosine(found) < -0.99


def test_directions_stand_side_by_side(tmp_path):
    store, _ = paired_store(tmp_path / "s")
    found = find_directions(store, "label", "yes")
    assert [d.method for d in found] == [m for m in METHODS if m != "caa"]
    assert found.directions[0].negative == "other"
    cosines = found.cosines(1)
    assert (cosines.to_numpy() > 0.95).all()
    assert list(found.frame()["method"]) == list(cosines.index)
    assert "<table" in found._repr_html_()
    assert found.at(1, "pca").method == "pca"
    with pytest.raises(UserError, match=r"no direction 'caa' at resid_post\.1; there are mean_difference, pca"):
        found.at(1, "caa")


def test_caa_within_pairs_is_not_misled_by_what_differs_between_them(tmp_path):
    g = torch.Generator().manual_seed(0)
    own = 20 * torch.randn(200, 6, generator=g)  # what a pair has in common, and most of the variance
    direction = torch.eye(6)[2]
    y = torch.arange(400) % 2
    x = own.repeat_interleave(2, 0) + 2 * direction * y[:, None] + 0.1 * torch.randn(400, 6, generator=g)
    keep = torch.rand(400, generator=g) < 0.8  # some pairs lack a side, so that the plain means differ by chance
    store = write_labelled(tmp_path / "s", {Site(0): x[keep]}, label=[("a", "b")[i] for i in y[keep]],
                           meta=[{"pair": f"p{i // 2}"} for i in range(400) if keep[i]])  # fmt: skip
    found = find_directions(store, "label", "b", "a", pairs="pair", methods=["caa", "pca", "mean_difference"])
    cosines = {d.method: d.cosine(direction) for d in found}
    assert cosines["caa"] > 0.99
    assert cosines["pca"] > 0.99
    assert cosines["mean_difference"] < 0.97


def test_what_has_no_direction_is_refused_in_one_line(tmp_path):
    store, _ = paired_store(tmp_path / "s", n=80)
    with pytest.raises(UserError, match="caa takes differences of pairs; say with pairs="):
        find_directions(store, "label", "yes", methods=["caa"])
    with pytest.raises(UserError, match="unknown methods 'magic'; allowed: mean_difference"):
        find_directions(store, "label", "yes", methods=["magic"])
    with pytest.raises(UserError, match="has no class 'maybe'; it has no, yes"):
        find_directions(store, "label", "maybe")
    with pytest.raises(UserError, match="no pair has rows of both classes"):
        find_directions(store, "label", "yes", pairs=[str(i) for i in range(80)])
    flat = write_labelled(tmp_path / "f", {Site(0): torch.ones(80, 3)}, label=["a", "b"] * 40)
    with pytest.raises(
        UserError, match="the mean_difference direction of 'label' has no length; nothing differs there"
    ):
        find_directions(flat, "label", "b", methods=["mean_difference"])
    with pytest.raises(UserError, match="has width 8; got rows of width 3"):
        find_directions(store, "label", "yes", methods=["pca"]).at(1, "pca").score(torch.zeros(1, 3))


def labelled_rows(n, d, k, seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.arange(n) % k
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    x = (
        torch.randn(n, d, generator=g, dtype=torch.float64) + torch.randn(k, d, generator=g, dtype=torch.float64)[z]
    ) @ mix
    return x, z


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(2, 12), k=st.integers(2, 5), more=st.booleans())
def test_after_leace_nothing_linear_is_left(seed, d, k, more):
    x, z = labelled_rows(300 if more else d + k, d, k, seed)
    eraser = LeaceEraser.fit(x, z)
    erased = eraser(x)
    assert eraser.rank <= min(k - 1, d)
    assert remaining(erased, one_hot(z), x) < 1e-6
    assert torch.allclose(erased.mean(0), x.mean(0))
    # it is a projection: what is erased once is erased
    assert torch.allclose(eraser(erased), erased, atol=1e-8 * float(x.abs().max()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(3, 8), k=st.integers(2, 3), scale=st.sampled_from([1e-3, 0.1, 1.0]))
def test_leace_changes_least_among_the_maps_that_erase(seed, d, k, scale):
    """Any affine map that makes x and z uncorrelated is LEACE's plus one whose product with cov(x, z) is zero."""
    x, z = labelled_rows(200, d, k, seed)
    centred = x - x.mean(0)
    cross = centred.T @ one_hot(z)
    eraser = LeaceEraser.fit(x, z)
    least = float((eraser(x) - x).square().sum())
    basis = torch.linalg.svd(cross, full_matrices=False).U[:, : k - 1]
    inside = basis @ basis.T
    change = scale * torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    change = change @ (torch.eye(d, dtype=torch.float64) - inside)  # rows of x go through it from the right, transposed
    other = eraser(x) + centred @ change.T
    assert remaining(other, one_hot(z), x) < 1e-6
    assert float((other - x).square().sum()) >= least * (1 - 1e-9)
    # the orthogonal projection on what the means do not span erases too, and changes more or as much
    assert float((centred @ inside).square().sum()) >= least * (1 - 1e-9)


def test_leace_from_moments_of_batches_is_that_of_one_pass_and_a_probe_is_at_chance():
    x, z = labelled_rows(600, 10, 2, 3)
    moments = Moments()
    for part in range(0, 600, 90):
        moments.update({"x": x[part : part + 90], "z": one_hot(z)[part : part + 90]})
    a, b = LeaceEraser.of(moments), LeaceEraser.fit(x, z)
    assert torch.allclose(a(x), b(x), atol=1e-9)
    before, after = (
        LogisticRegression(C=np.inf, max_iter=5000, tol=1e-10).fit(v.numpy(), z.numpy()) for v in (x, b(x))
    )
    assert before.score(x.numpy(), z.numpy()) > 0.9
    assert np.abs(after.coef_ * x.numpy().std(0)).max() < 1e-3  # the best probe is the constant
    assert a == a.to(torch.float64)
    assert a != b.to(torch.float32)


def test_of_two_classes_leace_writes_along_the_difference_of_the_means():
    x, z = labelled_rows(300, 6, 2, 1)
    written, between = LeaceEraser.fit(x, z).left[:, 0], x[z == 1].mean(0) - x[z == 0].mean(0)
    assert abs(float(written @ between / written.norm() / between.norm())) > 1 - 1e-9


def test_an_eraser_is_saved_and_refuses_what_is_damaged(tmp_path):
    x, z = labelled_rows(100, 4, 3, 0)
    eraser = LeaceEraser.fit(x, z)
    eraser.save(tmp_path / "e")
    assert LeaceEraser.load(tmp_path / "e") == eraser
    with pytest.raises(UserError, match="exists already"):
        eraser.save(tmp_path / "e")
    (tmp_path / "e" / "eraser.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        LeaceEraser.load(tmp_path / "e")
    with pytest.raises(UserError, match=r"is not a saved eraser: it has no eraser\.json"):
        LeaceEraser.load(tmp_path)
    with pytest.raises(UserError, match="the label never varies"):
        LeaceEraser.fit(x, torch.zeros(100, dtype=torch.int64))
    with pytest.raises(UserError, match="got 100 rows and 3 labels"):
        LeaceEraser.fit(x, torch.zeros(3))
    with pytest.raises(UserError, match="reads rows of width 4; got width 5"):
        eraser(torch.zeros(1, 5))


def test_a_label_is_erased_from_a_store(tmp_path):
    store, _ = paired_store(tmp_path / "s", n=1200)
    found = erase_label(store, "label", 1)
    assert found.before.accuracy.low > 0.98
    assert abs(found.after.accuracy.value - 0.5) < 0.1
    assert abs(found.after.auroc.value - 0.5) < 0.1
    assert found.covariance < 1e-6
    assert 0 < found.changed < 1
    assert found.eraser.rank == 1
    assert list(found.frame().index) == ["before", "after"]
    assert found.adapter().base == {"name": "m", "weights": "w"}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def test_an_eraser_edits_a_model_and_leaves_no_hook_behind(small_model):
    model, site = small_model, Site(1)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 150, (40, 6), generator=g)
    mask = torch.ones_like(ids)
    with model.read(site) as read:
        model.run(ids, mask)
    states = read[site].detach().reshape(-1, model.width)
    z = (torch.arange(len(states)) % 6 > 2).long()  # what position a state is at: something that a model knows
    eraser = LeaceEraser.fit(states, z)
    before = hooks(model)
    with eraser.on(model, site), model.read(site) as edited:
        model.run(ids, mask)
    assert torch.allclose(
        edited[site].detach().reshape(-1, model.width), eraser(states), atol=1e-4 * float(states.abs().max())
    )
    assert hooks(model) == before
    with pytest.raises(RuntimeError), eraser.on(model, site):
        raise RuntimeError
    assert hooks(model) == before
    texts = [" ".join(f"w{int(i)}" for i in row - 6) for row in ids[:4]]
    assert kl_on_text(model, [{"text": t} for t in texts], eraser.adapter(site)).kl.value > 0


def test_directions_steer_through_the_workbench(tmp_path):
    model = make_model("llama")
    x, y, _ = planted(200, model.width, gap=5.0)
    store = write_labelled(tmp_path / "s", {Site(1): x}, label=[("no", "yes")[i] for i in y])
    found = find_directions(store, "label", "yes", methods=["mean_difference"])
    found = type(found)(
        tuple(type(d)(d.vector, d.site, d.method, d.label, d.positive, d.negative, d.gap, d.length) for d in found)
    )
    (curve,) = found.dose(model, ["w1 w2", "w3 w4"], ["w5"], factors=(1.0,), texts=[{"text": "w1 w2 w3 w4"}]).values()
    assert [p["strength"] for p in curve] == [0.0, 1.0]
    assert curve[0]["kl"] == 0.0 < curve[1]["kl"]
    assert curve[0]["log_odds"]["value"] != curve[1]["log_odds"]["value"]
