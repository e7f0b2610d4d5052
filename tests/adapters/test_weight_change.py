"""A change of weights becomes the adapter that it is: a planted one is found, a LoRA's folder is read as peft reads it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import LAYERS, WIDTH, make_model, make_module, save_folder, word_tokenizer
from tests.lora_folders import TARGETS, lora_folder
from workbench.adapters import Adapter, LowRank
from workbench.adapters.peft_lora import Lora, read
from workbench.adapters.site_fit import Split
from workbench.adapters.weight_change import divergence, open_change, residual_adapter
from workbench.errors import UserError
from workbench.models import load
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.sites import Site

DRAW = torch.Generator().manual_seed(0)
PROMPTS = [" ".join(f"w{int(i)}" for i in torch.randint(0, 150, (2 + k % 5,), generator=DRAW)) for k in range(240)]


def merged(family, folder):
    """The same model with W + scale B A in place of W."""
    module = make_module(family)
    for name, change in read(folder).modules.items():
        delta = change.scale * change.B @ change.A
        weight = module.get_submodule(name).weight
        with torch.no_grad():
            weight += delta.T if family == "gpt2" else delta
    return load(module, tokenizer=word_tokenizer())


def logits(model):
    ids = torch.tensor([[1, 9, 30, 77, 5]])
    with torch.no_grad():
        return model.logits(ids, torch.ones_like(ids))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"alpha_pattern": {"mlp.down_proj": 8, "mlp.c_proj": 8}}])
def test_a_lora_on_a_model_is_the_model_with_its_weights_merged(tmp_path, family, more):
    lora, model = read(lora_folder(tmp_path / "l", family, (0, 2), **more)), make_model(family)
    plain = logits(model)
    hooks = sum(len(m._forward_hooks) for m in model.module.modules())
    with lora.on(model):
        torch.testing.assert_close(logits(model), logits(merged(family, tmp_path / "l")), atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError), lora.on(model):
        raise RuntimeError
    assert torch.equal(logits(model), plain)
    assert sum(len(m._forward_hooks) for m in model.module.modules()) == hooks
    scale = 4 / 2**0.5 if more.get("use_rslora") else (8 if more else 4) / 2
    assert [m.scale for m in lora.modules.values()] == [pytest.approx(scale)] * 2


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5}}),
        ("llama", {"target_modules": ["q_proj"], "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 30}}),
        ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
        ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_peft_wrote_is_read_as_peft_reads_it(tmp_path, family, options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    tuned = peft.get_peft_model(make_module(family), peft.LoraConfig(r=3, lora_alpha=7, **options))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    tuned.save_pretrained(tmp_path)
    ids, model = torch.tensor([[1, 9, 30, 77, 5]]), make_model(family)
    with torch.no_grad(), read(tmp_path).on(model):
        wanted = tuned.eval()(input_ids=ids).logits
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)


def test_a_planted_change_is_found_whole(small_model):
    """A bias and a low-rank map of a block's output are exactly a residual adapter: here one is, seen as a change."""
    draw = torch.Generator().manual_seed(3)
    planted = LowRank(torch.randn(WIDTH, 2, generator=draw), torch.randn(2, generator=draw),
                      0.1 * torch.randn(2, WIDTH, generator=draw))  # fmt: skip

    class Planted(Lora):
        def on(self, model):
            return Adapter({Site(1): planted}).on(model)

    change = Planted({}, "planted", "")
    made = residual_adapter(small_model, change, PROMPTS, [1])
    assert made.fits[0].rank == 2
    assert made.fits[0].r2 > 0.999
    assert made.fits[0].r2_constant < 0.1
    assert made.kl_after < 1e-4 * made.kl_before
    assert made.warnings == ()
    states = profile_model(small_model, PROMPTS[:20], sites=[1]).read(Site(1))
    torch.testing.assert_close(made.adapter.delta(Site(1), states), planted.delta(states), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("positions", ["last", "all", "first:2", "last:2"])
def test_at_the_output_of_its_block_more_of_a_lora_is_found_than_a_constant(llama, tmp_path, positions):
    folder = lora_folder(tmp_path / "l", layers=(1,))
    made = residual_adapter(llama, folder, PROMPTS, [1], positions=positions, max_rank=WIDTH)
    fit = made.fits[0]
    assert fit.r2 > fit.r2_constant
    assert fit.explained > fit.explained_constant
    assert fit.explained > 0.3
    assert fit.explained_whole == pytest.approx(fit.explained)
    assert made.adapter.positions == positions
    assert made.adapter.base == llama.fingerprint
    meta = made.adapter.meta
    assert (meta["kind"], meta["change"], meta["source"]) == ("weight_change", "lora", str(folder))
    made.adapter.save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a").meta["fits"][0]["r2"] == fit.r2


def test_the_figures_are_those_of_the_adapter_on_the_held_out_prompts(llama, tmp_path):
    """Taken here from states that are read again, with the adapter's own delta."""
    folder = lora_folder(tmp_path / "l", layers=(0, 1, 2))
    made = residual_adapter(llama, folder, PROMPTS, [0, 2], keep="all", seed=5)
    held = PromptSet.load(PROMPTS).subset(Split.of(len(PROMPTS), 0.2, 5).held)
    assert len(held) == 48 == made.adapter.meta["held_out"]
    plain = profile_model(llama, held)
    with read(folder).on(llama):
        wanted = profile_model(llama, held)
    with made.adapter.only([0]).on(llama):
        between = profile_model(llama, held)
    for fit, store in zip(made.fits, (plain, between), strict=True):
        h, goal = store.read(fit.site), wanted.read(fit.site)
        left = (goal - h - made.adapter.delta(fit.site, h)).square().sum()
        assert fit.explained == pytest.approx(1 - float(left / (goal - h).square().sum()), abs=1e-3)
        assert fit.r2 == pytest.approx(1 - float(left / (goal - h - (goal - h).mean(0)).square().sum()), abs=1e-3)
        assert fit.explained_whole == pytest.approx(
            1 - float(left / (goal - plain.read(fit.site)).square().sum()), abs=1e-3
        )
    changed = open_change(llama, folder)
    assert divergence(llama, changed, held, [None, made.adapter]) == pytest.approx([made.kl_before, made.kl_after])


def test_the_site_that_is_kept_is_the_one_with_the_least_divergence(llama, tmp_path):
    made = residual_adapter(llama, lora_folder(tmp_path / "l", layers=(1, 2), size=0.1), PROMPTS, rank=3)
    by_site = made.adapter.meta["kl_by_site"]
    assert set(by_site) == {"resid_post.1", "resid_post.2"}  # before the first change there is nothing to fit
    assert str(made.adapter.sites[0]) == min(by_site, key=by_site.get)
    assert made.kl_after == min(by_site.values()) < made.kl_before
    assert made.adapter.rank == 4  # and a constant


def test_a_checkpoint_and_a_lora_of_the_same_change_give_the_same_adapter(small_model, tmp_path):
    family = small_model.family
    folder = lora_folder(tmp_path / "l", family)
    save_folder(merged(family, folder).module, tmp_path / "full")
    one, other = (residual_adapter(small_model, path, PROMPTS, [1, 2], rank=2) for path in (folder, tmp_path / "full"))
    assert one.adapter.sites == other.adapter.sites
    site = one.adapter.sites[0]
    states = profile_model(small_model, PROMPTS[:9], sites=[site]).read(site)
    torch.testing.assert_close(one.adapter.delta(site, states), other.adapter.delta(site, states), atol=2e-2, rtol=2e-2)
    assert other.adapter.meta["change"] == "checkpoint"


def test_what_a_constant_cannot_say_is_warned_of(llama, tmp_path):
    made = residual_adapter(llama, lora_folder(tmp_path / "l", layers=(0,)), PROMPTS, [0], rank=0)
    assert made.fits[0].rank == 0
    assert made.fits[0].explained == made.fits[0].explained_constant
    assert made.adapter.parts[Site(0)].constant() is not None
    assert any("resid_post.0: the adapter explains" in said for said in made.warnings) == (made.fits[0].explained < 0.5)
    assert list(made.warnings) == made.adapter.meta["warnings"] != []


def test_states_are_profiled_where_an_adapter_acts_on_the_right_tokens(small_model):
    """Padded batches included: `last` is the last token of each prompt, not of the batch."""
    adapter = Adapter({Site(0): LowRank(torch.zeros(WIDTH, 1), torch.ones(1), torch.ones(1, WIDTH))})
    plain = profile_model(small_model, PROMPTS[:20], sites=[0], tokens="all+special").read(Site(0))
    with adapter.on(small_model):
        store = profile_model(small_model, PROMPTS[:20], sites=[0], tokens="all+special")
    moved = (store.read(Site(0)) - plain).mean(1)
    index = store.prompt_index
    last = torch.cat([index[1:] != index[:-1], torch.tensor([True])])
    torch.testing.assert_close(moved, last.float(), atol=1e-4, rtol=0)


BAD_CONFIG = [
    ({"use_dora": True}, "has DoRA, which rescales the weights"),
    ({"peft_type": "LOHA"}, "is of PEFT's LOHA"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the weights"),
    ({"modules_to_save": ["lm_head"]}, "modules trained whole"),
    ({"r": 0}, "r must be a number above 0"),
    ({"r": 3}, "the config says rank 3"),
    ({"rank_pattern": {"(a+)+": 2}}, "regular expression"),
    ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
]


@pytest.mark.parametrize(("config", "words"), BAD_CONFIG)
def test_what_is_not_a_plain_lora_is_refused(tmp_path, config, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        read(lora_folder(tmp_path / "l", **config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"base_model.model.x.lora_magnitude_vector": torch.ones(3)}), "holds DoRA"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3)}), "is no part of a LoRA"),
        (lambda t: t.popitem(), "alone; fetch it again"),
        (lambda t: t.update({k: torch.full_like(v, float("nan")) for k, v in t.items()}), "NaN or infinity"),
        (lambda t: t.clear(), "holds no weights"),
    ],
)
def test_damaged_or_unknown_tensors_are_refused(tmp_path, change, words):
    folder = lora_folder(tmp_path / "l")
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=words):
        read(folder)


