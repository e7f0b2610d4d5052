"""Every kind of converter between two profiles: folded, summed up, aligned, shared by several recipients."""

import pytest
import torch

from tests.conftest import make_model
from workbench.adapters.adapter import Adapter, LowRank
from workbench.convert import ConverterFits, fits_of_recipients
from workbench.converter_files import fit_set, load_converters, save_converters
from workbench.converter_specs import METHODS, ConverterSpec, method_pairs
from workbench.errors import UserError
from workbench.forecast import Candidate, paste_candidate
from workbench.jobs import Job
from workbench.layer_matching import layer_scores, matched_sites
from workbench.paste import fold_part
from workbench.profile import profile_model
from workbench.row_pairs import RowPairs
from workbench.sites import Site

PROMPTS = [f"w{i} w{(3 * i) % 150} w{(7 * i) % 150}" for i in range(60)]
LINEAR = ("ridge:0.1", "ridge:cv", "pinv", "procrustes", "rrr:4", "pls:6", "whitened", "cycle:0.5")
ENDS = Site(1), Site(2)


@pytest.fixture(scope="module")
def stores():
    donor, recipient = make_model("llama"), make_model("gpt2", seed=1)
    return {
        tokens: tuple(profile_model(m, PROMPTS, tokens=tokens) for m in (donor, recipient))
        for tokens in ("last", "all")
    }


@pytest.fixture(scope="module")
def part():
    g = torch.Generator().manual_seed(0)
    return LowRank(*(torch.randn(s, generator=g) for s in ((48, 3), (3,), (3, 48))))


def distance(a, b, h):
    return float((a.delta(h) - b.delta(h)).norm() / b.delta(h).norm())


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("tokens", ["last", "all"])
def test_folding_equals_folding_the_maps(stores, part, method, tokens):
    fits = ConverterFits(*stores[tokens], pairing="last" if tokens == "last" else "aligned")
    made, direct = fits.converter(*ENDS, method), fits.fold(part, *ENDS, method)
    assert distance(direct, fold_part(part, made.to_donor, made.to_recipient), fits.states("recipient", ENDS[1])) < 1e-4
    assert made.quality_to_donor is not None


@pytest.mark.parametrize("method", LINEAR)
def test_rows_summed_up_in_batches_give_the_fold_of_rows_held(stores, part, method):
    held = ConverterFits(*stores["all"], pairing="aligned")
    summed = ConverterFits(*stores["all"], pairing="aligned", row_budget=0)
    assert (held.summed, summed.summed) == (False, True)
    assert summed.states("recipient", Site(0)).shape == (96, 48) < (len(summed.rows), 48)  # a sample
    h = held.states("recipient", ENDS[1])
    if method == "pinv":  # its cut counts the width alone there; no direction is near either
        assert held.solver("donor", ENDS[0], False).s.shape == summed.solver("donor", ENDS[0], False).s.shape
    assert distance(summed.fold(part, *ENDS, method), held.fold(part, *ENDS, method), h) < 1e-5
    assert distance(fold_part(part, *_maps(summed, method)), held.fold(part, *ENDS, method), h) < 1e-4


def _maps(fits, method):
    made = fits.converter(*ENDS, method)
    return made.to_donor, made.to_recipient


def test_aligned_rows_are_many_and_of_the_same_prompts(stores):
    last = ConverterFits(*stores["last"])
    aligned = ConverterFits(*stores["all"], pairing="aligned")
    assert len(aligned.rows) > 2 * len(last.rows)
    prompts = stores["all"][1].prompt_index[aligned.rows.recipient]
    assert torch.equal(torch.as_tensor(prompts), aligned.rows.prompt)
    assert not set(aligned.rows.prompt.tolist()) & set(aligned.held.prompt.tolist())


def test_pairings_that_cannot_be_are_refused(stores):
    with pytest.raises(UserError, match="unknown pairing 'all' of rows; allowed: last, aligned"):
        RowPairs.of(*stores["last"], pairing="all")
    with pytest.raises(UserError, match="do not pair"):
        RowPairs.of(stores["last"][0], stores["all"][1])


