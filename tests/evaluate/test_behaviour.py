"""Log-odds and text shifts against slow, direct computations on random models."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.adapters.adapter import Adapter, LowRank, vector
from workbench.errors import UserError
from workbench.evaluate.batch_tasks import set_log_odds
from workbench.evaluate.behaviour import Behaviour, kl_on_text, log_odds, measure
from workbench.models import Model
from workbench.prompts import PromptSet, encode, opener_ids
from workbench.sites import Site

OPENERS = ("w3 w4", "w9", "w3 w8")


@pytest.fixture
def prompts() -> PromptSet:
    texts = ["w1", "w5 w6 w7 w8 w9 w10 w11", "w2 w2", "w30 w31 w32 w33", "w4 w40"]
    return PromptSet.load([{"prompt": t, "gold": "1"} for t in texts])


@pytest.fixture
def texts() -> PromptSet:
    rows = [" ".join(f"w{(7 * i * n + 3) % 150}" for i in range(4 + 3 * n)) for n in range(1, 6)]
    return PromptSet.load([{"text": row} for row in rows])


def adapter(model: Model, positions: str = "last") -> Adapter:
    g = torch.Generator().manual_seed(0)
    v, b, u = (torch.randn(*shape, generator=g) for shape in ((model.width, 2), (2,), (2, model.width)))
    return Adapter({Site(1): LowRank(0.3 * v, b, 0.3 * u)}, positions=positions)


def single_logits(model: Model, ids: list[int]) -> torch.Tensor:
    row = torch.tensor([ids])
    with torch.inference_mode():
        return model.module(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]


def test_log_odds_are_those_of_the_plain_softmax_in_prompt_order(small_model, prompts):
    chosen = opener_ids(OPENERS, small_model.tokenizer, prompts[0])
    assert len(chosen) == 2  # two openers share their first token
    found = log_odds(small_model, prompts, OPENERS)
    for i, ids in enumerate(encode(prompts, small_model.tokenizer)):
        p = single_logits(small_model, ids)[-1].double().softmax(-1)[chosen].sum()
        assert found[i].item() == pytest.approx(float(p.log() - (1 - p).log()), abs=1e-4)


def test_log_odds_do_not_depend_on_the_batch(small_model, prompts):
    one = log_odds(small_model, prompts, OPENERS, adapter(small_model), batch_size=1)
    torch.testing.assert_close(log_odds(small_model, prompts, OPENERS, adapter(small_model)), one, atol=1e-4, rtol=1e-4)


def test_adapters_move_log_odds_and_strength_0_does_not(small_model, prompts):
    plain, pasted = log_odds(small_model, prompts, OPENERS), adapter(small_model)
    assert torch.equal(log_odds(small_model, prompts, OPENERS, pasted * 0), plain)
    assert (log_odds(small_model, prompts, OPENERS, pasted) - plain).abs().max() > 1e-2


def test_set_log_odds_are_exact_where_p_is_near_one():
    logits = torch.tensor([[60.0, 0.0, 0.0], [-60.0, 0.0, 0.0]])
    torch.testing.assert_close(set_log_odds(logits, [0]), torch.tensor([60.0, -60.0]).double() - math.log(2))


def test_kl_and_perplexity_are_their_formulas(small_model, texts):
    pasted = adapter(small_model)
    found = kl_on_text(small_model, texts, pasted, split=0.5, batch_size=3)
    kls, losses, tokens = [], {"plain": 0.0, "edited": 0.0}, 0
    for ids in encode(texts, small_model.tokenizer):
        cut = round(0.5 * len(ids))
        plain = single_logits(small_model, ids).double().log_softmax(-1)
        with pasted.on(small_model, prompt_lengths=torch.tensor([cut])):
            edited = single_logits(small_model, ids).double().log_softmax(-1)
        steps = range(cut - 1, len(ids) - 1)
        kls.append(sum(float((plain[i].exp() * (plain[i] - edited[i])).sum()) for i in steps) / len(steps))
        for name, p in (("plain", plain), ("edited", edited)):
            losses[name] -= sum(float(p[i, ids[i + 1]]) for i in steps)
        tokens += len(steps)
    torch.testing.assert_close(found.per_text, torch.tensor(kls).double(), atol=1e-4, rtol=1e-3)
    assert found.kl.value == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert found.n_tokens == tokens
    assert found.perplexity_base == pytest.approx(math.exp(losses["plain"] / tokens), rel=1e-3)
    assert found.perplexity_edited == pytest.approx(math.exp(losses["edited"] / tokens), rel=1e-3)
    assert found.kl.value > 1e-3


def test_no_adapter_and_strength_0_shift_nothing(small_model, texts):
    for nothing in (None, adapter(small_model) * 0):
        found = kl_on_text(small_model, texts, nothing)
        assert found.kl.value == 0
        assert found.perplexity_base == found.perplexity_edited


def test_kl_grows_with_strength_and_split_moves_the_edit(llama, texts):
    small, large = (kl_on_text(llama, texts, adapter(llama) * s).kl.value for s in (0.1, 1.0))
    assert 0 < small < large
    assert kl_on_text(llama, texts, adapter(llama), split=0.3).n_tokens > kl_on_text(llama, texts, None).n_tokens


def test_measure_grades_and_compares_with_base(llama, prompts):
    behaviour = Behaviour("x", OPENERS, "starts_with", {"openers": ["w"]}, score_name="rate of w")
    base = measure(llama, behaviour, prompts, name="base", max_new_tokens=3)
    steered = measure(llama, behaviour, prompts, vector(Site(2), torch.full((llama.width,), 3.0)), max_new_tokens=3)
    assert len(base.answers) == len(base.passed) == len(base.log_odds) == 5
    torch.testing.assert_close(base.log_odds, log_odds(llama, prompts, OPENERS), atol=1e-4, rtol=1e-4)
    row = steered.as_dict(base)
    assert row["n"] == 5
    assert 0 < row["mcnemar_vs_base"] <= 1
    assert row["rate"]["low"] <= row["rate"]["value"] <= row["rate"]["high"]
    assert base.as_dict()["mcnemar_vs_base"] is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: Behaviour("x", (), "regex"), "'x' needs openers"),
        (lambda m: Behaviour("x", ("w1",), "reggae"), "unknown grader 'reggae'"),
        (lambda m: Behaviour("x", ("w1",), "regex"), "needs the argument 'pattern'"),
        (lambda m: kl_on_text(m, PromptSet.load([{"text": "w1 w2"}]), split=1.0), "split must lie between 0 and 1"),
        (lambda m: log_odds(m, ["w1"], ["w1"], batch_size=0), "batch_size must be at least 1"),
        (lambda m: set_log_odds(torch.zeros(1, 2), [0, 1]), "got 2 of 2"),
    ],
)
def test_bad_input_names_the_value(llama, call, says):
    with pytest.raises(UserError, match=says):
        call(llama)
