"""Token by token changes against a slow computation, on random models of every family, with planted changes."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.adapters.adapter import Adapter, LowRank, vector
from workbench.adapters.blend import Blend
from workbench.errors import UserError
from workbench.evaluate import token_changes as module
from workbench.evaluate.dose import prompt_dose
from workbench.evaluate.scoring import Head
from workbench.evaluate.token_changes import token_changes
from workbench.models import Model
from workbench.prompts import encode, response_ids
from workbench.sites import Site

PROMPT, ANSWER = "w5 w6 w7 w8 w9", "w20 w21 w22"


def push(model: Model, positions: str = "last", size: float = 3.0, layer: int = 1) -> Adapter:
    v = torch.randn(model.width, generator=torch.Generator().manual_seed(0))
    return vector(Site(layer), size * v, positions=positions)


def logits(model: Model, ids: list[int]) -> torch.Tensor:
    row = torch.tensor([ids])
    with torch.inference_mode():
        return model.module(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0].double()


def test_numbers_are_those_of_the_plain_definition(family_model):
    adapter = push(family_model, "all")
    found = token_changes(family_model, (PROMPT, ANSWER), adapter, top=4)
    p = logits(family_model, list(found.ids)).log_softmax(-1)
    with adapter.on(family_model):
        q = logits(family_model, list(found.ids)).log_softmax(-1)
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(-1), atol=2e-4, rtol=2e-3)
    following = torch.tensor(found.ids[1:])
    for mine, slow in ((found.log_prob_before, p), (found.log_prob_after, q)):
        torch.testing.assert_close(mine[:-1], slow[:-1].gather(1, following[:, None])[:, 0], atol=2e-3, rtol=1e-3)
        assert math.isnan(mine[-1])
    torch.testing.assert_close(found.likely_after.after, q.exp().topk(4).values, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.likely_before.before, p.exp().topk(4).values, atol=1e-3, rtol=1e-3)


def test_a_prompt_edited_at_its_last_token_changes_from_there_on_and_nowhere_before(family_model):
    found = token_changes(family_model, (PROMPT, ANSWER), push(family_model))
    last = found.prompt_length - 1
    assert found.kl[:last].tolist() == [0.0] * last
    assert found.kl[last] > 1e-4
    assert (found.kl[last + 1 :] > 0).all()  # what follows reads the edited token
    alone = token_changes(family_model, PROMPT, push(family_model))
    assert len(alone) == alone.prompt_length == found.prompt_length
    assert alone.largest == last
    assert alone.kl[last] == pytest.approx(float(found.kl[last]), rel=1e-3)


def test_at_the_last_layer_only_the_edited_position_changes(family_model):
    # nothing reads the last block's output but the head: a planted change of one position's logits
    adapter = push(family_model, layer=family_model.n_layers - 1)
    found = token_changes(family_model, (PROMPT, ANSWER), adapter)
    assert found.kl.nonzero()[:, 0].tolist() == [found.prompt_length - 1]


def test_the_token_that_is_pushed_for_comes_out_on_top(llama):
    head = llama.module.get_output_embeddings().weight.detach()
    wanted = llama.tokenizer.convert_tokens_to_ids("w33")
    adapter = vector(Site(llama.n_layers - 1), 50 * head[wanted] / head[wanted].norm())
    found = token_changes(llama, PROMPT, adapter)
    table = found.at(found.largest)
    assert table["token"][0] == "w33"
    assert table["after"][0] > 3 * table["before"][0]
    assert found.frame()["likeliest_after"].iloc[-1] == "w33"
    # each token once, likeliest first, probabilities that are some
    assert table["id"].is_unique
    assert (table[["before", "after"]].max(axis=1).diff().dropna() <= 0).all()


def test_at_strength_0_nothing_changes_at_all(family_model):
    adapter = push(family_model, "all")
    for idle in (adapter * 0, Blend([adapter * 0, adapter * 0])):
        found = token_changes(family_model, (PROMPT, ANSWER), idle)
        assert found.kl.tolist() == [0.0] * len(found)
        assert torch.equal(found.log_prob_before[:-1], found.log_prob_after[:-1])
        assert torch.equal(found.likely_before.after, found.likely_after.before)


def test_a_part_that_adds_nothing_changes_nothing_though_it_is_hooked(small_model):
    silent = vector(Site(1), torch.zeros(small_model.width), positions="all")
    assert float(token_changes(small_model, (PROMPT, ANSWER), silent).kl.max()) == 0.0


def test_generated_positions_are_those_of_the_answer(small_model):
    found = token_changes(small_model, (PROMPT, ANSWER), push(small_model, "generated"))
    assert found.kl[: found.prompt_length].tolist() == [0.0] * found.prompt_length
    assert (found.kl[found.prompt_length :] > 0).all()
    asked, said = response_ids_of(small_model)
    assert found.ids == (*asked, *said)
    assert found.tokens[-3:] == ("w20", "w21", "w22")


def test_white_space_around_an_answer_is_no_token_of_it(small_model):
    adapter = push(small_model)
    plain, spaced = (token_changes(small_model, (PROMPT, text), adapter) for text in (ANSWER, f" \n{ANSWER} "))
    assert plain.ids == spaced.ids
    assert token_changes(small_model, (PROMPT, "  "), adapter).ids == token_changes(small_model, PROMPT, adapter).ids


def response_ids_of(model: Model) -> tuple[list[int], list[int]]:
    from workbench.prompts import PromptSet

    return response_ids(PromptSet.load([PROMPT])[0], ANSWER, model.tokenizer, end=False)


def test_a_schedule_over_the_answer_is_followed(small_model):
    blend = Blend([push(small_model, "generated", layer=small_model.n_layers - 1)], "first:1")
    found = token_changes(small_model, (PROMPT, ANSWER), blend)
    assert found.kl.nonzero()[:, 0].tolist() == [found.prompt_length]


@pytest.mark.parametrize("alone", [True, False])
def test_pieces_give_what_the_whole_gives_and_are_small(small_model, monkeypatch, alone):
    if not alone:  # a family whose head cannot be told apart
        monkeypatch.setattr(module.Head, "of", classmethod(lambda cls, model: Head(model, False)))
    whole = token_changes(small_model, (PROMPT, ANSWER), push(small_model))
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2 * 199)
    sizes, plain = [], module._compare
    monkeypatch.setattr(module, "_compare", lambda p, q, *rest: sizes.append(len(p)) or plain(p, q, *rest))
    pieces = token_changes(small_model, (PROMPT, ANSWER), push(small_model))
    torch.testing.assert_close(pieces.kl, whole.kl, atol=1e-5, rtol=1e-4)
    assert torch.equal(pieces.likely_after.ids, whole.likely_after.ids)
    assert max(sizes) == 2
    assert sum(sizes) == len(whole)


def test_a_token_of_no_probability_is_no_hole():
    p = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64).log_softmax(-1)
    kl, *_ = module._compare(p, p, torch.tensor([[0]]), 2)
    assert kl.tolist() == [0.0]


def test_more_tokens_than_the_vocabulary_are_all_of_it(llama):
    found = token_changes(llama, PROMPT, push(llama), top=10_000)
    assert len(found.at(0)) == 199
    assert found.at(0)["after"].sum() == pytest.approx(1)


def test_what_cannot_be_compared_is_refused_in_one_line(llama, gpt2):
    adapter = push(llama)
    for text, message in (
        (" ".join(["w1"] * 400), r"takes 4\d\d tokens and LlamaForCausalLM reads 128"),
        ((PROMPT, " ".join(["w1"] * 400)), "reads 128; give a shorter one"),
        ("  ", "is empty"),
    ):
        with pytest.raises(UserError, match=message):
            token_changes(llama, text, adapter)
    with pytest.raises(UserError, match="top 0 is out of range"):
        token_changes(llama, PROMPT, adapter, top=0)
    with pytest.raises(UserError, match="there is no position 99: the text has"):
        token_changes(llama, PROMPT, adapter).at(99)
    stranger = Adapter(dict(adapter.parts), base={"name": "another", "weights": "x"})
    with pytest.raises(UserError, match="belongs to another"):
        token_changes(llama, PROMPT, stranger * 0)


def test_html_shows_text_as_text_and_the_positions_that_changed_most(llama):
    found = token_changes(llama, " ".join(f"w{i}" for i in range(60)), push(llama))
    object.__setattr__(found, "tokens", tuple("<script>alert(1)</script>" for _ in found.tokens))
    shown = found._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert shown.count("<tr>") <= module.ROWS_SHOWN + 1
    assert f"<td>{len(found) - 1}</td>" in shown


# -- over strengths -------------------------------------------------------------------------------------------------------


def test_the_dose_of_a_prompt_is_that_of_its_last_token(small_model):
    adapter = push(small_model)
    dose = prompt_dose(small_model, PROMPT, adapter, (1.0, 0.5), openers=("w33", "w34"))
    assert dose.factors == (0.0, 0.5, 1.0)
    assert dose.kl[0] == 0.0
    for factor, kl in zip(dose.factors[1:], dose.kl[1:].tolist(), strict=True):
        assert kl == pytest.approx(float(token_changes(small_model, PROMPT, adapter * factor).kl[-1]), rel=1e-3)
    from workbench.evaluate.behaviour import log_odds

    slow = [float(log_odds(small_model, [PROMPT], ("w33", "w34"), adapter * f)[0]) for f in dose.factors]
    assert dose.log_odds.tolist() == pytest.approx(slow, abs=1e-4)
    changes = token_changes(small_model, PROMPT, adapter)
    assert dose.likeliest[-1] == changes.at(len(changes) - 1).sort_values("after")["token"].iloc[-1]
    assert "<table" in dose._repr_html_()


def test_a_blend_has_a_dose_too_and_generated_tokens_none_yet(small_model):
    found = prompt_dose(small_model, PROMPT, Blend([push(small_model, "generated")], "linear:4"))
    assert found.kl.tolist() == [0.0] * len(found.factors)
    assert found.log_odds is None
    assert found.frame()["log_odds"].isna().all()


def test_doses_that_cannot_be_are_refused(llama):
    with pytest.raises(UserError, match="strengths must be finite"):
        prompt_dose(llama, PROMPT, push(llama), (math.inf,))
    with pytest.raises(UserError, match="reads 128; give a shorter one"):
        prompt_dose(llama, " ".join(["w1"] * 400), push(llama))


def test_an_adapter_that_reads_is_followed_too(small_model):
    g = torch.Generator().manual_seed(1)
    v, b, u = (torch.randn(*shape, generator=g) for shape in ((small_model.width, 2), (2,), (2, small_model.width)))
    adapter = Adapter({Site(0): LowRank(0.3 * v, b, 0.3 * u)}, positions="first:2")
    found = token_changes(small_model, PROMPT, adapter)
    assert (found.kl > 0).all()
    assert len(found) == len(encode_one(small_model))


def encode_one(model: Model) -> list[int]:
    from workbench.prompts import PromptSet

    return encode(PromptSet.load([PROMPT]), model.tokenizer)[0]