def test_sums_that_do_not_fit_in_memory_at_once_are_made_in_several_passes(stores, part, monkeypatch):
    all_at_once = ConverterFits(*stores["all"], pairing="aligned", row_budget=0)
    expected = [all_at_once.fold(part, Site(d), Site(r)) for d in (0, 1) for r in (2, 0)]
    for budget, kept in ((3 * 3 * 48 * 48, 3), (0, 1)):
        monkeypatch.setattr("workbench.paired_profiles.SUM_BUDGET", budget)
        fits = ConverterFits(*stores["all"], pairing="aligned", row_budget=0)
        found = [fits.fold(part, Site(d), Site(r)) for d in (0, 1) for r in (2, 0)]
        assert len(fits._sums) == kept
        h = fits.states("recipient", Site(0))
        assert max(distance(a, b, h) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_alpha_by_cross_validation_is_for_each_pair_and_direction(stores):
    fits = ConverterFits(*stores["last"])
    spec = ConverterSpec.parse("ridge:cv")
    there, back = fits.alphas(*ENDS, spec)
    made = fits.converter(*ENDS, "ridge:cv")
    assert (made.method, made.alpha) == ("ridge", there)
    alone = fits.converter(*ENDS, "ridge", back)
    torch.testing.assert_close(made.to_recipient.weight, alone.to_recipient.weight)


def test_the_relu_reference_has_figures_and_does_not_fold(stores, part):
    fits = ConverterFits(*stores["last"])
    there, back = fits.reference(*ENDS, hidden=16, steps=60)
    assert there.r2_weighted <= 1
    assert back.cycle_error is not None
    with pytest.raises(UserError, match="does not fold into an adapter"):
        fits.fold(part, *ENDS, "autoencoder:16")
    with pytest.raises(UserError, match="does not fold into an adapter"):
        fits.converter(*ENDS, "autoencoder")
    with pytest.raises(UserError, match="needs held-out prompts"):
        ConverterFits(*stores["last"], holdout=0.0).reference(*ENDS)


def test_several_recipients_share_what_is_known_of_the_donor(stores, part):
    donor, recipient = stores["last"]
    other = profile_model(make_model("qwen2", seed=2), PROMPTS)
    first, second = fits_of_recipients(donor, [recipient, other])
    solved = first.solver("donor", ENDS[0], True)
    assert second.solver("donor", ENDS[0], True) is solved
    assert second.solver("recipient", ENDS[1], True) is not first.solver("recipient", ENDS[1], True)
    alone = ConverterFits(donor, other).fold(part, *ENDS)
    assert second.fold(part, *ENDS) == alone
    with pytest.raises(UserError, match="no recipients"):
        fits_of_recipients(donor, [])


def test_layers_of_one_model_answer_to_themselves(stores):
    donor = stores["last"][0]
    fits, sites = ConverterFits(donor, donor), [Site(l) for l in range(3)]
    for by in ("cka", "svcca", "r2"):
        scores = layer_scores(fits, sites, sites, by, 0.001)
        assert all(scores[l, l] == max(scores[l, r] for r in range(3)) for l in range(3))
        assert matched_sites(fits, sites, sites, by, alpha=0.001) == {0: 0, 1: 1, 2: 2}
    assert matched_sites(fits, sites, sites, "ends") == {0: 0, 1: 1, 2: 2}
    with pytest.raises(UserError, match="unknown score of layers 'size'; allowed: cka, svcca, r2"):
        layer_scores(fits, sites, sites, "size")
    held, summed = (ConverterFits(*stores["all"], pairing="aligned", row_budget=b) for b in (1 << 20, 0))
    assert summed.cka(*ENDS) == pytest.approx(held.cka(*ENDS), abs=1e-9)


def test_several_donor_layers_meet_at_one_site_as_a_sum_on_the_same_state(stores, part):
    fits = ConverterFits(*stores["last"])
    adapter = Adapter({Site(0): part, Site(1): part})
    pasted = paste_candidate(adapter, fits, Candidate(((Site(0), Site(2)), (Site(1), Site(2))), "rrr:4", 0.0))
    h = fits.states("recipient", Site(2))
    apart = sum(fits.fold(part, Site(l), Site(2), "rrr:4").delta(h) for l in (0, 1))
    torch.testing.assert_close(pasted.delta(Site(2), h), apart, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("match", ["ends", "cka", "svcca", "r2"])
def test_a_folder_of_any_kind_comes_back_as_it_was(stores, match, tmp_path):
    made = fit_set(*stores["all"], match=match, method="rrr:4", pairing="aligned")
    save_converters(made, tmp_path / "set")
    back = load_converters(tmp_path / "set")
    assert [c.method for c in back] == ["rrr:4"] * 3
    assert (back.meta["match"], back.meta["pairing"]) == (match, "aligned")
    assert all(a.to_donor == b.to_donor for a, b in zip(made, back, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "unknown converter 'magic'; allowed: ridge, pinv"),
        ("pinv:3", "pinv takes no value; write pinv"),
        ("ridge:-1", "alpha -1 is not a number of 0 or more"),
        ("ridge:much", "alpha much is not a number of 0 or more"),
        ("rrr:0", "the rank must be a whole number of 1 or more; write such as rrr:16"),
        ("pls:1.5", "the components must be a whole number"),
        ("cycle:nan", "the weight of the cycle must be a number of 0 or more"),
    ],
)
def test_specs_that_mean_nothing_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        ConverterSpec.parse(text)


def test_specs_read_back_as_they_are_written():
    for text in (*LINEAR, "autoencoder:64"):
        assert str(ConverterSpec.parse(text)) == text
    assert {ConverterSpec.parse(m).kind for m in METHODS} == set(METHODS)
    assert method_pairs(["ridge:cv", "ridge"]) == [("ridge:cv", 0.0), ("ridge", 0.1)]


def test_a_job_names_its_converters_and_refuses_what_it_cannot_paste():
    models = {"donor": {"model": "a"}, "recipient": {"model": "b"}}
    behaviour = {"name": "x", "openers": ["y"], "grader": "refusal", "validation": "v", "evaluation": "e"}
    job = {**models, "behaviours": [behaviour], "paste": {"methods": ["ridge:cv", "pls:8"], "match": "svcca"}}
    assert Job.parse(job).paste.methods == ["ridge:cv", "pls:8"]
    for methods, message in ((["magic"], "unknown converter 'magic'"), (["autoencoder"], "does not fold")):
        with pytest.raises(UserError, match=message):
            Job.parse({**job, "paste": {"methods": methods}})
    with pytest.raises(UserError, match=r"profile\.pairing"):
        Job.parse({**job, "profile": {"pairing": "first"}})
