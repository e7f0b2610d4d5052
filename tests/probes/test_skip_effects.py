"""Skipped layers: what is measured in copies of a batch is what passes of their own give, and still layers do nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from probes.depth import depth_curves
from probes.skip_effects import SkipEffects, layer_effects
from tests.conftest import LAYERS, make_model, make_module, word_tokenizer
from tests.probes.lens_models import TEXTS, planted
from tests.test_anatomy import hooks_of
from workbench.errors import UserError
from workbench.evaluate.layer_changes import LayerChange, changed_copies
from workbench.evaluate.scoring import Sequences
from workbench.models import Model, load
from workbench.prompts import PromptSet
from workbench.sites import Site

TEXTS_OF_4 = PromptSet.load([*TEXTS[:6], *TEXTS[40:44]], chat=False)
EVERY = [Site(0, "resid_pre"), *(Site(l) for l in range(LAYERS))]


def passed(model: Model, ids: Tensor, edits: dict | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(what goes into each block, what comes out, next-token probabilities) of one prompt."""
    points = [Site(l, p) for l in range(LAYERS) for p in ("resid_pre", "resid_post")]
    with torch.inference_mode(), model.edit(edits or {}), model.read(points) as found:
        logits = model.logits(ids, torch.ones_like(ids))
    ins, outs = ([found[Site(l, p)][0] for l in range(LAYERS)] for p in ("resid_pre", "resid_post"))
    return ins, outs, logits[0].float().softmax(-1)


def mixed(at: Tensor, new: Tensor, old: Tensor) -> Any:
    """An edit that writes `new` at some tokens and `old` at the others."""
    states = torch.where(at[:, None], new, old)[None]
    return lambda h, _: states


def relative(plain: Tensor, other: Tensor, counted: slice) -> list[float]:
    ratio = ((plain - other).norm(dim=-1) / plain.norm(dim=-1))[counted]
    return [float(ratio.max()), float(ratio.mean())]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bloom", "opt_post_norm"])
@pytest.mark.parametrize(("kind", "scope"), [("skip", "future"), ("skip", "all"), ("local", "all"), ("local", "future"),
                                             ("erase", "future")])  # fmt: skip
def test_effects_are_those_of_passes_of_their_own(family, kind, scope):
    model = make_model(family)
    means = torch.randn(LAYERS, model.width, generator=torch.Generator().manual_seed(1))
    found = layer_effects(model, TEXTS_OF_4, kind=kind, scope=scope, means=dict(enumerate(means)))
    assert found.layers == tuple(range(LAYERS))
    for i, row in enumerate(Sequences.of(model, TEXTS_OF_4).ids):
        ids = torch.tensor([row])
        ins, outs, y = passed(model, ids)
        writes = [b - a for a, b in zip(ins, outs, strict=True)]
        t = int(found.split[i])
        assert 1 <= t <= len(row) - 2
        at = torch.zeros(len(row), dtype=torch.bool)
        at[slice(None) if scope == "all" else slice(t, t + 1) if kind == "erase" else slice(t + 1)] = True
        counted = slice(1, None) if scope == "all" else slice(t + 1, None)
        for s in range(LAYERS):
            if kind == "local":  # the inputs of all later blocks are pinned: nothing goes on
                pinned = {Site(l, "resid_pre"): mixed(at, ins[l] - writes[s], ins[l]) for l in range(s + 1, LAYERS)}
                measured = passed(model, ids, pinned)
                other = passed(model, ids, {Site(LAYERS - 1): mixed(at, outs[-1] - writes[s], outs[-1])})[2]
            else:
                new = ins[s] if kind == "skip" else means[s].expand_as(outs[s])
                measured = passed(model, ids, {Site(s): mixed(at, new, outs[s])})
                other = measured[2]
            for l in range(s + 1, LAYERS):
                wanted = relative(writes[l], measured[1][l] - measured[0][l], counted)
                assert found.later[:, s, l, i].tolist() == pytest.approx(wanted, rel=5e-3, abs=2e-4), (s, l)
            moved = (y - other).norm(dim=-1)[counted]
            assert found.outputs[:, s, i].tolist() == pytest.approx(
                [float(moved.max()), float(moved.mean())], rel=5e-3, abs=1e-5
            )
            assert bool(found.later[:, s, : s + 1, i].isnan().all())


