"""A lens table says what the reference formulas say, of every family, and of a model that is still the whole truth."""

from __future__ import annotations

import pytest
import torch

from probes.lens import Lens
from probes.lens_table import lens_table, token_text
from probes.unembedding import Unembedding
from tests.conftest import FAMILIES, LAYERS, VOCABULARY, WIDTH, make_module, word_tokenizer
from tests.probes.lens_models import hidden, planted
from workbench.adapters.adapter import vector
from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap
from workbench.models import Model, load
from workbench.sites import Site

TEXT = {"text": "w3 w14 w15 w92 w65 w35"}


def quick(family: str) -> Model:
    return load(make_module(family), tokenizer=word_tokenizer(), prove=False)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_cell_is_the_reference_formula(family):
    model = quick(family)
    table, unembed = lens_table(model, TEXT), Unembedding.of(model)
    with torch.inference_mode():
        states = hidden(model, table.ids)
        p = model.logits(table.ids[None], torch.ones_like(table.ids[None]))[0].double().log_softmax(-1)
        answers = p.argmax(-1)
        assert torch.equal(table.answers, answers)
        for i, h in enumerate(states):
            q = unembed.logits(h).double().log_softmax(-1)
            torch.testing.assert_close(table.entropy[i].double(), -(q.exp() * q).sum(-1), atol=2e-6, rtol=1e-6)
            torch.testing.assert_close(table.kl[i].double(), (p.exp() * (p - q)).sum(-1), atol=2e-6, rtol=1e-6)
            mine = q[torch.arange(len(h)), answers]
            torch.testing.assert_close(table.answer_probability[i].double(), mine.exp(), atol=1e-6, rtol=1e-6)
            rank = 1 + (unembed.logits(h) > unembed.logits(h).gather(1, answers[:, None])).sum(-1)
            assert table.answer_rank[i].tolist() == rank.tolist()
            assert table.top_ids[i].tolist() == unembed.logits(h).topk(5).indices.tolist()
    assert table.kl[-1].max() < 1e-6
    assert table.answer_rank[-1].tolist() == [1] * len(table)


@pytest.mark.parametrize(("family", "still"), [("llama", 1), ("gemma2", 2), ("gpt2", 1)])
def test_from_where_blocks_add_nothing_the_lens_is_exact(family, still):
    model = planted(family, still)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if any(f".{layer}." in name for layer in range(still, LAYERS)) and name.endswith("bias"):
                parameter.zero_()
    table = lens_table(model, TEXT)
    for site, kl, rank in zip(table.sites, table.kl, table.answer_rank, strict=True):
        if site.point == "resid_post" and site.layer >= still - 1:
            assert kl.max() < 1e-6
            assert rank.tolist() == [1] * len(table)
        else:
            assert kl.max() > 1e-3


