"""What a model's passes cost by formula is what is counted while small models of every family run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from workbench import UserError
from workbench.adapters.demonstrations import answer_loss
from workbench.models import load
from workbench.profile import profile_model
from workbench.sites import Site
from workbench.work import BlockShape, Lengths, ModelShape, cache_bytes, forward, generation, store_bytes, training

from ..conftest import FAMILIES, MORE_FAMILIES, VOCABULARY, make_model, make_module, word_tokenizer
from .counting import counted

B, T = 3, 17


def whole_squares(shape: ModelShape) -> ModelShape:
    """The shape of a model whose every token sees every key: what a counter sees of kernels that mask a square."""

    class Square(BlockShape):
        def keys(self, length: float, first: float = 0) -> float:
            return length

    blocks = tuple(Square(**dataclasses.asdict(block)) for block in shape.blocks)
    return dataclasses.replace(shape, blocks=blocks)


def ids() -> torch.Tensor:
    return torch.randint(6, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(0))


def made(family: str) -> Any:
    module = make_module(family)
    # the grouped product of all experts is in no table of torch's counter
    getattr(module, "set_experts_implementation", lambda _: None)("eager")
    return module


@pytest.mark.parametrize("family", sorted(FAMILIES | MORE_FAMILIES))
def test_a_forward_pass_and_its_cache_from_the_configuration_alone(family):
    module = made(family)
    shape = ModelShape.of_config(module.config)
    texts = Lengths.even(B * T, T)
    assert shape.parameters == sum(p.numel() for p in module.parameters()) or hasattr(module.config, "text_config")
    with torch.inference_mode():
        found = counted(lambda: module(input_ids=ids(), use_cache=False))
        kept = module(input_ids=ids(), use_cache=True).past_key_values
    assert found == pytest.approx(forward(whole_squares(shape), texts, head="all").flops, rel=1e-3)  # rotary angles
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in kept.layers)
    assert cache_bytes(shape, B * T, "float32") == 4 * numbers


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_pass_that_ends_early_or_has_one_row_of_logits(family):
    module = made(family)
    model = load(module, tokenizer=word_tokenizer())
    shape, texts, mask = whole_squares(ModelShape.of(model)), Lengths.of([T] * B), torch.ones(B, T, dtype=torch.long)
    with torch.inference_mode():
        for layer in range(model.n_layers):
            found = counted(lambda layer=layer: model.run(ids(), mask, stop_after=layer))
            assert found == pytest.approx(forward(shape, texts, stop_after=layer).flops, rel=1e-3)
        found = counted(lambda: model.logits(ids(), mask, last_only=True))
    assert found == pytest.approx(forward(shape, texts, head="last").flops, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_generation_with_a_cache(family):
    module, new = make_module(family), 6
    shape = ModelShape.of_config(module.config)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones(B, T, dtype=torch.long)
    with torch.inference_mode():
        found = counted(lambda: module.generate(ids(), attention_mask=mask, **options))
    expected = generation(shape, Lengths.of([T] * B), new)
    # the prompt is counted as a square, of which a token sees half; further tokens see what they see
    square = 2 * B * T * sum(b.scores * (T - b.keys(T)) for b in shape.blocks)
    assert found == pytest.approx(expected.flops + square, rel=1e-3)


@pytest.mark.parametrize("site", ["resid_post.0", "resid_pre.1", "resid_post.2"])
def test_training_an_adapter(site):
    module = tf.LlamaForCausalLM(tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        attn_implementation="eager")).eval()  # fmt: skip
    model = load(module, tokenizer=word_tokenizer())
    rows = ids().tolist()
    batch = [(row[:9], row[9:]) for row in rows]
    delta = torch.zeros(48, requires_grad=True)
    for p in module.parameters():
        p.requires_grad_(False)

    def step() -> None:
        with model.edit({model.site(site): lambda h, where: h + delta}):
            answer_loss(model, batch).backward()

    expected = training(whole_squares(ModelShape.of(model)), Lengths.of([T] * B), [Site.parse(site)]).flops
    # logits are made of the answers alone where a loss needs no others
    saved = 2 * 2 * model.width * VOCABULARY * B * T
    found = counted(step)
    assert expected - saved <= found <= expected * 1.001


def test_bytes_of_a_store(tmp_path):
    model = make_model("llama")
    for dtype, sites in (("float32", None), ("bfloat16", [0, "mlp_act.1"])):
        with profile_model(model, ["w1 w2 w3", "w4"], sites=sites, tokens="all", dtype=dtype) as store:
            read = sum(store.read(site).nbytes for site in store.sites)
            assert store_bytes(ModelShape.of(model), sites, store.n_rows, dtype) == read
            assert 0 <= store.n_bytes - read < 1000  # the headers of its shards


@pytest.mark.parametrize("run", [
    lambda shape: Lengths.even(0, 10), lambda shape: Lengths.even(10, 0),
])  # fmt: skip
def test_nothing_is_refused(run: Callable[[ModelShape], Any], llama):
    with pytest.raises(UserError, match="are nothing to count; give more than 0"):
        run(ModelShape.of(llama))


def test_a_window_and_a_length_limit_what_is_seen():
    wide, narrow = BlockShape(0, 0, 8, 8), BlockShape(0, 0, 8, 8, window=4)
    seen = [sum(min(i + 1, 4) for i in range(n)) / n for n in (3, 10)]
    assert [narrow.keys(3), narrow.keys(10)] == seen
    assert wide.keys(10) == 5.5
    assert narrow.keys(12, 10) == 4
    assert Lengths.of([3, 9, 12]).cut(9) == Lengths({3: 1, 9: 2})


def test_a_site_that_a_shape_does_not_have_is_refused(llama):
    shape = ModelShape.of(llama)
    with pytest.raises(UserError, match="out of range"):
        shape.layers([7])
    with pytest.raises(UserError, match=r"does not say how wide mlp_act\.0 is"):
        dataclasses.replace(shape, mlp_act=0).width_of(Site(0, "mlp_act"))


def test_a_kind_of_model_without_logits_is_refused():
    with pytest.raises(UserError, match="no work can be counted for a t5"):
        ModelShape.of_config(tf.T5Config())
