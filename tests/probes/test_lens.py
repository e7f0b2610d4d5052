"""Lenses: the end of every family is found exactly, a still model is read exactly, and files keep what they were given."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf

from probes.lens import Lens, lens_sites
from probes.unembedding import Unembedding
from tests.conftest import FAMILIES, LAYERS, MORE_FAMILIES, VOCABULARY, WIDTH, make_model, make_module, word_tokenizer
from tests.probes.lens_models import hidden
from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap
from workbench.models import Model, load
from workbench.sites import Site

IDS = torch.randint(3, VOCABULARY, (12,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", sorted(FAMILIES | MORE_FAMILIES))
def test_at_the_last_layer_a_lens_gives_the_models_own_logits(family):
    model = load(make_module(family), tokenizer=word_tokenizer(), prove=False)
    unembed = Unembedding.of(model)
    mask = torch.ones_like(IDS[None])
    with torch.inference_mode(), model.read([-1]) as found:
        theirs = model.logits(IDS[None], mask)[0].float()
        mine = unembed.logits(found[Site(LAYERS - 1)][0])
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_soft_cap_and_a_projection_before_the_head_are_found():
    capped = Unembedding.of(make_model("gemma2"))
    assert capped.head.cap == 30
    config = tf.OPTConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
                          word_embed_proj_dim=24, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    module = tf.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    found = Unembedding.of(load(module, tokenizer=word_tokenizer()))
    assert [type(m).__name__ for m in found.modules] == ["LayerNorm", "Linear"]


def test_embeddings_that_are_scaled_are_read_as_the_blocks_are_given_them():
    model = make_model("gemma2")
    with torch.no_grad(), model.read(["resid_pre.0"]) as found:
        model.run(IDS[None], torch.ones_like(IDS[None]))
        read, plain = found[Site(0, "resid_pre")][0], model.module.model.embed_tokens.weight[IDS]
    torch.testing.assert_close(read, hidden(model, IDS)[0])
    torch.testing.assert_close(read, plain * torch.tensor(WIDTH**0.5))


def test_what_has_no_head_of_its_own_is_refused(monkeypatch):
    model = make_model("llama")
    block = model.block(LAYERS - 1)
    block.register_forward_hook(lambda _, __, out: out + 1)  # what runs after it is not what the hooks see
    model.decoder.norm.register_forward_hook(lambda _, __, out: out * 2)
    assert Unembedding.of(model)
    monkeypatch.setattr(type(model.decoder), "forward", _around(type(model.decoder).forward))
    with pytest.raises(
        UserError, match=r"\(llama\) has no unembedding that can be told: no modules lead from its last"
    ):
        Unembedding.of(model)


def _around(forward):
    def changed(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * 1.5
        return out

    return changed


def lens_of(model: Model, seed: int = 0) -> Lens:
    noise = torch.Generator().manual_seed(seed)
    draw = {
        site: LinearMap(torch.randn(WIDTH, WIDTH, generator=noise) / 9, torch.randn(WIDTH, generator=noise))
        for site in lens_sites(model)[:-1]
    }
    return Lens("tuned", draw, dict(model.fingerprint), {"n": 1})


def test_a_lens_is_what_its_formula_says(llama):
    lens, x = lens_of(llama), torch.randn(5, WIDTH)
    one = lens.translators[Site(0)]
    torch.testing.assert_close(lens(Site(0), x), x + x @ one.weight + one.bias)
    torch.testing.assert_close(lens.map(Site(0), WIDTH)(x), lens(Site(0), x))
    assert torch.equal(lens(Site(LAYERS - 1), x), x)
    assert torch.equal(Lens()(Site(0), x), x)
    assert lens.only([Site(0)]).translators.keys() == {Site(0)}


def test_saved_and_loaded_a_lens_is_the_same(llama, tmp_path):
    lens = lens_of(llama)
    lens.save(tmp_path / "lens", llama)
    found = Lens.load(tmp_path / "lens")
    assert found == lens
    assert found.meta == {"n": 1}
    some = Lens("jacobian", lens.only([Site(1)]).translators, lens.base)
    some.save(tmp_path / "some", llama)
    assert Lens.load(tmp_path / "some") == some
    with pytest.raises(UserError, match="exists already"):
        lens.save(tmp_path / "lens", llama)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="it is something else"):
        lens.save(tmp_path / "model", llama, overwrite=True)


def tuned_lens_folder(path, **changes):
    """What the library tuned-lens writes: residual translators as torch modules, in an archive."""
    modules = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    path.mkdir()
    torch.save(modules.state_dict(), path / "params.pt")
    config = {"base_model_name_or_path": "some/llama", "d_model": WIDTH, "num_hidden_layers": LAYERS, "bias": True,
              "base_model_revision": None, "unembed_hash": "0", "lens_type": "linear_tuned_lens"}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | changes))
    return modules


def test_a_folder_of_tuned_lens_is_read_by_its_own_convention(llama, tmp_path):
    modules = tuned_lens_folder(tmp_path / "published")
    found, x = Lens.load(tmp_path / "published"), torch.randn(4, WIDTH)
    for i, site in enumerate(lens_sites(llama)[:-1]):
        torch.testing.assert_close(found(site, x), x + modules[i](x).detach())
    with pytest.raises(UserError, match=r"this lens belongs to some/llama, not to .*: name .* differ; fit one"):
        found.check(llama)
    found.check(llama, allow_mismatch=True)


def test_a_lens_of_another_model_is_refused_by_both_names(llama, gpt2, tmp_path):
    lens = lens_of(llama)
    with pytest.raises(UserError, match=r"this lens belongs to .*, not to .*: weights .* differ"):
        lens.check(gpt2)
    with pytest.raises(UserError, match="belongs to"):
        lens.save(tmp_path / "x", gpt2)
    wide = Lens("tuned", {Site(0): LinearMap.zeros(5, 5)})
    with pytest.raises(UserError, match=f"width 5 at resid_post.0 and .* has width {WIDTH}"):
        wide.check(llama)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"d_model": "x"}, "its d_model is no count"),
        ({"num_hidden_layers": 2}, "does not hold a weight and a bias of each of 2 layers"),
        ({"d_model": 7}, "not of width 7"),
        ({"lens_type": "deep"}, "is a lens of type 'deep'"),
        ({"workbench": {"format": "x"}}, "does not say format"),
        ({"bias": 1}, "of another type"),
    ],
)
def test_a_damaged_lens_is_told_in_one_line(config, words, tmp_path):
    tuned_lens_folder(tmp_path / "x", **config)
    with pytest.raises(UserError, match=words):
        Lens.load(tmp_path / "x")


def test_what_is_no_lens_is_refused(tmp_path, llama):
    with pytest.raises(UserError, match=r"is not a lens: it holds no config\.json"):
        Lens.load(tmp_path)
    tuned_lens_folder(tmp_path / "x")
    torch.save({"0.weight": object}, tmp_path / "x" / "params.pt")
    with pytest.raises(UserError, match="was refused"):
        Lens.load(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text("[1")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        Lens.load(tmp_path / "x")
    with pytest.raises(UserError, match="a logit lens has nothing to save"):
        Lens().save(tmp_path / "y", llama)
    with pytest.raises(UserError, match="unknown kind of lens 'deep'"):
        Lens("deep")
    with pytest.raises(UserError, match="square and of one width"):
        Lens("tuned", {Site(0): LinearMap.zeros(3, 4)})
