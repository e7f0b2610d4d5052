"""Fitted lenses: a planted affine end is found, no fit is worse than its start, Jacobians are those of autograd."""

from __future__ import annotations

import logging

import pytest
import torch

from probes import tuned_lens
from probes.jacobian_lens import fit_jacobian_lens
from probes.lens import Lens, lens_sites
from probes.lens_rows import batches_of, iter_rows, split_prompts
from probes.lens_scores import lens_scores, saved_scores
from probes.tuned_lens import fit_tuned_lens
from probes.unembedding import Unembedding
from tests.conftest import LAYERS, WIDTH, make_module, word_tokenizer
from tests.probes.lens_models import TEXTS, planted
from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences
from workbench.models import Model, load
from workbench.prompts import PromptSet
from workbench.sites import Site

EMBEDDINGS, END = Site(0, "resid_pre"), Site(LAYERS - 1)
PROMPTS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def still() -> Model:
    """A Llama whose blocks 1 and 2 add nothing."""
    return planted("llama", 1)


def random_model() -> Model:
    return load(make_module("llama"), tokenizer=word_tokenizer(), prove=False)


def test_prompts_that_say_the_same_stay_together():
    prompts = PromptSet.load([*PROMPTS, *PROMPTS[:20]])
    sequences = Sequences.of(random_model(), prompts)
    parts = split_prompts(prompts, sequences, (0.7, 0.1, 0.2), 0)
    assert sorted(i for part in parts for i in part) == list(range(100))
    said = [{prompts[i].text for i in part} for part in parts]
    assert not said[0] & said[1] | said[0] & said[2] | said[1] & said[2]
    with pytest.raises(UserError, match=r"2 different prompts do not make parts of 0\.7, 0\.1, 0\.2 with two each"):
        split_prompts(prompts[:2], Sequences.of(random_model(), prompts[:2]), (0.7, 0.1, 0.2), 0)


def test_rows_are_the_states_of_the_tokens_without_bos(still):
    sequences = Sequences.of(still, PROMPTS[:9])
    batches = batches_of(sequences, range(9), 30)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    assert all(len(batch) * max(len(sequences.ids[i]) for i in batch) <= 30 or len(batch) == 1 for batch in batches)
    counts = torch.zeros(9)
    for rows in iter_rows(still, sequences, [END], batches):
        counts.index_add_(0, rows.prompt, torch.ones(len(rows.prompt)))
    assert counts.tolist() == [len(ids) - 1 for ids in sequences.ids]


