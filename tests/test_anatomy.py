"""The parts of a block, on every family: what is read adds up, what is written arrives, and what is not there says why."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import FAMILIES, LAYERS, MORE_FAMILIES, WIDTH, make_model, make_module, word_tokenizer
from workbench.anatomy import INNER
from workbench.errors import UserError
from workbench.models import Model, load
from workbench.prompts import pad
from workbench.sites import POINTS, Site

PROMPTS = [[1, 20, 21, 22, 23, 24], [1, 30, 31], [1], [1, 40, 41, 42]]
PARALLEL = {"codegen", "cohere", "falcon", "falcon_new", "gpt_neox", "gptj", "phi", "stablelm_parallel"}
POST_NORMED = {"gemma2", "gemma3", "gemma3_wrapped", "olmo2"}  # a norm lies between the down projection and mlp_out
WITHOUT: dict[str, set[str]] = {
    **{family: {"resid_mid"} for family in PARALLEL},
    "mixtral": {"mlp_act"},
    "opt_post_norm": set(INNER),
}
SUMS = sorted({*FAMILIES, *MORE_FAMILIES} - {"opt_post_norm"})
EXACT = dict(atol=3e-5, rtol=1e-5)


@cache
def model_of(family: str) -> Model:
    return make_model(family)


def points_of(family: str) -> list[str]:
    return [p for p in POINTS if p not in WITHOUT.get(family, set()) and not (family == "qwen2_moe" and p == "mlp_act")]


def passed(model: Model, sites: list[Site], edits: dict[Site, Any] | None = None, side: str = "right") -> Any:
    """(states at `sites`, logits) of the prompts under `edits`."""
    ids, mask = pad(PROMPTS, 0, side)
    with torch.inference_mode(), model.edit(edits or {}), model.read(sites) as seen:
        logits = model.logits(ids, mask)
    return seen, logits


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def plus(delta: Tensor, policy: str = "last") -> Any:
    return lambda h, where: h + delta * where.mask(policy)[..., None].to(h.dtype)


def delta_of(width: int = WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE_FAMILIES}))
def test_every_family_has_the_points_that_it_can_have(family):
    model = model_of(family)
    for layer, anatomy in enumerate(model.anatomy):
        without = {"mlp_act"} if family == "qwen2_moe" and layer == 1 else WITHOUT.get(family, set())
        assert set(anatomy.points) == set(POINTS) - without, anatomy.missing


@pytest.mark.parametrize("family", SUMS)
def test_what_is_read_adds_up(family):
    model = model_of(family)
    sites = [Site(l, p) for l in range(LAYERS) for p in model.anatomy[l].points]
    seen, _ = passed(model, sites)
    for l in range(LAYERS):
        pre, attn, mlp, post = (seen[Site(l, p)] for p in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        assert all(h.shape == (4, 6, WIDTH) for h in (pre, attn, mlp, post))
        torch.testing.assert_close(pre + attn + mlp, post, **EXACT)
        if family not in PARALLEL:
            torch.testing.assert_close(seen[Site(l, "resid_mid")], pre + attn, **EXACT)
        act = Site(l, "mlp_act")
        if act in seen:
            assert seen[act].shape == (4, 6, model.width_of(act))
            down = model.block(l).get_submodule(model.anatomy[l].down.path)
            if family not in POST_NORMED:
                with torch.inference_mode():
                    torch.testing.assert_close(down(seen[act]) * model.anatomy[l].mlp.scale, mlp, **EXACT)


@pytest.mark.parametrize("family", SUMS)
def test_equal_deltas_at_points_that_one_sum_joins_do_the_same(family):
    """attn_out and resid_mid, or attn_out and mlp_out of a parallel block; mlp_out and resid_post of any."""
    model, fn = model_of(family), plus(delta_of())
    logits = {p: passed(model, [], {Site(1, p): fn})[1] for p in points_of(family) if p != "mlp_act"}
    plain = passed(model, [])[1]
    torch.testing.assert_close(logits["mlp_out"], logits["resid_post"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits["attn_out"], logits["mlp_out" if family in PARALLEL else "resid_mid"],
                               atol=1e-4, rtol=1e-4)  # fmt: skip
    for point, other in logits.items():
        assert (other - plain).abs().max() > 1e-3, point
    if family not in PARALLEL:
        assert (logits["attn_out"] - logits["mlp_out"]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "granite", "opt", "bloom", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_last_prompt_position_changes_and_no_bit_of_the_others(family, side):
    model, real = model_of(family), pad(PROMPTS, 0, side)[1].bool()
    last = torch.zeros(4, 6, dtype=torch.bool)
    for row, prompt in enumerate(PROMPTS):
        last[row, -1 if side == "left" else len(prompt) - 1] = True
    sites = [Site(1, point) for point in points_of(family)]
    before, _ = passed(model, sites, side=side)
    for site in sites:
        after, _ = passed(model, [site, Site(1)], {site: plus(delta_of(model.width_of(site)))}, side)
        assert torch.equal((after[site] != before[site]).any(-1), last), site
        assert torch.equal((after[Site(1)] != before[Site(1)]).any(-1) & real, last), site


@pytest.mark.parametrize("family", ["bloom", "falcon", "granite", "gemma2", "opt", "gemma3_wrapped", "llava"])
def test_generation_with_and_without_a_cache_gives_the_same_tokens(family):
    model = model_of(family)
    ids, mask = pad(PROMPTS, 0, "left")
    edits = {Site(1, p): plus(3 * delta_of(model.width_of(Site(1, p))), "all") for p in points_of(family)}
    tokens = []
    for use_cache in (True, False):
        with torch.inference_mode(), model.edit(edits):
            tokens.append(model.module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False,
                                                eos_token_id=None, pad_token_id=0, use_cache=use_cache))  # fmt: skip
    assert torch.equal(*tokens)


@pytest.mark.parametrize("family", ["llama", "granite", "opt", "bloom"])
def test_edits_of_one_block_compose_in_the_order_of_the_pass(family):
    model, deltas = model_of(family), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    points = ["resid_pre", "attn_out", "resid_mid", "mlp_out"]
    edits = {Site(1, p): plus(d, "all") for p, d in zip(points, deltas, strict=True)}
    sites = [Site(1, p) for p in POINTS]
    together, _ = passed(model, sites, dict(reversed(edits.items())))
    mid = together[Site(1, "resid_pre")] + together[Site(1, "attn_out")]
    torch.testing.assert_close(together[Site(1, "resid_mid")], mid, **EXACT)
    torch.testing.assert_close(together[Site(1)], mid + together[Site(1, "mlp_out")], **EXACT)
    # the same, written as what resid_pre alone, then resid_pre and attn_out, ... give
    alone, _ = passed(model, sites, {Site(1, "resid_pre"): edits[Site(1, "resid_pre")]})
    real = pad(PROMPTS, 0, "right")[1].bool()
    wanted = alone[Site(1, "resid_mid")] + deltas[1] + deltas[2]
    torch.testing.assert_close(together[Site(1, "resid_mid")][real], wanted[real], **EXACT)


def test_contexts_compose_whichever_is_entered_first(llama):
    ids, mask = pad(PROMPTS, 0, "right")
    first, second = {Site(1, "resid_pre"): plus(delta_of(), "all")}, {Site(1, "resid_mid"): plus(-delta_of(), "all")}
    sites, states = [Site(1, p) for p in POINTS], []
    for outer, inner in ((first, second), (second, first)):
        with torch.inference_mode(), llama.edit(outer), llama.edit(inner), llama.read(sites) as seen:
            llama.run(ids, mask)
        states.append(seen)
    for site in sites:
        torch.testing.assert_close(states[0][site], states[1][site], **EXACT)


def test_what_is_written_is_what_both_the_residual_and_the_second_norm_see(llama):
    """Against the block written out by hand."""
    block, ids = llama.block(1), pad(PROMPTS[:1], 0, "right")
    new = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), llama.edit({Site(1, "resid_mid"): lambda *_: new}), llama.read([Site(1)]) as seen:
        llama.run(*ids)
        wanted = new + block.mlp(block.post_attention_layernorm(new))
    torch.testing.assert_close(seen[Site(1)], wanted, **EXACT)


def test_gradients_flow_through_every_point(llama):
    ids = pad(PROMPTS[:1], 0, "right")
    sites = [Site(1, p) for p in POINTS]
    deltas = {site: torch.zeros(llama.width_of(site), requires_grad=True) for site in sites}
    with llama.edit({site: plus(d) for site, d in deltas.items()}):
        llama.logits(*ids)[0, -1].square().sum().backward()
    assert all(d.grad is not None and d.grad.norm() > 0 for d in deltas.values())
    torch.testing.assert_close(deltas[Site(1, "attn_out")].grad, deltas[Site(1, "resid_mid")].grad)


@pytest.mark.parametrize("family", ["llama", "falcon", "opt"])
def test_take_is_honoured_at_every_point(family):
    model, ids = model_of(family), pad(PROMPTS, 0, "right")
    sites = [Site(l, p) for l in range(LAYERS) for p in points_of(family)]
    with torch.inference_mode(), model.read(sites) as whole:
        model.run(*ids)
    with torch.inference_mode(), model.read(sites, take=lambda site, h: h[:, -1, : site.layer + 1].clone()) as taken:
        model.run(*ids)
    for site in sites:
        assert torch.equal(taken[site], whole[site][:, -1, : site.layer + 1])


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_no_hook_is_left_after_exceptions(family):
    model, ids = model_of(family), pad(PROMPTS, 0, "right")
    before = hooks_of(model.module)

    def fail(h, where):
        raise RuntimeError("on purpose")

    for point in points_of(family):
        with pytest.raises(RuntimeError, match="on purpose"):
            with model.read([Site(1, point)]), model.edit({Site(1, point): fail}):
                model.run(*ids)
    with pytest.raises(UserError, match="out of range"), model.read([Site(0, "resid_mid"), Site(9, "mlp_act")]):
        pass
    assert hooks_of(model.module) == before


@pytest.mark.parametrize(
    ("family", "point", "layer", "why"),
    [
        ("phi", "resid_mid", 0, "attention and MLP in parallel"),
        ("mixtral", "mlp_act", 2, "mixture of experts"),
        ("qwen2_moe", "mlp_act", 1, "mixture of experts"),
        ("opt_post_norm", "attn_out", 0, r"post-norm"),
    ],
)
def test_a_point_that_is_not_there_is_refused_with_the_reason(family, point, layer, why):
    model, site = model_of(family), Site(layer, point)
    family = str(model.family)
    for use in (lambda: model.read([site]), lambda: model.edit({site: plus(delta_of())})):
        with pytest.raises(
            UserError, match=rf"\({family}\) has no {site}: .*{why}.*points of layer {layer}: resid_pre"
        ):
            with use():
                pass
    if point == "mlp_act":
        with pytest.raises(UserError, match=why):
            model.width_of(site)


@pytest.mark.parametrize("family", ["llama", "granite", "falcon_new", "gemma2", "opt", "mpt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_same_parts(family, dtype):
    half = load(make_module(family).to(dtype), tokenizer=word_tokenizer())
    assert half.anatomy == model_of(family).anatomy


def test_parts_that_are_small_beside_the_residual_stream_are_found_in_bfloat16():
    module = make_module("llama")
    with torch.no_grad():
        module.model.embed_tokens.weight.mul_(8)
        module.model.embed_tokens.weight[3].mul_(300)  # one token with massive activations
        for block in module.model.layers:
            block.self_attn.o_proj.weight.mul_(0.1)
            block.mlp.down_proj.weight.mul_(0.1)
    assert load(module.bfloat16(), tokenizer=word_tokenizer()).anatomy == model_of("llama").anatomy


def test_a_block_that_adds_nothing_is_taken_for_one_of_its_kind_and_a_model_of_such_is_refused():
    module = make_module("llama")
    nn.init.zeros_(module.model.layers[0].self_attn.o_proj.weight)
    assert load(module, tokenizer=word_tokenizer()).anatomy == model_of("llama").anatomy
    for block in module.model.layers:
        nn.init.zeros_(block.self_attn.o_proj.weight)
    model = load(module, tokenizer=word_tokenizer())
    assert model.anatomy[1].points == ("resid_pre", "resid_post")
    with pytest.raises(UserError, match=r"has no attn_out\.1: .* add up"), model.read([Site(1, "attn_out")]):
        pass


class Odd(nn.Module):
    """A block of no known family: modules under other names, a scale of its own at each branch, flattened states."""

    def __init__(self, inner: nn.Module, layer: int, planted: str) -> None:
        super().__init__()
        self.attention_branch, self.first, self.second = inner.self_attn, inner.input_layernorm, nn.LayerNorm(WIDTH)
        self.up, self.back = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.a, self.m, self.planted = 0.5 + 0.1 * layer, -0.3, planted

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        states = hidden_states + self.a * self.attention_branch(hidden_states=self.first(hidden_states), **kwargs)[0]
        x = states.reshape(-1, WIDTH)
        out = self.back(torch.tanh(self.up(self.second(x))))
        if self.planted == "gated":
            out = out * torch.tanh(x)
        return (x + self.m * out).view(states.shape)


def odd_model(planted: str = "") -> Model:
    module = make_module("llama")
    torch.manual_seed(4)
    module.model.layers = nn.ModuleList(Odd(b, l, planted) for l, b in enumerate(module.model.layers))
    return load(module.eval(), tokenizer=word_tokenizer())


def test_an_unknown_family_is_made_out_by_its_sums():
    model = odd_model()
    for l, anatomy in enumerate(model.anatomy):
        assert anatomy.points == POINTS
        assert (anatomy.attn.path, anatomy.mlp.path, anatomy.down.path) == ("attention_branch", "back", "back")
        assert anatomy.attn.scale == pytest.approx(0.5 + 0.1 * l, rel=1e-5)
        assert anatomy.mlp.scale == pytest.approx(-0.3, rel=1e-5)
    assert model.width_of(Site(0, "mlp_act")) == 40
    logits = [passed(model, [], {Site(1, p): plus(delta_of())})[1] for p in ("mlp_out", "resid_post")]
    torch.testing.assert_close(*logits, **EXACT)


def test_a_block_in_which_no_module_makes_what_is_added_is_refused():
    """The control: the same block, with a product after the last projection that no module stands for."""
    model = odd_model("gated")
    assert all(anatomy.points == ("resid_pre", "resid_post") for anatomy in model.anatomy)
    with pytest.raises(UserError, match="no attention and no other module"), model.read([Site(0, "mlp_out")]):
        pass


def test_a_point_whose_write_does_not_arrive_is_refused():
    module = make_module("llama")
    for block in module.model.layers:
        mlp = block.mlp
        # works on a copy of its weights: the projection runs, and what it returns is not what is used
        block.mlp.forward = lambda x, mlp=mlp: (
            mlp.down_proj(z := mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)), nn.functional.linear(z, mlp.down_proj.weight)
        )[1]  # fmt: skip
    model = load(module, tokenizer=word_tokenizer())
    with pytest.raises(UserError, match=r"has no mlp_act\.0: what is written to mlp_act does not make mlp_out"):
        with model.read([Site(0, "mlp_act")]):
            pass


@pytest.mark.parametrize("family", ["gemma3_wrapped", "llava"])
def test_the_text_part_of_a_multimodal_wrapper_is_edited_at_its_own_positions(family):
    model, seen = model_of(family), []
    ids, mask = pad(PROMPTS, 0, "left")
    with model.edit({Site(1): lambda h, w: seen.append(w.mask("last").sum(1).tolist()) or h}):
        model.module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None,
                              pad_token_id=0)  # fmt: skip
    assert seen == [[1] * 4, [0] * 4, [0] * 4]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "in place", "blocks", "blocks in place", "forward"])
def test_compiled_models_are_read_and_edited(how):
    ids, mask = pad(PROMPTS, 0, "right")
    module, plain = make_module("llama"), model_of("llama")
    torch._dynamo.reset()
    held = torch.compile(module, backend="eager") if how == "whole" else module
    if how == "in place":
        module.compile(backend="eager")
    if how == "forward":
        module.forward = torch.compile(module.forward, backend="eager")
    for i, block in enumerate(module.model.layers):
        if how == "blocks":
            module.model.layers[i] = torch.compile(block, backend="eager")
        if how == "blocks in place":
            block.compile(backend="eager")
    with torch.inference_mode():
        before = held(input_ids=ids, attention_mask=mask).logits
    model = load(held, tokenizer=word_tokenizer())
    assert model.fingerprint_id == plain.fingerprint_id
    edits, sites = {Site(1, "attn_out"): plus(delta_of())}, [Site(1, "resid_mid")]
    for other, wanted in zip(passed(model, sites, edits), passed(plain, sites, edits), strict=True):
        torch.testing.assert_close(other, wanted, **EXACT)
    with torch.inference_mode():
        torch.testing.assert_close(held(input_ids=ids, attention_mask=mask).logits, before)


def test_a_peft_model_is_read_and_edited_and_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    model = load(peft.get_peft_model(make_module("llama"), config).eval(), tokenizer=word_tokenizer())
    plain = model_of("llama")
    assert model.anatomy == plain.anatomy
    assert model.fingerprint_id != plain.fingerprint_id
    assert (passed(model, [])[1] - passed(plain, [])[1]).abs().max() > 1e-3
    site = Site(1, "mlp_act")
    assert (passed(model, [], {site: plus(delta_of(96))})[1] - passed(model, [])[1]).abs().max() > 1e-3
    virtual = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="PROMPT_TUNING adds virtual tokens"):
        load(peft.get_peft_model(make_module("llama"), virtual), tokenizer=word_tokenizer())


def test_offloaded_blocks_are_read_and_edited():
    accelerate = pytest.importorskip("accelerate")
    module, plain = make_module("llama"), model_of("llama")
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    model = load(module, tokenizer=word_tokenizer())
    assert model.anatomy == plain.anatomy
    assert model.device == torch.device("cpu")
    edits, sites = {Site(1, "resid_mid"): plus(delta_of())}, [Site(1, p) for p in POINTS]
    for other, wanted in zip(passed(model, sites, edits), passed(plain, sites, edits), strict=True):
        torch.testing.assert_close(other, wanted, **EXACT)
    with pytest.raises(UserError, match="weights are offloaded"):
        model.fingerprint  # noqa: B018


def test_packed_weights_have_a_fingerprint():
    module = make_module("llama")
    module.register_buffer("packed", torch.arange(6, dtype=torch.uint8))
    model = load(module, tokenizer=word_tokenizer(), prove=False)
    first = model.fingerprint_id
    module.packed[0] = 9
    assert load(module, tokenizer=word_tokenizer(), prove=False).fingerprint_id != first


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "opt", "falcon"])
def test_what_is_changed_in_place_is_changed(family, point):
    model, site = model_of(family), Site(1, point)
    if point not in model.anatomy[1].points:
        pytest.skip("no such point")

    def in_place(h, where):
        h[:, -1] += torch.linspace(-1, 1, h.shape[-1])  # a LayerNorm would not see a constant
        return h

    def apart(h, where):
        return in_place(h.clone(), where)

    ids, mask = torch.tensor([[1, 20, 21, 22]]), torch.ones(1, 4, dtype=torch.long)
    with torch.inference_mode():
        plain = model.logits(ids, mask)
        with model.edit({site: in_place}):
            one = model.logits(ids, mask)
        with model.edit({site: apart}):
            other = model.logits(ids, mask)
    torch.testing.assert_close(one, other)
    assert (one - plain).abs().max() > 1e-4


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("wrong", [lambda h, _: h[:, :1], lambda h, _: h[:1], lambda h, _: h[0, 0], lambda h, _: None])
def test_edits_that_return_something_else_are_refused(point, wrong):
    model, ids = model_of("llama"), torch.tensor([[1, 20, 21], [1, 22, 23]])
    with pytest.raises(UserError, match=rf"an edit of {point}\.1 returned .*must return the states, of shape \[2, 3, "):
        with torch.inference_mode(), model.edit({Site(1, point): wrong}):
            model.logits(ids, torch.ones_like(ids))


def test_a_model_whose_blocks_add_nothing_is_loaded_and_read():
    module = make_module("gpt2")
    for weight in module.transformer.h.parameters():
        weight.data.zero_()
    model = load(module, tokenizer=word_tokenizer())
    sites = [Site(0, "resid_pre"), Site(LAYERS - 1)]
    seen, _ = passed(model, sites)
    assert torch.equal(seen[sites[0]], seen[sites[1]])