def test_a_lora_of_another_model_or_without_weights(llama, tmp_path):
    folder = lora_folder(tmp_path / "g", "gpt2")
    with (
        pytest.raises(UserError, match=r"a LoRA of donor: it changes transformer.h.1.mlp.c_proj, which"),
        read(folder).on(llama),
    ):
        pass
    wide = lora_folder(tmp_path / "w")
    save_file({f"base_model.model.{TARGETS['llama'].format(1)}.lora_{k}.weight": t for k, t in
               {"A": torch.ones(2, 7), "B": torch.ones(WIDTH, 2)}.items()}, wide / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=r"at model.layers.1.mlp.down_proj it maps 7 to 48 and"), read(wide).on(llama):
        pass
    (wide / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="weights missing"):
        read(wide)
    with pytest.raises(UserError, match="is no LoRA"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"positions": "generated"}, "not fitted at positions 'generated'"),
        ({"positions": "first:1+last"}, "not fitted at positions"),
        ({"positions": "last:6"}, "too few for positions 'last:6'"),
        ({"keep": "some"}, "unknown keep 'some'; allowed: best, all"),
        ({"rank": 99}, "rank must lie in 0..48"),
        ({"max_rank": 0}, "max_rank 0"),
        ({"holdout": 0.0}, "holdout 0.0 is no share"),
        ({"prompts": PROMPTS[:8]}, "8 prompts, of which 2 are held out, are too few"),
        ({"sites": [9]}, "out of range"),
        ({"sites": [0]}, "changes no activation of .* at resid_post.0"),
    ],
)
def test_bad_arguments_are_named(llama, tmp_path, arguments, words):
    folder = lora_folder(tmp_path / "l", layers=(2,))
    with pytest.raises(UserError, match=words):
        residual_adapter(llama, **{"change": folder, "prompts": PROMPTS, "sites": [2], **arguments})


def test_a_checkpoint_of_another_kind_is_refused(llama, gpt2):
    with pytest.raises(UserError, match=r"is no finetune of .*; give a checkpoint of the same architecture"):
        open_change(llama, gpt2)
    tok = copy.deepcopy(word_tokenizer())
    tok.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="another tokenizer or template"):
        open_change(llama, load(make_module("llama", 1), tokenizer=tok))
    assert LAYERS == 3