def test_pieces_of_a_long_prompt_are_those_of_the_whole(monkeypatch):
    model = quick("llama")
    text = {"text": " ".join(f"w{i % 170}" for i in range(100))}
    whole = lens_table(model, text)
    monkeypatch.setattr("probes.unembedding.LOGIT_BUDGET", 7 * VOCABULARY)
    monkeypatch.setattr("probes.lens_table.HELD", 20 * VOCABULARY)
    seen: list[int] = []
    plain = Unembedding.logits
    monkeypatch.setattr(Unembedding, "logits", lambda self, states: (seen.append(len(states)), plain(self, states))[1])
    parts = lens_table(model, text)
    assert max(seen[1:]) == 7, "no more rows at once than the budget allows; the first call is the proof's"
    for name in ("entropy", "kl", "answer_probability", "answer_rank"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
    last = lens_table(model, text, last=3)
    assert last.positions.tolist() == [98, 99, 100]
    torch.testing.assert_close(last.kl, whole.kl[:, -3:], atol=1e-5, rtol=1e-5)


def test_a_translator_is_applied_at_its_site_alone(llama):
    shift = LinearMap(torch.zeros(WIDTH, WIDTH), torch.linspace(-9, 9, WIDTH))
    lens = Lens("tuned", {Site(0): shift}, dict(llama.fingerprint))
    plain, tuned = lens_table(llama, TEXT), lens_table(llama, TEXT, lens)
    same = [torch.equal(a, b) for a, b in zip(plain.entropy, tuned.entropy, strict=True)]
    assert same == [True, False, *[True] * (LAYERS - 1)]


def test_an_adapter_acts_from_its_site_on_and_at_strength_0_not_at_all(llama):
    adapter = vector(Site(1), torch.linspace(-3, 3, WIDTH), positions="last", base=dict(llama.fingerprint), name="push")
    plain, pushed = lens_table(llama, TEXT), lens_table(llama, TEXT, adapter=adapter)
    assert pushed.adapter == "push"
    assert torch.equal(plain.entropy[:2], pushed.entropy[:2])
    assert torch.equal(plain.entropy[:, :-1], pushed.entropy[:, :-1])
    assert not torch.isclose(plain.entropy[2:, -1], pushed.entropy[2:, -1]).any()
    off = lens_table(llama, TEXT, adapter=adapter * 0)
    assert torch.equal(off.entropy, plain.entropy)
    again = lens_table(llama, TEXT, answers=pushed.answers)
    assert again.answer_kind == "given"
    assert torch.equal(again.answers, pushed.answers)


def test_answers_may_be_the_tokens_that_follow(llama):
    table = lens_table(llama, TEXT, answers="next")
    assert table.answers.tolist() == [*table.ids[1:].tolist(), -1]
    assert table.answer_rank[:, -1].isnan().all()
    assert not table.answer_rank[:, :-1].isnan().any()
    assert table.frame()["answer"].iloc[len(table) - 1] == ""


def test_the_frame_and_the_cells_agree_and_a_notebook_shows_text_as_text(llama):
    table = lens_table(llama, TEXT, top=3)
    frame = table.frame()
    assert len(frame) == (LAYERS + 1) * len(table)
    line = frame[(frame["site"] == "resid_post.1") & (frame["position"] == 2)].iloc[0]
    top = table.top(1, 2)
    assert (line["top"], line["top_probability"]) == (top["token"][0], pytest.approx(top["probability"][0]))
    assert table.top("resid_post.1", -1).equals(table.top(1, len(table) - 1))
    table.texts.update(dict.fromkeys(table.texts, "<script>alert(1)</script>"))
    html = table._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_tokens_are_written_with_their_space():
    class Sentencepiece:
        def decode(self, ids):
            return {1: "the", 2: "", 3: ""}[ids[0]]

        def convert_ids_to_tokens(self, token):
            return {1: "▁the", 2: "<0xE2>", 3: None}[token]

    assert [token_text(Sentencepiece(), i) for i in (1, 2, 3)] == [" the", "<0xE2>", "<3>"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ["w1", "w2"]}, "a lens table is of one prompt; got 2"),
        ({"prompt": {"text": " ".join(["w1"] * 200)}}, "the prompt has 201 tokens and .* reads 128"),
        ({"answers": "best"}, "unknown answers 'best'; allowed: final, next, or ids"),
        ({"answers": torch.tensor([1])}, "answers must be one id for each of 7 tokens"),
        ({"top": 0}, "must be at least 1"),
        ({"lens": Lens("tuned", {}, {"name": "other"})}, "this lens belongs to other"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told(llama, options, words):
    given = {"prompt": TEXT, **options}
    if isinstance(given["prompt"], list):
        from workbench.prompts import PromptSet

        given["prompt"] = PromptSet.load(given["prompt"])
    with pytest.raises(UserError, match=words):
        lens_table(llama, given.pop("prompt"), given.pop("lens", None), **given)
    table = lens_table(llama, TEXT)
    with pytest.raises(UserError, match=r"this table has no resid_post\.9"):
        table.top(9, 0)
    with pytest.raises(UserError, match="no token at position 70; it has 0 to 6"):
        table.top(0, 70)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
def test_every_backend_reads_the_same(backend):
    module = make_module("gpt2")
    plain = lens_table(load(module, tokenizer=word_tokenizer(), prove=False), TEXT)
    other = lens_table(load(module, tokenizer=word_tokenizer(), prove=False, backend=backend), TEXT)
    torch.testing.assert_close(other.kl, plain.kl, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.entropy, plain.entropy, atol=1e-5, rtol=0)
