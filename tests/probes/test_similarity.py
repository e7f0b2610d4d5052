"""How alike layers are: planted truths, what must not change them, the null, and what is refused."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from probes.similarity import layer_similarity
from probes.similarity_measures import BY_SPECTRA, MEASURES
from workbench.errors import UserError
from workbench.sites import Site

from ..store.made import made_store, noise

PROMPTS, WORDS, WIDTH = 60, 6, 12
TEXTS = [" ".join(f"w{i}x{j}" for j in range(WORDS)) for i in range(PROMPTS)]
ROWS = PROMPTS * WORDS


def rotation(d, seed):
    return torch.linalg.qr(noise(d, d, seed)).Q


@pytest.fixture(scope="module")
def truth():
    return noise(ROWS, WIDTH, seed=1) * torch.logspace(0, -1, WIDTH)


@pytest.fixture(scope="module")
def found(truth, tmp_path_factory):
    """Layer 0 of b is layer 0 of a turned, scaled and moved; layer 1 of b is noise; layer 1 of a is half of both."""
    home = tmp_path_factory.mktemp("stores")
    turned = 3 * truth @ rotation(WIDTH, 2) - 5
    a = made_store(home / "a", {Site(0): truth, Site(1): truth + 0.5 * noise(ROWS, WIDTH, 3)}, TEXTS)
    b = made_store(home / "b", {Site(0): turned, Site(1): noise(ROWS, WIDTH, 4)}, TEXTS, model="other")
    return layer_similarity(a, b, permutations=10)


def test_a_turned_copy_is_the_same(found):
    assert tuple(found.tables) == MEASURES
    for name in MEASURES:
        table = found[name]
        assert float(table.value[0, 0]) == pytest.approx(1, abs=1e-4), name
        assert float(table.low[0, 0]) == pytest.approx(1, abs=1e-3), name
        assert bool(table.beyond[0, 0])
        assert float(table.value[0, 0]) > float(table.value[1, 0]) > float(table.null_high[1, 0]), name


def test_noise_is_no_more_alike_than_shuffled_prompts(found):
    for name in MEASURES:
        table = found[name]
        spread = float(table.null_high[0, 1] - table.null[0, 1])
        assert abs(float(table.value[0, 1] - table.null[0, 1])) < 3 * spread + 1e-3, name
    assert abs(float(found["cka_debiased"].null[0, 1])) < 0.02
    assert float(found["cka"].null[0, 1]) > 0.01, "CKA of few rows is biased, and its null says so"


def test_the_interval_holds_the_truth(found):
    """Debiased CKA of a layer with itself and half as much noise again, from many more rows."""
    x = noise(40_000, WIDTH, 11) * torch.logspace(0, -1, WIDTH)
    y = x + 0.5 * noise(40_000, WIDTH, 12)
    x, y = x - x.mean(0), y - y.mean(0)
    truth = float((x.T @ y).square().sum() / (x.T @ x).norm() / (y.T @ y).norm())
    table = found["cka_debiased"]
    assert float(table.low[1, 0]) < truth < float(table.high[1, 0])
    assert 0.001 < float(table.high[1, 0] - table.low[1, 0]) < 0.2


def test_the_result_is_a_table_a_matching_and_html(found):
    frame = found.frame()
    assert len(frame) == len(MEASURES) * 4
    assert set(frame["rows"]) == {ROWS}
    best = found.best()
    assert best[best["measure"] == "cka"]["b"].tolist() == ["resid_post.0", "resid_post.0"]
    assert found.matching("cka") == {Site(0): Site(0), Site(1): Site(0)}
    assert found.order("cka") is None
    assert "<table" in found._repr_html_()
    assert isinstance(pd.DataFrame(found.summary), pd.DataFrame)
    assert repr(found).startswith("LayerSimilarity(m with other, 2 x 2 layers, cka")
    with pytest.raises(UserError, match="no measure 'other' here; there are cka"):
        found["other"]


def test_one_store_is_compared_with_itself(truth, tmp_path):
    store = made_store(tmp_path / "s", {Site(0): truth, Site(1): noise(ROWS, WIDTH, 5)}, TEXTS)
    found = layer_similarity(store, measures=("cka_debiased", "knn"), permutations=3)
    assert found["cka_debiased"].value.diagonal().tolist() == pytest.approx([1.0, 1.0])
    torch.testing.assert_close(found["knn"].value, found["knn"].value.T)
    assert found.settings["pairing"] == "last"


def test_tokens_of_two_tokenizers_are_aligned(truth, tmp_path):
    a = made_store(tmp_path / "a", {Site(0): truth}, TEXTS, tokenizer="one")
    b = made_store(tmp_path / "b", {Site(0): truth[torch.arange(ROWS) % WORDS > 0]}, TEXTS, tokenizer="two", skip=1)
    found = layer_similarity(a, b, measures=["cka"], permutations=0)
    assert found.settings["pairing"] == "aligned"
    assert found.rows == PROMPTS * (WORDS - 1)
    assert float(found["cka"].value) == pytest.approx(1)
    assert found["cka"].null.isnan().all()


def test_a_seed_draws_the_same_rows_and_the_sample_is_even(truth, tmp_path):
    store = made_store(tmp_path / "s", {Site(0): truth, Site(1): noise(ROWS, WIDTH, 5)}, TEXTS)
    options = dict(measures=["rsa"], sample=120, permutations=2, max_rows=300)
    one, two, other = (layer_similarity(store, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(one["rsa"].value, two["rsa"].value)
    assert torch.equal(one["rsa"].null, two["rsa"].null)
    assert not torch.equal(one["rsa"].value, other["rsa"].value)
    assert one.settings["per_prompt"] == 2
    assert one["rsa"].rows == 120
    assert "300 of 360 pairs of rows are compared" in one.notes[0]
    assert "a sample of 120 rows, 2 of each prompt, drawn with seed 0" in one.notes[1]


def test_what_would_take_hours_is_left_out_and_said(truth, tmp_path, monkeypatch):
    store = made_store(tmp_path / "s", {Site(0): truth}, TEXTS)
    monkeypatch.setattr("probes.similarity_measures.MOST", {"cpu": 1e5, "cuda": 1e5})
    found = layer_similarity(store, permutations=3)
    assert not set(found.tables) & set(BY_SPECTRA)
    assert any("an SVD for each of 1 pairs" in note and "left out, name them" in note for note in found.notes)
    named = layer_similarity(store, measures=["svcca"], permutations=3)
    assert named["svcca"].draws == 3
    monkeypatch.setattr("probes.similarity_measures.MOST", {"cpu": 1e6, "cuda": 1e6})
    bare = layer_similarity(store, permutations=30)
    assert bare["svcca"].draws == 0
    assert bare["svcca"].low.isnan().all()
    assert any("without intervals and null" in note for note in bare.notes)


def test_pwcca_with_few_rows_is_no_number(tmp_path):
    texts = [f"w{i}" for i in range(20)]
    store = made_store(tmp_path / "s", {Site(0): noise(20, 16)}, texts)
    found = layer_similarity(store, measures=["pwcca", "cka"], permutations=1, shards=4)
    assert found["pwcca"].value.isnan().all()
    assert any("PWCCA needs more rows" in note for note in found.notes)
    assert math.isnan(found.summary[1]["best"])


def test_what_cannot_be_compared_is_told(truth, tmp_path):
    a = made_store(tmp_path / "a", {Site(0): truth}, TEXTS)
    others = made_store(tmp_path / "others", {Site(0): truth}, [f"v{t}" for t in TEXTS])
    few = made_store(tmp_path / "few", {Site(0): noise(18, 4)}, TEXTS[:3])
    broken = made_store(tmp_path / "broken", {Site(0): truth * math.inf}, TEXTS)
    for stores, options, message in (
        ((a, others), {}, "they differ in prompts"),
        ((a, others), {"pairing": "aligned"}, "hold different prompts"),
        ((few, None), {}, "share 18 rows of 3 prompts; a comparison needs at least 8 rows of 4 prompts"),
        ((a, None), {"sites_a": [3]}, "layer 3 is out of range"),
        ((a, None), {"sites_a": ["resid_mid.0"]}, "has no resid_mid.0; it has resid_post.0"),
        ((a, None), {"sites_a": []}, "no layers given"),
        ((a, None), {"measures": ["cosine"]}, "unknown measure 'cosine'; allowed: cka"),
        ((a, None), {"pairing": "first"}, "unknown pairing 'first'"),
        ((a, None), {"sample": 2}, "must be at least 8"),
        ((a, None), {"permutations": -1}, "permutations -1 must be 0 or more"),
        ((a, None), {"variance": 2.0}, r"variance must lie in 0\.\.1"),
        ((a, None), {"k": 500}, "with k=500 need more than"),
        ((broken, None), {}, "holds NaN or infinite values"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            layer_similarity(*stores, **options)
