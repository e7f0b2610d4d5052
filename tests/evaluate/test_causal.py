"""Transported states put in the place of the true ones: what must change nothing changes nothing, arms keep their order,
skipping blocks is replacing states, and batches do not matter."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.conftest import make_module, word_tokenizer
from workbench.errors import UserError
from workbench.evaluate import skips
from workbench.evaluate.causal import along, causal_effects, choose, constant, replaced
from workbench.evaluate.scoring import Head, Sequences, ratio_interval, score
from workbench.evaluate.shortcut import (
    block_flops,
    greedy_skips,
    runs_of,
    saved_share,
    shortcut_curve,
    skipped,
)
from workbench.maps.fit import fit_ridge
from workbench.maps.linear_map import LinearMap
from workbench.models import Model, load
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.rendering import pad
from workbench.sites import Site


def texts(n: int = 7) -> list[dict[str, str]]:
    return [{"text": " ".join(f"w{(7 * i + 3 * j * j) % 150}" for j in range(4 + 3 * i))} for i in range(n)]


def near(model: Model, scale: float = 0.1, seed: int = 0) -> LinearMap:
    noise = torch.randn(model.width, model.width, generator=torch.Generator().manual_seed(seed))
    return LinearMap(torch.eye(model.width) + scale * noise / model.width**0.5, scale * noise[0])


def test_the_identity_at_its_own_site_changes_exactly_nothing(small_model):
    identity = LinearMap.identity(small_model.width)
    for positions in ("all+special", "last", [0, 2, 5]):
        found = causal_effects(small_model, texts(), 1, 1, identity, positions=positions).arms["transported"]
        for figure in (found.delta, found.kl):
            assert (figure.value, figure.low, figure.high) == (0.0, 0.0, 0.0)
        assert found.agreement.value == 1.0


def test_the_true_state_changes_nothing(small_model):
    """J = all, y_hat = y: the states of a pass of its own, written in the place of themselves."""
    sequences = Sequences.of(small_model, texts())
    ids, mask = pad(sequences.ids, small_model.pad_id, "right")
    with torch.inference_mode(), small_model.read([Site(2)]) as seen:
        small_model.run(ids, mask)
    true = seen[Site(2)][mask.bool()]
    found = causal_effects(small_model, texts(), 0, 2, LinearMap.identity(small_model.width), positions="all+special",
                           arms={"true": lambda x, h: true, "kept": lambda x, h: h}, batch_size=99)  # fmt: skip
    assert found.arms["kept"].delta.value == 0.0
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences.ids[i]))
    rows = true.split([len(row) for row in sequences.ids])
    true = torch.cat([rows[i] for i in order])  # batches are longest first
    found = causal_effects(small_model, texts(), 0, 2, LinearMap.identity(small_model.width), positions="all+special",
                           arms={"true": lambda x, h: true}, batch_size=99)  # fmt: skip
    assert abs(found.arms["true"].delta.value) <= 1e-6
    assert abs(found.arms["true"].kl.value) <= 1e-6
    assert found.n_replaced == sum(map(len, sequences.ids))


def test_what_is_written_is_the_map_of_what_was_read(small_model):
    ids = torch.arange(3, 13)[None]
    mask, operator = torch.ones_like(ids), near(small_model)
    keep = torch.zeros(1, 10, dtype=torch.bool)
    keep[0, [2, 7]] = True
    sites = [Site(0), Site(2)]
    with torch.inference_mode():
        with small_model.read(sites) as plain:
            small_model.logits(ids, mask)
        edit = replaced(small_model, Site(0), Site(2), lambda x, h: operator(x), keep)
        with edit, small_model.read(sites) as seen:
            small_model.logits(ids, mask)
    torch.testing.assert_close(seen[Site(2)][keep], operator(plain[Site(0)][keep]))
    assert torch.equal(seen[Site(2)][~keep], plain[Site(2)][~keep])
    assert torch.equal(seen[Site(0)], plain[Site(0)])


@pytest.mark.parametrize("backend", ["nnsight", "transformer-lens"])
def test_every_backend_scores_its_own_edits(llama, backend):
    other = load(make_module("llama"), tokenizer=word_tokenizer(), backend=backend)
    wanted, found = (causal_effects(model, texts(4), 0, 1, near(model)).arms["transported"] for model in (llama, other))
    assert wanted.kl.value > 1e-4
    assert found.kl.value == pytest.approx(wanted.kl.value, rel=1e-3)
    assert found.delta.value == pytest.approx(wanted.delta.value, rel=1e-3, abs=1e-5)


def test_batches_do_not_matter(small_model):
    operator, direction = near(small_model), torch.randn(small_model.width, generator=torch.Generator().manual_seed(3))
    made = [
        causal_effects(small_model, texts(), 0, 1, operator, mean=direction, direction=direction, batch_size=size)
        for size in (1, 3, 100)
    ]
    for other in made[1:]:
        assert other.arms.keys() == made[0].arms.keys()
        for name, effect in made[0].arms.items():
            assert abs(effect.log_perplexity.value - other.arms[name].log_perplexity.value) <= 1e-5
            assert abs(effect.kl.value - other.arms[name].kl.value) <= 1e-5


@pytest.mark.parametrize("positions", ["all", [1, 3]])
def test_the_figures_are_those_of_plain_logits(small_model, positions):
    """Loss, KL and agreement from whole float64 log-probabilities of one sequence at a time."""
    operator = near(small_model, 0.5)
    found = causal_effects(small_model, texts(), 0, 1, operator, positions=positions)
    sequences = Sequences.of(small_model, texts())
    chosen = choose(small_model, sequences, positions)
    assert positions == "all" or chosen == [positions] * len(sequences)
    losses, kl, agree, n = 0.0, 0.0, 0, 0
    for row, kept in zip(sequences.ids, chosen, strict=True):
        ids = torch.tensor([row])
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        keep[0, kept] = True
        with torch.inference_mode():
            p = small_model.logits(ids, torch.ones_like(ids))[0].double().log_softmax(-1)
            with replaced(small_model, Site(0), Site(1), lambda x, h: operator(x), keep):
                q = small_model.logits(ids, torch.ones_like(ids))[0].double().log_softmax(-1)
        for t in range(len(row) - 1):
            losses -= float(q[t, row[t + 1]])
            kl += float((p[t].exp() * (p[t] - q[t])).sum())
            agree += int(p[t].argmax() == q[t].argmax())
            n += 1
    effect = found.arms["transported"]
    assert effect.log_perplexity.value == pytest.approx(losses / n, abs=1e-5)
    assert effect.kl.value == pytest.approx(kl / n, abs=1e-5)
    assert effect.agreement.value == pytest.approx(agree / n)
    assert found.n_tokens == n


def test_a_feature_edit_moves_one_direction():
    u = torch.tensor([0.0, 3.0, 4.0])
    h, x = torch.randn(5, 3), torch.randn(5, 3)
    out = along(lambda x, h: x, u)(x, h)
    unit = u / 5
    torch.testing.assert_close(out @ unit, x @ unit)
    rest = torch.eye(3) - torch.outer(unit, unit)
    torch.testing.assert_close(out @ rest, h @ rest)
    assert torch.equal(along(constant(torch.zeros(3)), u)(x, h @ rest).round(decimals=5), (h @ rest).round(decimals=5))
    with pytest.raises(UserError, match="length above 0"):
        along(constant(u), torch.zeros(3))


def test_special_tokens_are_left_alone_unless_asked(llama):
    sequences = Sequences.of(llama, ["w1 w2 w3"])
    row = sequences.ids[0]
    named = {p: choose(llama, sequences, p)[0] for p in ("all", "all+special", "last")}
    assert row[0] == llama.tokenizer.bos_token_id
    assert 0 not in named["all"]
    assert named["all+special"] == list(range(len(row)))
    assert named["last"] == [len(row) - 1]
    assert choose(llama, sequences, [0, 2, 400])[0] == [0, 2]


def test_the_arms_keep_their_order_on_a_trained_model():
    """One block in mid-depth: the map beats the identity, which beats the mean, the operator's bias alone and nothing at
    all; the paired intervals do not touch 0. Zero is no lower bound: it may do as little harm as the mean."""
    recipient = load("bundled:recipient")
    with profile_model(recipient, PromptSet.load("bundled:profile")[:200], sites=[1, 2], tokens="all") as store:
        operator, mean = fit_ridge(store.read(1), store.read(2), alpha=1e-4).map, store.read(2).mean(0)
    found = causal_effects(recipient, PromptSet.load("bundled:evaluation_text")[:64], 1, 2, operator, mean=mean)
    for better, worse in (
        ("transported", "identity"),
        ("identity", "mean"),
        ("identity", "bias"),
        ("identity", "zero"),
    ):
        assert found.difference(better, worse).high < 0, (better, worse)
    frame = found.frame()
    assert frame.index[0] == "untouched"
    assert (frame["delta_low"] <= frame["delta"]).all()
    # paired: the difference is far better known than either side
    effect = found.arms["transported"]
    assert effect.delta.high - effect.delta.low < effect.log_perplexity.high - effect.log_perplexity.low


def test_skipping_blocks_is_replacing_states(small_model):
    jumps = {(0, 1): near(small_model), (0, 2): near(small_model, seed=1), (1, 1): near(small_model, seed=2)}
    curve = shortcut_curve(small_model, texts(), jumps, verify=True)
    assert len(curve) == 4
    assert [p.logit_difference == 0 or p.logit_difference < 1e-5 for p in curve.points] == [True] * 4
    assert curve.points[0].blocks == ()
    assert curve.points[0].delta.value == 0.0
    assert [p.saved for p in curve.points] == sorted(p.saved for p in curve.points)
    assert curve.points[-1].blocks == (1, 2)
    assert curve.frame()["blocks"].iloc[-1] == "1 2"


def test_skipped_blocks_do_not_run(family_model):
    """On every family: no submodule of a skipped block is called, and afterwards all is as it was, an error included."""
    ids = torch.arange(3, 13)[None]
    mask, called = torch.ones_like(ids), []
    operator = near(family_model)
    before = family_model.logits(ids, mask)
    inner = [m for m in family_model.block(1).modules() if m is not family_model.block(1)]
    handles = [m.register_forward_hook(lambda *_: called.append(1)) for m in inner]
    with torch.inference_mode(), skipped(family_model, {(0, 1): operator}):
        called.clear()
        with family_model.read([Site(0), Site(1)]) as seen:
            after = family_model.logits(ids, mask)
    assert called == []
    torch.testing.assert_close(seen[Site(1)], operator(seen[Site(0)]))
    assert not torch.allclose(after, before)
    for handle in handles:
        handle.remove()
    with pytest.raises(RuntimeError, match="stop"), skipped(family_model, {(0, 1): operator}):
        raise RuntimeError("stop")
    assert "forward" not in family_model.block(1).__dict__
    assert torch.equal(family_model.logits(ids, mask), before)


def test_the_head_alone_gives_the_models_own_logits(family_model):
    head = Head.of(family_model)
    assert head.alone
    sequences = Sequences.of(family_model, texts(3))
    apart = score(family_model, sequences, {})["untouched"]
    ids, mask = pad(sequences.ids, family_model.pad_id, "right")
    with torch.inference_mode():
        whole = family_model.logits(ids, mask).double().log_softmax(-1)
    for i, row in enumerate(sequences.ids):
        wanted = -sum(float(whole[i, t, row[t + 1]]) for t in range(len(row) - 1))
        assert float(apart.loss[i]) == pytest.approx(wanted, abs=1e-4)


def test_a_head_that_does_not_stand_alone_is_run_whole(llama, monkeypatch):
    operator = near(llama)
    usual = causal_effects(llama, texts(), 0, 1, operator)
    monkeypatch.setattr(Head, "of", classmethod(lambda cls, model: cls(model, False)))
    monkeypatch.setattr("workbench.evaluate.scoring.STATE_BUDGET", 5000)
    monkeypatch.setattr("workbench.evaluate.scoring.LOGIT_BUDGET", 1000)
    whole = causal_effects(llama, texts(), 0, 1, operator)
    for name, effect in usual.arms.items():
        assert whole.arms[name].log_perplexity.value == pytest.approx(effect.log_perplexity.value, abs=1e-5)
        assert whole.arms[name].kl.value == pytest.approx(effect.kl.value, abs=1e-5)


def test_greedy_finds_the_blocks_that_do_nothing(llama):
    """Block 2's output is made to add nothing: it is the first to be skipped, at no cost; budgets and lengths bind."""
    with torch.no_grad():
        block = llama.block(2)
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    jumps = {(1, 1): LinearMap.identity(llama.width), (0, 1): near(llama), (0, 2): near(llama)}
    path = greedy_skips(llama, texts(), jumps, budget=50.0, held_out=texts(4))
    assert [p.blocks for p in path.points] == [(), (2,), (1, 2)]
    assert abs(path.points[1].delta.value) < 1e-6
    both, there = (
        shortcut_curve(llama, text, {(0, 2): jumps[0, 2]}).points[-1].delta.value for text in (texts(), texts(4))
    )
    assert abs(both - there) > 1e-3
    assert path.points[2].delta.value == pytest.approx(there, abs=1e-6), "measured on what is held out"
    assert greedy_skips(llama, texts(), jumps, budget=50.0).points[2].delta.value == pytest.approx(both, abs=1e-6)
    assert len(greedy_skips(llama, texts(), jumps, budget=50.0, max_blocks=1)) == 2
    assert [p.blocks for p in greedy_skips(llama, texts(), jumps, budget=1e-3).points] == [(), (2,)]
    # without an operator for both together, only one may go
    del jumps[0, 2]
    assert len(greedy_skips(llama, texts(), jumps, budget=50.0)) == 2


