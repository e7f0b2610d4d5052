"""Layer matching (A11), converters against their formulas, and the fold through a factorised profile."""

import pytest
import torch

from tests.conftest import make_model
from workbench.adapters.adapter import LowRank
from workbench.convert import ConverterFits, best_matching, fit_converters, layer_scores, match_layers
from workbench.errors import UserError
from workbench.maps.fit import fit_pinv, fit_ridge
from workbench.paste import fold_part
from workbench.profile import profile_model
from workbench.sites import Site

PROMPTS = [f"w{i} w{(3 * i) % 150} w{(7 * i) % 150}" for i in range(90)]


def evens(n: int) -> list[int]:
    return list(range(0, n, 2))


def table(text: str) -> dict[int, int]:
    return {int(d): int(r) for d, r in (pair.split(":") for pair in text.split())}


@pytest.mark.parametrize(
    ("donor", "recipient", "expected"),
    [
        (28, 32, "0:0 2:2 4:5 6:7 8:9 10:11 12:14 14:16 16:18 18:21 20:23 22:25 24:27 26:30"),
        (32, 28, "0:0 2:2 4:3 6:5 8:7 10:9 12:10 14:12 16:14 18:16 20:17 22:19 24:21 26:23 28:24 30:26"),
        (36, 28, "0:0 2:2 4:3 6:5 8:6 10:8 12:9 14:11 16:12 18:14 20:16 22:17 24:19 26:20 28:22 30:23 32:25 34:26"),
        (28, 36, "0:0 2:3 4:5 6:8 8:10 10:13 12:15 14:18 16:21 18:23 20:26 22:28 24:31 26:33"),
        (32, 16, " ".join(f"{l}:{l // 2}" for l in range(0, 32, 2))),  # the README pair: not turned round
    ],
)
def test_golden_nearest_maps(donor, recipient, expected):
    assert match_layers(evens(donor), donor, recipient) == table(expected)


def test_floor_differs_from_nearest_where_the_paper_differs_from_its_code():
    for donor, recipient, n_differ in ((28, 32, 6), (32, 28, 4)):
        near, low = (match_layers(evens(donor), donor, recipient, p) for p in ("nearest", "floor"))
        assert low == {l: l * recipient // donor for l in evens(donor)}
        assert sum(near[l] != low[l] for l in near) == n_differ


@pytest.mark.parametrize(("donor", "recipient"), [(28, 32), (36, 28), (16, 32), (7, 1)])
def test_ends_answer_to_ends(donor, recipient):
    matched = match_layers(range(donor), donor, recipient, "ends")
    assert (matched[0], matched[donor - 1]) == (0, recipient - 1)
    assert sorted(matched.values()) == list(matched.values())


def test_keys_are_donor_layers_also_where_both_lists_have_one_length():
    assert set(match_layers(evens(36), 36, 16)) == set(evens(36))
    matched = match_layers([1, 3], 4, 8, recipient_layers=[2, 6])
    assert matched == {1: 2, 3: 6}


@pytest.mark.parametrize(
    "arguments", [([4], 4, 4), ([], 4, 4), ([0], 4, 4, "nearest", [9]), ([0], 4, 4, "nearest", []), ([0], 4, 4, "best")]
)
def test_bad_layers_and_policies_are_refused(arguments):
    with pytest.raises(UserError, match=r"out of range|unknown layer matching"):
        match_layers(*arguments)


def test_matching_by_r2_finds_the_best_monotone_path():
    r2 = {(d, r): -abs(r - 2 * d) for d in range(3) for r in range(6)}
    assert best_matching(r2) == {0: 0, 1: 2, 2: 4}
    crossed = {(0, 0): 0.1, (0, 1): 0.9, (1, 0): 0.95, (1, 1): 0.2}
    assert best_matching(crossed, monotone=False) == {0: 1, 1: 0}
    assert best_matching(crossed) == {0: 1, 1: 1}  # 0.9 + 0.2 beats 0.1 + 0.95 and 0.1 + 0.2


@pytest.fixture(scope="module")
def stores():
    donor, recipient = make_model("llama"), make_model("gpt2", seed=1)
    return profile_model(donor, PROMPTS), profile_model(recipient, PROMPTS)


@pytest.mark.parametrize("method", ["ridge", "pinv"])
def test_converters_equal_the_plain_fits_on_the_fitted_rows(stores, method):
    fits = ConverterFits(*stores, seed=3)
    made = fits.converter(Site(1), Site(2), method, 0.05)
    x = stores[1].read(Site(2), fits.fit_rows, dtype=torch.float32)
    y = stores[0].read(Site(1), fits.fit_rows, dtype=torch.float32)
    there, back = (
        (fit_ridge(a, b, alpha=0.05).map if method == "ridge" else fit_pinv(a, b)) for a, b in ((x, y), (y, x))
    )
    torch.testing.assert_close(made.to_donor.weight, there.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.to_donor.bias, there.bias, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made.to_recipient.weight, back.weight, rtol=1e-3, atol=1e-4)
    assert made.quality_to_donor is not None
    assert made.quality_to_donor.n == len(fits.fit_rows)


@pytest.mark.parametrize("method", ["ridge", "pinv"])
def test_folding_without_forming_the_converters_equals_folding_them(stores, method):
    fits = ConverterFits(*stores)
    g = torch.Generator().manual_seed(0)
    part = LowRank(*(torch.randn(s, generator=g) for s in ((48, 3), (3,), (3, 48))))
    made = fits.converter(Site(1), Site(0), method, 0.1)
    direct, formed = fits.fold(part, Site(1), Site(0), method, 0.1), fold_part(part, made.to_donor, made.to_recipient)
    h = stores[1].read(Site(0), dtype=torch.float32)
    error = (direct.delta(h) - formed.delta(h)).norm() / formed.delta(h).norm()
    assert error < 1e-5


def test_held_out_rows_are_whole_prompts_and_the_same_for_both_sides(stores):
    fits = ConverterFits(*stores, holdout=0.25, seed=1)
    assert len(fits.held_rows) == int(0.25 * len(PROMPTS))
    assert not set(fits.held_rows.tolist()) & set(fits.fit_rows.tolist())


def test_shuffled_pairs_predict_nothing(stores):
    true, false = (
        layer_scores(ConverterFits(*stores, shuffled=s), [Site(1)], [Site(1)], "r2", 0.3)[1, 1] for s in (False, True)
    )
    assert false < 0.05
    assert true > false


def test_stores_of_other_prompts_do_not_pair(stores):
    other = profile_model(make_model("gpt2", seed=1), PROMPTS[:-1])
    with pytest.raises(UserError, match="pair"):
        fit_converters(stores[0], other, {0: 0})
    with pytest.raises(UserError, match="unknown converter 'magic'"):
        fit_converters(*stores, {0: 0}, method="magic")