def test_scores_are_the_mean_of_the_reference_formula(still):
    texts = PROMPTS[:3]
    found, unembed = lens_scores(still, texts, {"logit": Lens()}), Unembedding.of(still)
    sums, agree, count = 0.0, 0.0, 0
    with torch.inference_mode():
        for ids in Sequences.of(still, texts).ids:
            row = torch.tensor([ids])
            with still.read([EMBEDDINGS]) as read:
                p = still.logits(row, torch.ones_like(row))[0, 1:].double().log_softmax(-1)
            q = unembed.logits(read[EMBEDDINGS][0, 1:]).double().log_softmax(-1)
            sums += float((p.exp() * (p - q)).sum())
            agree += float((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(p)
    assert found.mean_kl("logit", EMBEDDINGS).value == pytest.approx(sums / count, rel=1e-6)
    line = found.frame().iloc[0]
    assert (line["agree"], line["tokens"]) == (pytest.approx(agree / count), count)
    assert found.mean_kl("logit", END).value == 0
    with pytest.raises(UserError, match="no score of 'x' at"):
        found.mean_kl("x", END)
    with pytest.raises(UserError, match="no lens given"):
        lens_scores(still, texts, {})


def test_a_lens_is_exact_where_the_blocks_after_it_add_nothing(still):
    fit = fit_tuned_lens(still, PROMPTS, epochs=2, alpha=1e-6)
    frame = fit.frame().set_index("site")
    for site in ("resid_post.0", "resid_post.1"):
        assert frame.loc[site, "kl_logit"] < 1e-9
        assert frame.loc[site, "start"] == "identity"
        assert frame.loc[site, "kl_tuned"] <= frame.loc[site, "kl_start"]


def test_a_tuned_lens_is_nearer_than_the_logit_lens_and_never_worse_than_its_start():
    model = random_model()
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    fit = fit_tuned_lens(model, PROMPTS, epochs=3, seed=1)
    frame = fit.frame()
    assert (frame["kl_tuned"] <= frame["kl_start"]).all()
    assert (frame["kl_start"] <= frame["kl_logit"] * 1.2).all()
    assert frame["kl_tuned"].iloc[0] < frame["kl_logit"].iloc[0]
    assert (frame["kl_tuned_low"] <= frame["kl_tuned"]).all()
    assert (frame["kl_tuned"] <= frame["kl_tuned_high"]).all()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert fit.lens.base == model.fingerprint
    again = fit_tuned_lens(model, PROMPTS, epochs=3, seed=1)
    assert again.lens == fit.lens
    # the figures are those of the lens itself, on prompts of which the fit saw none
    read = PromptSet.load(PROMPTS)
    sequences = Sequences.of(model, read)
    held = split_prompts(read, sequences, (0.7, 0.1, 0.2), 1)[2]
    scores = lens_scores(model, sequences, {"tuned": fit.lens}, among=held)
    for site, value in zip(frame["site"], frame["kl_tuned"], strict=True):
        assert scores.mean_kl("tuned", Site.parse(site)).value == pytest.approx(value, rel=1e-3)
    saved = saved_scores(fit.lens)
    assert saved[saved["lens"] == "tuned"]["kl"].tolist() == pytest.approx(frame["kl_tuned"].tolist(), rel=1e-5)


def test_a_fit_that_is_worse_on_held_out_prompts_keeps_its_start_and_says_so(monkeypatch, caplog):
    model = random_model()

    def spoil(_model, _sequences, _batches, fits, _unembed):
        for fit in fits:
            with torch.no_grad():
                fit.weight.fill_(3.0)

    monkeypatch.setattr(tuned_lens, "_epoch", spoil)
    monkeypatch.setattr(tuned_lens._Fit, "judge", lambda fit, _: fit._keep())
    with caplog.at_level(logging.WARNING, logger="workbench"):
        fit = fit_tuned_lens(model, PROMPTS, epochs=1)
    assert fit.kept_start == tuple(lens_sites(model)[:-1])
    assert "is worse than its start on held-out prompts, which is kept" in caplog.text
    assert fit.frame()["kept_start"].all()
    assert (fit.frame()["kl_tuned"] == fit.frame()["kl_start"]).all()
    monkeypatch.undo()
    assert fit_tuned_lens(model, PROMPTS, epochs=0).lens == fit.lens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"holdout": 0.9}, r"holdout=0\.9 must lie in 0\.\.0\.6"),
        ({"alpha": "cv"}, 'is a number or "gcv"'),
        (
            {"sites": [END]},
            r"a lens has translators at resid_pre\.0, resid_post\.0, resid_post\.1; asked for resid_post\.2",
        ),
        ({"sites": []}, "asked for none"),
    ],
)
def test_what_cannot_be_fitted_is_told(still, options, words):
    with pytest.raises(UserError, match=words):
        fit_tuned_lens(still, PROMPTS, **options)


def test_jacobians_are_those_of_autograd():
    model = random_model()
    texts = [{"text": f"w{i}"} for i in (3, 50, 77)]  # after a BOS one token: no other token's output depends on it
    fit = fit_jacobian_lens(model, texts, sites=[0], limit=3)
    found = []
    for text in texts:
        ids = torch.tensor([Sequences.of(model, [text]).ids[0]])

        def end(x, ids=ids):
            with model.edit({Site(0): lambda h, _: torch.cat([h[:, :1], x[None, None]], 1)}), model.read([END]) as read:
                model.run(ids, torch.ones_like(ids))
            return read[END][0, 1]

        with torch.no_grad(), model.read([Site(0)]) as read:
            model.run(ids, torch.ones_like(ids))
        found.append(torch.autograd.functional.jacobian(end, read[Site(0)][0, 1].clone()).T)  # [in, out]
    stack = torch.stack(found).double()
    torch.testing.assert_close(fit.lens.map(Site(0), WIDTH).weight, stack.mean(0).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fit.error[Site(0)], stack.std(0) / 3**0.5, atol=1e-5, rtol=1e-2)
    assert (fit.prompts, fit.tokens) == (3, 3)


def test_the_jacobian_of_blocks_that_add_nothing_is_the_identity(still):
    fit = fit_jacobian_lens(still, PROMPTS[:6], limit=6)
    for site in (Site(0), Site(1)):
        torch.testing.assert_close(fit.lens.map(site, WIDTH).weight, torch.eye(WIDTH), atol=1e-6, rtol=0)
        assert fit.relative_error[site] < 1e-6
    assert fit.relative_error[EMBEDDINGS] > 1e-3
    scores = lens_scores(still, PROMPTS[:6], {"jacobian": fit.lens})
    assert scores.mean_kl("jacobian", Site(0)).value < 1e-6
    assert saved_scores(fit.lens).empty
    with pytest.raises(UserError, match="limit=1: the error of a mean Jacobian needs at least 2 prompts"):
        fit_jacobian_lens(still, PROMPTS, limit=1)