def test_maps_are_read_once_for_all_batches_and_blocks_looked_at_once(llama, monkeypatch):
    looks, look, reads, read = [], skips._tuple_sizes, [], skips.transport
    monkeypatch.setattr(skips, "_tuple_sizes", lambda *given: looks.append(1) or look(*given))
    monkeypatch.setattr(skips, "transport", lambda operator, model: reads.append(operator) or read(operator, model))
    jumps = {(0, 1): near(llama), (0, 2): near(llama, seed=1), (1, 1): near(llama, seed=2)}
    options = dict(batch_size=2)  # four batches
    curve = shortcut_curve(llama, texts(), jumps, **options)
    assert (len(reads), len(looks)) == (3, 1)
    path = greedy_skips(llama, texts(), jumps, budget=1e9, **options)
    assert (len(reads), len(looks)) == (6, 2)
    # where there is room for one map, sets are measured one after the other
    monkeypatch.setattr(skips, "HELD", 1)
    assert shortcut_curve(llama, texts(), jumps, **options).points == curve.points
    assert (len(reads), len(looks)) == (9, 3)
    assert greedy_skips(llama, texts(), jumps, budget=1e9, **options).points == path.points


def test_flops_are_counted(llama):
    """A hand count of one Llama block: q, o [48 x 48], k, v [48 x 24], gate, up, down [48 x 96], attention over 48."""
    weights = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96
    assert block_flops(llama, 9.0) == [pytest.approx(2 * weights + 4 * 48 * 5)] * llama.n_layers
    whole = 3 * block_flops(llama, 9.0)[0] + 2 * 48 * 199
    assert saved_share(llama, {1, 2}, 9.0) == pytest.approx((2 * block_flops(llama, 9.0)[0] - 2 * 48 * 48) / whole)
    assert runs_of({4, 2, 3, 7}) == [(1, 3), (6, 1)]