def test_however_many_share_a_pass_it_is_the_same(small_model):
    wide, narrow = (layer_effects(small_model, TEXTS_OF_4, batch_tokens=size) for size in (8192, 1))
    torch.testing.assert_close(wide.later, narrow.later, atol=1e-4, rtol=1e-3, equal_nan=True)
    torch.testing.assert_close(wide.outputs, narrow.outputs, atol=1e-5, rtol=1e-3)
    few = layer_effects(small_model, TEXTS_OF_4, layers=[-1, 1])
    assert few.layers == (1, LAYERS - 1)
    torch.testing.assert_close(few.outputs, wide.outputs[:, [1, LAYERS - 1]], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("backend", ["nnsight", "transformer-lens"])
def test_every_backend_gives_the_same(backend):
    plain, other = (load(make_module("llama"), tokenizer=word_tokenizer(), backend=name) for name in ("hooks", backend))
    for kind in ("skip", "local"):
        wanted, found = (layer_effects(model, TEXTS_OF_4[:3], kind=kind, scope="all") for model in (plain, other))
        torch.testing.assert_close(found.outputs, wanted.outputs, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(found.later, wanted.later, atol=1e-4, rtol=1e-3, equal_nan=True)


def test_the_last_layer_cannot_touch_a_later_token(small_model):
    found = layer_effects(small_model, TEXTS_OF_4)
    assert float(found.outputs[:, -1].abs().max()) == 0
    assert float(found.outputs[:, 0].min()) > 0
    assert float(layer_effects(small_model, TEXTS_OF_4, scope="all").outputs[:, -1].min()) > 0, "but its own"


def test_a_layer_that_adds_nothing_has_no_effect():
    model = planted("gpt2", 1)
    for kind, scope in (("skip", "all"), ("skip", "future"), ("local", "all")):
        found = layer_effects(model, TEXTS_OF_4, kind=kind, scope=scope)
        assert float(found.outputs[:, 1:].abs().max()) == 0
        assert float(found.later[:, 1, 2].abs().max()) == 0
    assert float(layer_effects(model, TEXTS_OF_4, scope="all").outputs[:, 0].min()) > 0


def test_erasing_what_no_later_token_reads_does_nothing():
    """After block 0 nothing is read from another token; before it the erased state is in nobody's reach."""
    model = planted("llama", 1)
    means = dict(enumerate(depth_curves(model, TEXTS_OF_4, lens=False, attention=False).means))
    assert float(layer_effects(model, TEXTS_OF_4, kind="erase", means=means).outputs.abs().max()) == 0
    whole = make_model("llama")
    assert float(layer_effects(whole, TEXTS_OF_4, kind="erase", means=means).outputs[:, 0].min()) > 0


def test_the_first_copy_is_the_untouched_model(llama):
    ids = torch.randint(3, 170, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    real = mask.bool()
    before = hooks_of(llama.module)
    with torch.inference_mode():
        plain = llama.logits(ids, mask)
        with changed_copies(llama, [LayerChange(0), LayerChange(1, "local")], real, real) as copies:
            found = llama.logits(copies.repeated(ids), copies.repeated(mask))
    torch.testing.assert_close(found[:3], plain, atol=1e-4, rtol=1e-4)
    assert float((found[3:6] - plain).abs().max()) > 1e-2
    with pytest.raises(RuntimeError, match="on purpose"), changed_copies(llama, [LayerChange(0)], real, real):
        raise RuntimeError("on purpose")
    with (
        pytest.raises(UserError, match="no pass went through the changed layers"),
        changed_copies(llama, [LayerChange(0)], real, real),
    ):
        pass
    assert hooks_of(llama.module) == before


def test_prompts_too_short_for_a_later_token_are_counted(llama):
    found = layer_effects(llama, PromptSet.load(["w3", "w4 w5 w6 w7", "w8 w9"], chat=False))
    assert (found.left_out, found.index) == (1, (1, 2))
    assert found.split.tolist()[1] == 1


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("unknown change of a layer 'swap'; allowed: skip, local, erase", {"kind": "swap"}),
        ("unknown scope 'past' of an effect; allowed: future, all", {"scope": "past"}),
        ("take scope='future'", {"kind": "erase", "scope": "all"}),
        ("layer 7 is out of range: the model has layers 0 to 2", {"layers": [7]}),
        ("no layers to change", {"layers": []}),
        ("to erase what block 0 leaves, give the mean state after it", {"kind": "erase"}),
    ],
)
def test_what_cannot_be_measured_is_told(llama, words, given):
    with pytest.raises(UserError, match=words):
        layer_effects(llama, TEXTS_OF_4, **given)


def test_prompts_without_a_later_token_are_refused(llama):
    with pytest.raises(UserError, match="no prompt has 3 tokens, as effects on future tokens need"):
        layer_effects(llama, PromptSet.load(["w3"], chat=False))
    with pytest.raises(UserError, match="unknown change of a layer 'x'"):
        LayerChange(0, "x")


def made(outputs: Tensor, layers: tuple[int, ...], depth: int) -> SkipEffects:
    n = outputs.shape[-1]
    later = torch.full((2, len(layers), depth, n), math.nan, dtype=torch.float64)
    for i, l in enumerate(layers):
        later[:, i, l + 1 :] = 0.5
    return SkipEffects(
        "m", "skip", "future", layers, depth, later, outputs, torch.ones(n, dtype=torch.long), tuple(range(n)), 0
    )


def test_the_halves_leave_the_last_layer_out():
    one = torch.tensor([[4.0, 4.0, 2.0], [2.0, 2.0, 1.0], [1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    found = made(torch.stack([one, one]).double(), tuple(range(5)), 5)
    assert found.halves().value == pytest.approx((4 + 2 + 1) / 3 / 1)
    assert found.output(0).value == pytest.approx(10 / 3)
    with pytest.raises(UserError, match="do not lie in both halves"):
        made(torch.stack([one[3:], one[3:]]).double(), (3, 4), 5).halves()
    with pytest.raises(UserError, match="unknown statistic 'median' over tokens; allowed: max, mean"):
        found.output(0, "median")
    with pytest.raises(UserError, match="layer 9 was not changed; there are 0, 1, 2, 3, 4"):
        found.output(9)
    with pytest.raises(UserError, match="layer 1 does not come after layer 1"):
        found.effect(1, 1)
    table = found.frame()
    assert len(table) == 5 + 10
    assert table[table["later"] == "output"]["max"].tolist()[-1] == 0
    assert found.matrix().loc[0, 3] == 0.5
    assert "output" in found._repr_html_()
    assert repr(found) == "SkipEffects(skip, 5 of 5 layers of m, future tokens, 3 prompts)"
