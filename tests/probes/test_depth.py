"""The residual stream adds up on every family, and the curves over depth are what their formulas say of it."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from probes.depth import DepthCurves, depth_curves
from probes.depth_sums import BLOCK_CURVES, CURVES, PARTS
from probes.lens import Lens
from probes.lens_scores import lens_scores
from probes.unembedding import Unembedding
from tests.conftest import FAMILIES, LAYERS, MORE_FAMILIES, make_model
from tests.probes.lens_models import TEXTS, planted
from tests.test_anatomy import PARALLEL, hooks_of
from tests.transport.routed_model import previous_token_model, word_prompts
from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences
from workbench.models import Model
from workbench.prompts import PromptSet, pad
from workbench.sites import Site

POST_NORM = "opt_post_norm"
"""the one family here whose stream is normed after each sum, so that it is no sum of writes"""
ADDITIVE = sorted({*FAMILIES, *MORE_FAMILIES} - {POST_NORM})
PLAIN = {"lens": False, "attention": False}


@cache
def model_of(family: str) -> Model:
    return make_model(family)


def prompts(n: int = 12) -> PromptSet:
    return PromptSet.load(TEXTS[:n], chat=False)


def batch(model: Model) -> tuple[Tensor, Tensor]:
    rows = Sequences.of(model, prompts()).ids
    return pad([list(row) for row in rows], model.pad_id, "right")


@pytest.mark.parametrize("family", ADDITIVE)
def test_what_a_model_adds_to_its_stream_is_the_sum_of_its_writes(family):
    """h_L - h_0 = sum over layers of attn_out + mlp_out, at every token, to 1e-4 of its length."""
    model = model_of(family)
    ids, mask = batch(model)
    writes = [Site(l, p) for l in range(LAYERS) for p in ("attn_out", "mlp_out")]
    ends = Site(0, "resid_pre"), Site(LAYERS - 1)
    with torch.inference_mode(), model.read([*ends, *writes]) as found:
        model.run(ids, mask)
    moved = (found[ends[1]].double() - found[ends[0]].double())[mask.bool()]
    summed = sum(found[site].double() for site in writes)[mask.bool()]
    assert float(((moved - summed).norm(dim=-1) / moved.norm(dim=-1)).max()) < 1e-4
    without = summed - found[writes[0]].double()[mask.bool()]  # the control: one write short, it does not add up
    assert float(((moved - without).norm(dim=-1) / moved.norm(dim=-1)).max()) > 1e-3
    assert depth_curves(model, prompts(), **PLAIN).identity < 1e-4


def test_a_family_that_norms_its_stream_is_no_sum_and_is_said_to_be_none():
    """There h' = norm(norm(h + a) + m): that holds, the plain sum does not, and no write is handed out for one."""
    model = model_of(POST_NORM)
    ids, mask = batch(model)
    raw: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _, __, out: raw.update({name: out[0] if isinstance(out, tuple) else out})

    gaps = []
    for layer in range(LAYERS):
        block = model.block(layer)
        handles = [block.self_attn.register_forward_hook(keep("a")), block.fc2.register_forward_hook(keep("m"))]
        with torch.inference_mode(), model.read([Site(layer, "resid_pre"), Site(layer)]) as found:
            model.run(ids, mask)
            h, after = found[Site(layer, "resid_pre")], found[Site(layer)]
            m = raw["m"].view(h.shape)
            made = block.final_layer_norm(block.self_attn_layer_norm(h + raw["a"]) + m)
        for handle in handles:
            handle.remove()
        real = mask.bool()
        assert float(((made - after).norm(dim=-1) / after.norm(dim=-1))[real].max()) < 1e-4
        gaps.append(float(((after - h - raw["a"] - m).norm(dim=-1) / (after - h).norm(dim=-1))[real].mean()))
    assert min(gaps) > 0.1
    curves = depth_curves(model, prompts(), lens=False)
    assert math.isnan(curves.identity)
    assert not set(PARTS) & set(curves.curves)
    assert "post-norm" in curves.notes[0]
    assert curves.mean("velocity", 1).value > 0
    with pytest.raises(UserError, match=r"no curve 'write' of .*; there are velocity, "):
        curves.mean("write", 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2", "granite"])
def test_every_curve_is_what_its_formula_says(family):
    """Of each prompt alone, written out from what is read."""
    model, few = model_of(family), prompts(5)
    curves = depth_curves(model, few, attention=False)
    assert curves.parallel == (family in PARALLEL)
    unembed = Unembedding.of(model)
    sites = [Site(0, "resid_pre"), *(Site(l, p) for l in range(LAYERS) for p in ("attn_out", "mlp_out", "resid_post"))]
    for i, row in enumerate(Sequences.of(model, few).ids):
        ids = torch.tensor([row])
        with torch.inference_mode(), model.read(sites) as read:
            model.run(ids, torch.ones_like(ids))
        h = [read[s][0, 1:] for s in [Site(0, "resid_pre"), *(Site(l) for l in range(LAYERS))]]
        wanted: dict[str, list[float]] = {name: [] for name in CURVES if not name.startswith("attention_")}
        wanted["attention_cosine"] = []

        def add(found: dict[str, list[float]] = wanted, **values: Tensor) -> None:
            for name, value in values.items():
                found[name].append(float(value.double().sum()))

        cosine = torch.cosine_similarity
        for l in range(LAYERS):
            a, m = read[Site(l, "attn_out")][0, 1:], read[Site(l, "mlp_out")][0, 1:]
            base = h[l] if curves.parallel else h[l] + a
            size = h[l].norm(dim=-1)
            add(write=(a + m).norm(dim=-1) / size, attention=a.norm(dim=-1) / size, mlp=m.norm(dim=-1) / base.norm(dim=-1),
                write_cosine=cosine(a + m, h[l]), attention_cosine=cosine(a, h[l]), mlp_cosine=cosine(m, base),
                velocity=(h[l + 1] - h[l]).norm(dim=-1) / size)  # fmt: skip
        with torch.inference_mode():
            p = unembed.log_probabilities(h[-1])
            for state in h:
                q = unembed.log_probabilities(state)
                best = [[set(row) for row in x.topk(5).indices.tolist()] for x in (p, q)]
                both = [len(a & b) / 5 for a, b in zip(*best, strict=True)]
                unit = state / state.norm(dim=-1, keepdim=True)
                n = len(state)
                pairs = (unit @ unit.T)[~torch.eye(n, dtype=torch.bool)]
                add(norm=state.norm(dim=-1), final_cosine=cosine(state, h[-1]), kl=(p.exp() * (p - q)).sum(-1),
                    overlap=torch.tensor(both), pair_cosine=pairs.mean(),
                    constant_share=n * state.mean(0).square().sum() / state.square().sum())  # fmt: skip
        for name, values in wanted.items():
            torch.testing.assert_close(
                curves.sums[name][:, i], torch.tensor(values).double(), atol=2e-4, rtol=2e-4, msg=name
            )
    assert curves.mean("final_cosine", LAYERS - 1).value == pytest.approx(1, abs=1e-6)
    assert curves.mean("overlap", LAYERS - 1).value == 1
    assert curves.mean("kl", LAYERS - 1).value == pytest.approx(0, abs=1e-6)


def test_streamed_in_batches_or_in_one_it_is_the_same(small_model):
    whole, parts = (depth_curves(small_model, prompts(20), batch_tokens=size) for size in (4096, 1))
    assert whole.curves == list(CURVES)
    for name in CURVES:
        torch.testing.assert_close(whole.sums[name], parts.sums[name], atol=1e-3, rtol=1e-3, equal_nan=True)
        assert torch.equal(whole.counts[name], parts.counts[name])
    torch.testing.assert_close(whole.means, parts.means, atol=1e-4, rtol=1e-4)
    assert whole.uniform_entropy == pytest.approx(parts.uniform_entropy)


def test_the_lens_curve_is_that_of_the_lens(small_model):
    """But for position 0, which a prompt without BOS keeps there."""
    curves = depth_curves(small_model, prompts(), attention=False)
    scores = lens_scores(small_model, prompts(), {"logit": Lens()})
    for layer, site in zip(range(-1, LAYERS), scores.sites, strict=True):
        mine, theirs = curves.mean("kl", layer), scores.mean_kl("logit", site)
        assert (mine.value, mine.low, mine.high) == pytest.approx(
            (theirs.value, theirs.low, theirs.high), rel=1e-4, abs=1e-6
        )


def test_blocks_that_add_nothing_have_no_write():
    model = planted("llama", 1)
    curves = depth_curves(model, prompts(), attention=False)
    assert curves.mean("velocity", 0).value > 0.1
    for layer in (1, 2):
        assert curves.mean("velocity", layer).value == 0
        assert curves.mean("kl", layer).value == pytest.approx(0, abs=1e-6)
    assert curves.mean("kl", -1).value > 0.01


def test_attention_that_is_known_by_construction_is_read_so():
    """Every token attends to the one before it alone, in every layer."""
    model = previous_token_model()
    texts = PromptSet.load(word_prompts(6, 12), chat=False)
    curves = depth_curves(model, texts, lens=False)
    assert curves.mean("attention_entropy", 1).value == pytest.approx(0, abs=1e-6)
    assert math.isnan(curves.mean("attention_similarity", 0).value)
    assert curves.mean("attention_similarity", 2).value == pytest.approx(1, abs=1e-6)
    lengths = [len(row) for row in Sequences.of(model, texts).ids]
    even = [math.log(place + 1) for n in lengths for place in range(1, n)]
    assert curves.uniform_entropy == pytest.approx(sum(even) / len(even))
    line = curves.frame().query("curve == 'attention_similarity' and layer == '0'")
    assert line["value"].isna().all()


def test_what_it_shows(small_model):
    before = hooks_of(small_model.module)
    curves = depth_curves(small_model, prompts(), **PLAIN)
    assert hooks_of(small_model.module) == before
    table = curves.frame()
    assert set(table["curve"]) == set(curves.curves)
    assert len(table) == sum(LAYERS + (name not in BLOCK_CURVES) for name in curves.curves)
    assert (table["low"] <= table["value"]).all()
    assert "embeddings" in curves._repr_html_()
    assert repr(curves).startswith("DepthCurves(")
    with pytest.raises(UserError, match=r"no layer -1 in write; it has 0 to 2"):
        curves.mean("write", -1)
    with pytest.raises(UserError, match=r"no layer 3 in norm; it has -1 to 2"):
        curves.mean("norm", LAYERS)


def test_what_is_not_finite_is_refused(llama):
    with torch.no_grad():
        llama.block(1).mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="states after the last block hold NaN or Inf; load it in float32"):
        depth_curves(llama, prompts(), **PLAIN)


def test_half_precision_adds_up_to_its_rounding():
    from tests.conftest import make_module, word_tokenizer
    from workbench.models import load

    curves: DepthCurves = depth_curves(
        load(make_module("llama").bfloat16(), tokenizer=word_tokenizer()), prompts(), **PLAIN
    )
    assert 1e-4 < curves.identity < 0.05