def test_a_ratio_has_the_interval_of_its_sequences():
    found = ratio_interval([1.0, 2.0, 3.0, 6.0], [1.0, 1.0, 1.0, 1.0])
    assert found.value == 3.0
    assert found.low < 3.0 < found.high
    assert ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).high == pytest.approx(2.0)
    assert not math.isnan(ratio_interval([2.0], [1.0]).low)


@pytest.mark.parametrize(("early", "late"), [
    ("attn_out.1", "mlp_out.1"), ("resid_mid.1", "resid_post.1"), ("mlp_out.1", "resid_post.1"),
    ("resid_pre.1", "attn_out.1"), ("attn_out.1", "resid_mid.1"), ("resid_post.0", "attn_out.1"),
])  # fmt: skip
def test_inside_a_block_too_the_source_comes_first(llama, early, late):
    assert causal_effects(llama, texts(3), early, late, near(llama)).arms["transported"].kl.value > 0
    with pytest.raises(UserError, match=rf"^{late} is not before {early}; the source of a transport comes first$"):
        causal_effects(llama, texts(3), late, early, near(llama))


@pytest.mark.parametrize("sites", [("resid_post.0", "resid_pre.1"), ("resid_pre.1", "resid_post.0")])
def test_two_names_of_one_place_are_one(llama, sites):
    found = causal_effects(llama, texts(3), *sites, near(llama)).arms
    assert found["identity"].delta.value == 0.0
    same = causal_effects(llama, texts(3), 0, 0, near(llama)).arms
    assert found["transported"].delta.value == pytest.approx(same["transported"].delta.value, abs=1e-6)
    assert found["transported"].kl.value > 0


