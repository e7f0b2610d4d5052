"""The grid finds what was planted, nothing in shuffled pairs, and what scikit-learn finds on the same prompts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from workbench.errors import UserError
from workbench.maps import LinearMap, Moments
from workbench.sites import Site
from workbench.transport import TransportGrid, transport_grid
from workbench.transport.pairs import site_pairs
from workbench.transport.rows import StoreRows
from workbench.transport.sums import Split, plan_sums

from ..conftest import make_model
from .streams import stream, write_stream

PER_PROMPT = 20
QUICK = {"folds": 2, "shards": 5}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("planted") / "s", stream(), PER_PROMPT)


@pytest.fixture(scope="module")
def grid(planted) -> TransportGrid:
    return transport_grid(planted, keep_maps=True, products=torch.float64)


def test_a_planted_channel_is_found_within_its_interval_and_the_control_is_at_zero(grid):
    for a, b in ((0, 1), (1, 2), (0, 2)):
        truth, cell = (1 + a / 4) / (1 + b / 4), grid.cell(a, b)
        for metric in ("uniform", "weighted", "whitened"):
            assert cell[f"r2_{metric}"] == pytest.approx(truth, abs=4 * cell[f"r2_{metric}_se"] + 0.01)
            assert cell[f"r2_{metric}_low"] < cell[f"r2_{metric}"] < cell[f"r2_{metric}_high"]
    for a, b in grid.pairs:
        control = grid.cell(a, b, arm="shuffled")
        assert abs(control["r2_uniform"]) < 3 * control["r2_uniform_se"] + 1e-3
        assert grid.cell(a, b, arm="mean")["r2_uniform"] <= 0
        assert grid.cell(a, b, arm="procrustes")["r2_uniform"] > grid.cell(a, b, arm="identity_bias")["r2_uniform"]


def test_a_pair_is_what_scikit_learn_finds_on_the_same_prompts(planted, grid):
    split = Split.of(planted.n_rows // PER_PROMPT, folds=5, shards=10, holdout=0.25, seed=0)
    held = split.part[planted.prompt_index.numpy()] >= 5
    x, y = (planted.read(layer).double().numpy() for layer in (0, 2))
    cell = grid.cell(0, 2)
    model = Ridge(alpha=cell["alpha_absolute"]).fit(x[~held], y[~held])
    found = model.predict(x[held])
    assert cell["r2_uniform"] == pytest.approx(r2_score(y[held], found), abs=1e-9)
    assert cell["r2_weighted"] == pytest.approx(r2_score(y[held], found, multioutput="variance_weighted"), abs=1e-9)
    each = grid.per_output[Site(0), Site(2)][0].numpy()
    assert np.allclose(each, r2_score(y[held], found, multioutput="raw_values"), atol=1e-9)
    white = np.linalg.inv(np.linalg.cholesky(np.cov(y[~held].T, bias=True)))  # any root has the same sum of squares
    about = (y[held] - y[~held].mean(0)) @ white.T
    assert cell["r2_whitened"] == pytest.approx(
        1 - (((y[held] - found) @ white.T) ** 2).sum() / (about**2).sum(), abs=1e-9
    )
    assert torch.allclose(grid.operators[Site(0), Site(2)].weight, torch.tensor(model.coef_.T, dtype=torch.float32))
    assert (cell["n_train"], cell["n_held_out"]) == ((~held).sum(), held.sum())


def test_gcv_and_a_given_penalty_agree_with_folds_where_rows_are_many(planted, grid):
    pairs = [(0, 1)]
    for alpha in ("gcv", 1e-3):
        cell = transport_grid(planted, pairs=pairs, alpha=alpha, control=False, baselines=(), **QUICK).cell(0, 1)
        assert cell["r2_uniform"] == pytest.approx(grid.cell(0, 1)["r2_uniform"], abs=2e-3)


def test_what_does_not_fit_into_memory_at_once_is_summed_in_several_passes(planted):
    options = dict(products=torch.float64, baselines=(), **QUICK)
    whole = transport_grid(planted, **options)
    parted = transport_grid(planted, memory=40_000, **options)
    assert whole.meta["passes"] == 1 < parted.meta["passes"]
    columns = ["source", "target", "arm", "r2_uniform"]
    first, second = (g.frame()[columns].sort_values(columns[:3]) for g in (whole, parted))
    # the control is drawn anew in each pass
    first, second = (f[f["arm"] == "ridge"].reset_index(drop=True) for f in (first, second))
    assert first["target"].equals(second["target"])
    assert np.allclose(first["r2_uniform"], second["r2_uniform"], atol=1e-12)
    with pytest.raises(UserError, match="GiB are free: ask for fewer targets or folds"):
        transport_grid(planted, memory=100, **options)


def test_passes_hold_every_pair_once_and_divide_the_targets_of_a_source_only_where_they_must(planted):
    rows, every = StoreRows(planted), site_pairs([Site(0), Site(1), Site(2)])
    for memory, passes in ((1 << 30, 1), (60_000, 2), (40_000, 3)):
        plan = plan_sums(rows, every, positions="same", control=False, copies=20, memory=memory)
        assert sorted(pair for some in plan for pair in some) == sorted(every)
        assert len(plan) == passes


def test_rows_at_position_0_are_fitted_a_second_time_where_they_are_wanted(tmp_path):
    store = write_stream(tmp_path / "s", stream(layers=2), PER_PROMPT, start=0)
    grid = transport_grid(store, control=False, **QUICK)
    assert grid.has_bos
    assert grid.meta["n_first"] == 200
    assert grid.cell(0, 1, bos=True)["n_train"] == grid.cell(0, 1)["n_train"] + 150
    without = transport_grid(store, control=False, with_bos=False, **QUICK)
    assert not without.has_bos
    with pytest.raises(UserError, match="no rows at position 0"):
        without.cell(0, 1, bos=True)


def test_the_previous_token_carries_what_was_planted_there(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=g)
    y = x.roll(1, 0) + 0.1 * torch.randn(4000, 6, generator=g)
    store = write_stream(tmp_path / "s", {Site(0): x, Site(1): y}, 20)
    scores = {p: transport_grid(store, positions=p, baselines=(), **QUICK).cell(0, 1)["r2_uniform"]
              for p in ("same", "previous", "random", "shuffled")}  # fmt: skip
    assert scores["previous"] > 0.95
    assert all(abs(scores[p]) < 0.1 for p in ("same", "random", "shuffled"))
    assert "shuffled" not in transport_grid(store, positions="shuffled", baselines=(), **QUICK).arms


def test_a_grid_is_the_same_after_it_was_saved(grid, tmp_path):
    grid.save(tmp_path / "g")
    again = TransportGrid.load(tmp_path / "g")
    assert again.frame().equals(grid.frame())
    assert dict(again.meta) == dict(grid.meta)
    assert again.pairs == grid.pairs
    for pair in grid.pairs:
        assert torch.equal(again.per_output[pair], grid.per_output[pair])
        assert again.operators[pair] == grid.operators[pair]
        assert again.controls[pair] == grid.controls[pair]
    assert not list((tmp_path / "g").rglob("*.pkl"))
    with pytest.raises(UserError, match="exists already"):
        grid.save(tmp_path / "g")
    grid.save(tmp_path / "g", overwrite=True)


def test_a_damaged_grid_is_refused(grid, tmp_path):
    with pytest.raises(UserError, match=r"is no transport grid: its grid\.json is missing"):
        TransportGrid.load(tmp_path)
    grid.save(tmp_path / "g")
    (tmp_path / "g" / "grid.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"grid\.parquet is missing or damaged"):
        TransportGrid.load(tmp_path / "g")
    (tmp_path / "g" / "grid.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="does not say format"):
        TransportGrid.load(tmp_path / "g")


def test_tables_and_curves(grid):
    matrix = grid.matrix("weighted")
    assert list(matrix.index) == ["resid_post.0", "resid_post.1"]
    assert list(matrix.columns) == ["resid_post.1", "resid_post.2"]
    assert math.isnan(matrix.loc["resid_post.1", "resid_post.1"])
    assert matrix.loc["resid_post.0", "resid_post.2"] == grid.cell(0, 2)["r2_weighted"]
    assert list(grid.curve(source=0)["target"]) == ["resid_post.1", "resid_post.2"]
    assert list(grid.curve(target=2)["source"]) == ["resid_post.0", "resid_post.1"]
    for call, words in ((lambda: grid.curve(), "one source or of one target"), (lambda: grid.matrix("r"), "metric must be"),
                        (lambda: grid.curve(source=2), "no pair has the source resid_post.2"),
                        (lambda: grid.cell(1, 0), "no pair resid_post.1 to resid_post.0"),
                        (lambda: grid.cell(0, 1, arm="x"), "no arm 'x'")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            call()


def test_a_model_gives_what_its_store_gives_and_is_told_apart_from_bos():
    model = make_model("llama")
    prompts = [" ".join(f"w{(7 * i + 11 * j + i * j) % 170}" for j in range(8)) for i in range(80)]
    from workbench.profile import profile_model

    store = profile_model(model, prompts, tokens="all+special")
    options = dict(products=torch.float64, sites=[0, 2], alpha=0.1, control=False, **QUICK)
    from_model, from_store = transport_grid(model, prompts, **options), transport_grid(store, **options)
    for bos in (False, True):
        a, b = (g.cell(0, 2, bos=bos) for g in (from_model, from_store))
        assert (a["n_train"], a["n_held_out"]) == (b["n_train"], b["n_held_out"])
        assert a["r2_uniform"] == pytest.approx(b["r2_uniform"], abs=1e-5)
    assert from_model.meta["n_first"] == 80
    assert from_model.meta["tokens"] == "all"
    store.close()


def test_moments_of_each_pair_are_handed_out(planted):
    seen: dict[object, tuple[int, int]] = {}

    def visit(pair: object, block: str, parts: list[Moments], held: list[Moments]) -> None:
        assert block in parts[0].names
        seen[pair] = (sum(m.n for m in parts), sum(m.n for m in held))

    grid = transport_grid(planted, alpha=0.1, baselines=(), control=False, visit=visit, **QUICK)
    assert set(seen) == set(grid.pairs)
    assert set(seen.values()) == {(3000, 1000)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sites": [0, 9]}, "layer 9 is out of range: the model has layers 0 to 2"),
        ({"sites": ["resid_pre.1"]}, "has no resid_pre.1"),
        ({"sites": [1]}, "no pairs of sites to fit"),
        ({"pairs": [(2, 1)]}, r"resid_post.2 is not before resid_post.1: the source"),
        ({"pairs": [(1, 1)]}, "is not before"),
        ({"pairs": [(0, 1)], "sites": [0, 1]}, "both sites and pairs"),
        ({"positions": "next"}, "unknown positions 'next'; allowed: same, previous, random, shuffled, attention"),
        ({"positions": "attention"}, "a store has none: give the model and its prompts"),
        ({"shards": 90}, "200 prompts are too few for 5 folds and 90 shards"),
        ({"folds": 1}, "folds and shards must be at least 2"),
        ({"holdout": 1.0}, "holdout is a share of the prompts between 0 and 1"),
        ({"baselines": ["best"]}, "unknown baseline 'best'"),
        ({"alpha": -1.0}, "alpha must be a number from 0 up"),
        ({"prompts": ["a"]}, "a store has its prompts already"),
    ],
)
def test_bad_arguments_are_told(planted, options, words):
    with pytest.raises(UserError, match=words):
        transport_grid(planted, **options)


def test_a_model_needs_prompts():
    with pytest.raises(UserError, match="a model needs prompts to run"):
        transport_grid(make_model("gpt2"))


def test_too_few_rows_are_refused_or_told(tmp_path):
    values = stream(120, d=40, layers=2)
    store = write_stream(tmp_path / "s", values, 2)
    with pytest.raises(UserError, match="a transport from width 40 needs at least 42 rows; got 30"):
        transport_grid(write_stream(tmp_path / "t", {s: x[:40] for s, x in values.items()}, 2), alpha=0.0, **QUICK)
    grid = transport_grid(store, **QUICK)
    assert grid.warnings == []
    few = transport_grid(write_stream(tmp_path / "u", {s: x[:80] for s, x in values.items()}, 2), **QUICK)
    assert "60 rows are few for width 40 (n/d = 1.50): have at least 80" in few.warnings[0]


def test_constant_dimensions_are_told_and_count_zero_and_constant_sites_are_refused(tmp_path):
    values = stream(2000, layers=2)
    values[Site(1)][:, 3] = 5.0
    grid = transport_grid(write_stream(tmp_path / "s", values, 10), **QUICK)
    assert "1 of 8 dimensions of resid_post.1 never vary" in grid.warnings[0]
    each = grid.per_output[Site(0), Site(1)][0]
    assert each.isnan().tolist() == [i == 3 for i in range(8)]
    assert grid.cell(0, 1)["r2_uniform"] == pytest.approx(float(each.nan_to_num(0).mean()))
    values[Site(1)][:] = 5.0
    with pytest.raises(UserError, match=r"resid_post\.1 is constant, so there is nothing to fit"):
        transport_grid(write_stream(tmp_path / "t", values, 10), **QUICK)


def test_values_that_are_not_finite_are_refused(tmp_path):
    values = stream(400, layers=2)
    values[Site(1)][17, 3] = torch.nan
    with pytest.raises(UserError, match=r"block 'resid_post\.1' holds NaN or infinite values"):
        transport_grid(write_stream(tmp_path / "s", values, 10), **QUICK)


def test_maps_are_kept_only_where_asked(planted):
    grid = transport_grid(planted, pairs=[(0, 1)], alpha=0.1, baselines=(), **QUICK)
    assert grid.operators == {}
    kept = transport_grid(planted, pairs=[(0, 1)], alpha=0.1, baselines=(), keep_maps=True, **QUICK)
    assert isinstance(kept.operators[Site(0), Site(1)], LinearMap)
    assert set(kept.controls) == {(Site(0), Site(1))}
