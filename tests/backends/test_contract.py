"""The contract of the backends: what is read, and what an edit does, is the same on all of them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

import pytest
import torch

from tests.backends.test_torch_hooks import PROMPTS, shift
from tests.conftest import make_module, word_tokenizer
from workbench.adapters.adapter import vector
from workbench.errors import UserError
from workbench.models import Model, load
from workbench.prompts import pad
from workbench.sites import Site

OTHERS = ("transformer-lens", "nnsight")
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox", "falcon", "bloom", "granite", "mixtral")
FEW = ("llama", "gpt2", "gemma2", "gpt_neox")
"""rotary and learned positions, norms after the parts, and a parallel block: each family costs two seconds"""
NOT_SUPPORTED = {
    ("falcon_new", "transformer-lens"): "TransformerLens cannot wrap FalconForCausalLM",
    ("opt_post_norm", "transformer-lens"): "TransformerLens wraps OPTForCausalLM .opt. and cannot run it",
}
"""families that a backend does not take; every other family of the tests loads, with the same points, on all three"""


@cache
def model_of(family: str, backend: str) -> Model:
    return load(make_module(family), tokenizer=word_tokenizer(), backend=backend)


@pytest.fixture(params=[f"{family}-{backend}" for family in FAMILIES for backend in OTHERS])
def pair(request: pytest.FixtureRequest) -> tuple[Model, Model]:
    """The same weights on the default backend and on another."""
    family, _, backend = request.param.partition("-")
    return model_of(family, "hooks"), model_of(family, backend)


@pytest.fixture(params=[f"{family}-{backend}" for family in FEW for backend in OTHERS])
def common(request: pytest.FixtureRequest) -> tuple[Model, Model]:
    """A pair of a common family."""
    family, _, backend = request.param.partition("-")
    return model_of(family, "hooks"), model_of(family, backend)


@pytest.fixture(params=("hooks", *OTHERS))
def model(request: pytest.FixtureRequest) -> Model:
    return model_of("gpt2", request.param)


def every_site(model: Model) -> list[Site]:
    return [Site(l, point) for l in range(model.n_layers) for point in model.anatomy[l].points]


def states(model: Model, side: str, *edits) -> dict[str, torch.Tensor]:
    """Everything that can be read under nested edits, and the logits, at real tokens."""
    ids, mask = pad(PROMPTS, 0, side)
    with torch.inference_mode(), ExitStack() as stack:
        for one in edits:
            stack.enter_context(model.edit(one))
        seen = stack.enter_context(model.read(every_site(model)))
        logits = model.logits(ids, mask)
    return {name: h[mask.bool()] for name, h in {**{str(s): h for s, h in seen.items()}, "logits": logits}.items()}


def agree(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, h in a.items():
        torch.testing.assert_close(b[name], h, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_points_are_the_same_on_every_backend(pair):
    assert [a.points for a in pair[0].anatomy] == [a.points for a in pair[1].anatomy]
    site = Site(1, "mlp_out")
    assert pair[0].width_of(site) == pair[1].width_of(site)
    assert pair[0].fingerprint == pair[1].fingerprint


@pytest.mark.parametrize("side", ["left", "right"])
def test_reads_agree_at_every_point(pair, side):
    agree(*(states(model, side) for model in pair))


def test_edits_agree_at_every_point(pair):
    points = pair[0].anatomy[1].points
    for some in (points[::2], points[1::2]):  # at several points of one block at once, in the order in which they come
        edits = {
            Site(layer, point): shift(0.5 + layer, "last:2") for layer, point in zip((0, 1, 1), some, strict=False)
        }
        agree(*(states(model, "left", edits) for model in pair))


def test_edits_of_several_layers_and_nested_edits_agree(common):
    edits = {Site(2): shift(1.0), Site(0, "attn_out"): shift(-2.0, "all"), Site(1, "mlp_out"): shift(3.0, "first:1")}
    inner = {Site(1, "resid_pre"): lambda h, w: h * 1.5, Site(0): shift(1.0)}
    agree(*(states(model, "right", edits, inner) for model in common))


def test_a_write_to_resid_mid_is_in_the_stream_and_in_what_the_mlp_reads(model):
    ids, mask = pad(PROMPTS[:1], 0, "right")
    site, edit = Site(1, "resid_mid"), {Site(1, "resid_mid"): shift(2.0, "all")}
    with torch.inference_mode(), model.edit(edit), model.read([site, Site(1, "mlp_out"), Site(1)]) as seen:
        model.run(ids, mask)
    torch.testing.assert_close(seen[site] + seen[Site(1, "mlp_out")], seen[Site(1)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=["cache", "no cache", "beams"])
def test_generation_under_an_edit_gives_the_same_tokens(common, options):
    prompts = ["w20 w21 w22 w23", "w30", "w40 w41"]
    direction = torch.randn(common[0].width, generator=torch.Generator().manual_seed(1))
    adapter = vector(Site(1), 3.0 * direction, positions="prompt+generated" if options else "last")
    plain, other = (m.generate(prompts, max_new_tokens=6, adapter=adapter, **options) for m in common)
    assert plain == other
    assert plain != common[1].generate(prompts, max_new_tokens=6, **options)


def test_a_read_around_generate_holds_the_last_step(model):
    with model.read([Site(1)]) as seen:
        model.generate(["w20 w21 w22"], max_new_tokens=4)
    assert seen[Site(1)].shape == (1, 1, model.width)


def test_take_runs_in_the_pass_and_its_result_is_kept(model):
    ids, mask = pad(PROMPTS, 0, "right")
    called = []

    def take(site, h):
        called.append(str(site))
        return h[:, 0]

    sites = [Site(1), Site(0, "mlp_act"), Site(0, "resid_pre")]
    with torch.inference_mode():
        with model.read(sites) as whole:
            model.run(ids, mask, stop_after=1)
        with model.read(sites, take=take) as taken:
            model.run(ids, mask, stop_after=1)
    assert sorted(called) == sorted(map(str, sites))
    for site in sites:
        torch.testing.assert_close(taken[site], whole[site][:, 0])


def test_a_run_ends_after_the_last_wanted_block(model):
    ids, mask = pad(PROMPTS, 0, "right")
    late = []
    with torch.inference_mode(), model.edit({Site(2, "resid_pre"): lambda h, w: late.append(1) or h}):
        with model.read([Site(1), Site(2)]) as seen:
            model.run(ids, mask, stop_after=1)
    assert (list(seen), late) == ([Site(1)], [])


def test_nothing_is_left_behind_after_an_exception(model):
    ids, mask = pad(PROMPTS, 0, "left")
    before = states(model, "left")

    def fail(h, where):
        raise RuntimeError("on purpose")

    for call in (model.run, model.logits):
        with pytest.raises(RuntimeError, match="on purpose"):
            with model.edit({Site(1): shift(9.0)}), model.read([Site(0)]), model.edit({Site(1, "attn_out"): fail}):
                call(ids, mask)
    with pytest.raises(RuntimeError, match="on purpose"), model.edit({Site(1): fail}):
        model.generate(["w20"], max_new_tokens=3)
    with pytest.raises(UserError, match="out of range"), model.edit({Site(0): fail, Site(9): fail}):
        pass
    agree(before, states(model, "left"))


def test_gradients_pass_through_an_edit(model):
    ids, mask = pad(PROMPTS[:1], 0, "right")
    delta = torch.zeros(model.width, requires_grad=True)
    with model.edit({Site(1): lambda h, w: h + delta}), model.read([Site(2)]) as seen:
        model.logits(ids, mask)[0, -1, 7].backward()
    assert delta.grad is not None
    assert delta.grad.norm() > 1e-3
    assert seen[Site(2)].requires_grad


@pytest.mark.parametrize("backend", ["hooks", *OTHERS])
@pytest.mark.parametrize(("family", "point"), [("gpt_neox", "resid_mid"), ("mixtral", "mlp_act")])
def test_points_that_a_family_lacks_are_refused_on_every_backend(family, point, backend):
    with pytest.raises(UserError, match=f"has no {point}.1: its "), model_of(family, backend).read([Site(1, point)]):
        pass


@pytest.mark.parametrize(("family", "backend"), NOT_SUPPORTED)
def test_families_that_a_backend_does_not_take_are_refused(family, backend):
    with pytest.raises(UserError, match=NOT_SUPPORTED[family, backend]):
        load(make_module(family), tokenizer=word_tokenizer(), backend=backend)


def test_one_site_or_its_name_is_read(llama):
    ids = torch.arange(3, 9)[None]
    for sites in (Site(1), "resid_post.1", 1, ["resid_post.1"]):
        with torch.inference_mode(), llama.read(sites) as seen:
            llama.run(ids, torch.ones_like(ids))
        assert set(seen) == {Site(1)}