def test_what_does_not_fit_is_told(llama):
    operator = near(llama)
    cases = [
        (dict(source=2, target=1), r"resid_post\.2 is not before resid_post\.1"),
        (dict(source=0, target=9), "layer 9 is out of range"),
        (dict(operators=LinearMap.identity(7)), "operator 'transported' maps width 7 to 7"),
        (dict(operators={}), "no operator given"),
        (dict(mean=torch.zeros(5)), r"mean must be a vector of width 48; got shape \[5\]"),
        (dict(positions="some"), "unknown tokens 'some'"),
        (dict(positions=[-1]), "token positions from 0 on"),
        (dict(positions=[500]), r"positions \[500\] name no token"),
        (dict(arms={"zero": constant(torch.zeros(48))}), "an arm called 'zero' already"),
        (dict(arms={"untouched": constant(torch.zeros(48))}), "may not be called 'untouched'"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(max_length=1), "needs at least 2 tokens"),
    ]
    for change, message in cases:
        given = {"prompts": texts(2), "source": 0, "target": 1, "operators": operator, **change}
        with pytest.raises(UserError, match=message):
            causal_effects(llama, **given)
    with pytest.raises(UserError, match="no arm 'other'"):
        causal_effects(llama, texts(2), 0, 1, operator).difference("other", "zero")
    for jumps, message in (
        ({}, "no operators given"),
        ({(0, 3): operator}, r"the jump \(0, 3\) does not lie within layers 0 to 2"),
        ({(0, 1): LinearMap.identity(5)}, "maps width 5 to 5; this model has width 48"),
    ):
        with pytest.raises(UserError, match=message):
            shortcut_curve(llama, texts(2), jumps)
    with pytest.raises(UserError, match="skip a block twice"), skipped(llama, {(0, 2): operator, (1, 1): operator}):
        pass
    with pytest.raises(UserError, match="budget must be a positive rise"):
        greedy_skips(llama, texts(2), {(0, 1): operator}, budget=0.0)


def test_texts_begin_as_documents_did_and_position_0_is_left_alone(llama):
    llama.tokenizer = copy.deepcopy(llama.tokenizer)  # others share it
    bos = llama.tokenizer.bos_token_id
    sequences = Sequences.of(llama, [{"text": "w1 w2 w3"}])
    assert sequences.ids[0][0] == bos != sequences.ids[0][1]
    n = len(sequences.ids[0])
    assert choose(llama, sequences, "all") == [list(range(1, n))]
    assert choose(llama, sequences, "all+special") == [list(range(n))]
    llama.tokenizer.bos_token = None
    sequences = Sequences.of(llama, [{"text": "w1 w2 w3"}])
    assert sequences.ids[0][0] != bos
    assert choose(llama, sequences, "all") == [list(range(1, n - 1))]
    assert choose(llama, sequences, "all+special") == [list(range(n - 1))]
    with pytest.raises(UserError, match="none of the sequences has two tokens"):
        Sequences.of(llama, [{"text": "w1"}])
