import pytest
import torch
from torch import nn

from tests.conftest import make_model, make_module, word_tokenizer
from workbench.adapters.adapter import vector
from workbench.backends import torch_hooks
from workbench.errors import UserError
from workbench.models import load
from workbench.prompts import pad
from workbench.sites import Site

PROMPTS = [[1, 20, 21, 22, 23, 24], [1, 30, 31], [1], [1, 40, 41, 42]]


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def shift(amount: float, policy: str = "last"):
    return lambda h, where: h + amount * where.mask(policy)[..., None].to(h.dtype)


def read_all(model, ids, mask, site, edits=None):
    with torch.inference_mode(), torch_hooks.edit(model, edits or {}), torch_hooks.read(model, [site]) as seen:
        model.run(ids, mask)
    return seen[site]


def test_every_family_is_proved_when_loaded(family_model):
    family_model.prove(range(family_model.n_layers))


def test_resid_post_is_the_block_output_before_the_final_norm(family_model):
    ids, mask = pad(PROMPTS[:1], 0, "right")
    every = [Site(l) for l in range(family_model.n_layers)]
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int):
        def hook(_, __, output):
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [family_model.block(s.layer).register_forward_hook(keep(s.layer)) for s in every]
    with torch.inference_mode(), torch_hooks.read(family_model, every) as seen:
        states = family_model.decoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for site in every:  # the last one too, which Hugging Face's states do not hold
        torch.testing.assert_close(seen[site], outputs[site.layer], atol=1e-6, rtol=0)
    for site in every[:-1]:
        torch.testing.assert_close(seen[site], states[site.layer + 1], atol=1e-6, rtol=0)
    assert (seen[every[-1]] - states[-1]).abs().max() > 1e-3  # Hugging Face's last entry is after the norm


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_last_prompt_position_changes_at_the_edited_layer(family_model, side):
    ids, mask = pad(PROMPTS, 0, side)
    site = Site(1)
    before = read_all(family_model, ids, mask, site)
    after = read_all(family_model, ids, mask, site, {site: shift(1.0)})
    changed = (after - before).abs().sum(-1) > 0
    last = torch.zeros_like(changed)
    for row, prompt in enumerate(PROMPTS):
        last[row, -1 if side == "left" else len(prompt) - 1] = True
    assert torch.equal(changed, last)


def test_padding_and_batching_do_not_change_what_an_edit_does(small_model):
    edits = {Site(0): shift(2.0)}
    alone = []
    for prompt in PROMPTS:
        ids, mask = pad([prompt], 0, "left")
        with torch.inference_mode(), torch_hooks.edit(small_model, edits):
            alone.append(small_model.logits(ids, mask)[0, -1])
    for side in ("left", "right"):
        ids, mask = pad(PROMPTS, 0, side)
        with torch.inference_mode(), torch_hooks.edit(small_model, edits):
            logits = small_model.logits(ids, mask)
        for row, prompt in enumerate(PROMPTS):
            at = -1 if side == "left" else len(prompt) - 1
            torch.testing.assert_close(logits[row, at], alone[row], atol=1e-4, rtol=1e-4)


def generate(model, ids, mask, **options):
    with torch.inference_mode():
        return model.module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False,
                                     eos_token_id=None, pad_token_id=0, **options)  # fmt: skip


def test_generation_with_and_without_a_cache_gives_the_same_tokens(family_model):
    ids, mask = pad(PROMPTS, 0, "left")
    with torch_hooks.edit(family_model, {Site(1): shift(3.0)}):
        cached = generate(family_model, ids, mask, use_cache=True)
    with torch_hooks.edit(family_model, {Site(1): shift(3.0)}):
        plain = generate(family_model, ids, mask, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("use_cache", [True, False])
def test_decode_steps_see_generated_positions_and_are_left_alone(small_model, use_cache):
    ids, mask = pad(PROMPTS, 0, "left")
    seen = []

    def watch(h, where):
        seen.append((where.mask("last").sum(1).tolist(), where.mask("generated").sum(1).tolist()))
        return h

    with torch_hooks.edit(small_model, {Site(1): watch}):
        generate(small_model, ids, mask, use_cache=use_cache)
    for step, (last, generated) in enumerate(seen):
        assert last == [1 if step == 0 or not use_cache else 0] * 4
        assert generated == [0 if step == 0 else 1 if use_cache else step] * 4
    assert len(seen) == 8


def test_beams_share_the_positions_of_their_prompt(small_model):
    ids, mask = pad(PROMPTS, 0, "left")
    rows = []
    with torch_hooks.edit(small_model, {Site(1): lambda h, w: rows.append(w.mask("last").sum().item()) or h}):
        generate(small_model, ids, mask, num_beams=3)
    assert rows[0] == 12
    assert not any(rows[1:])


def test_a_one_token_prompt_is_edited(small_model):
    ids, mask = pad([[1]], 0, "left")
    with torch.inference_mode():
        plain = small_model.logits(ids, mask)
        with torch_hooks.edit(small_model, {Site(0): shift(5.0)}):
            edited = small_model.logits(ids, mask)
    assert not torch.allclose(plain, edited)


def test_hooks_are_gone_after_the_block_and_after_an_exception(small_model):
    before = hooks_of(small_model.module)
    ids, mask = pad(PROMPTS, 0, "right")

    def fail(h, where):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        with torch_hooks.read(small_model, [Site(0)]), torch_hooks.edit(small_model, {Site(1): fail}):
            small_model.run(ids, mask)
    small_model.run(ids, mask, stop_after=0)
    with pytest.raises(UserError, match="out of range"):
        with torch_hooks.edit(small_model, {Site(0): fail, Site(9): fail}):
            pass
    assert hooks_of(small_model.module) == before


def test_blocks_that_return_tuples_are_read_and_written():
    module = make_module("llama")
    plain = load(make_module("llama"), tokenizer=word_tokenizer())
    for block in module.model.layers:
        forward = block.forward
        block.forward = lambda *a, f=forward, **k: (f(*a, **k), None)
    # the decoder of this family takes a tensor, so unwrap again after every block
    for layer in module.model.layers:
        layer.register_forward_hook(lambda m, a, out: out, prepend=True)

    class Unwrap(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "inner" else getattr(self._modules["inner"], name)

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)[0]

    module.model.layers = nn.ModuleList(Unwrap(b) for b in module.model.layers)
    blocks = nn.ModuleList(w.inner for w in module.model.layers)
    module.tuple_blocks = blocks
    model = load(module, tokenizer=word_tokenizer(), blocks="tuple_blocks")
    ids, mask = pad(PROMPTS, 0, "left")
    with torch.inference_mode():
        with torch_hooks.edit(model, {Site(1): shift(1.0)}), torch_hooks.read(model, [Site(1)]) as seen:
            got = model.logits(ids, mask)
        with torch_hooks.edit(plain, {Site(1): shift(1.0)}), torch_hooks.read(plain, [Site(1)]) as wanted_seen:
            wanted = plain.logits(ids, mask)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(seen[Site(1)], wanted_seen[Site(1)])


def test_bfloat16_models_are_edited_in_their_own_dtype():
    model = make_model("qwen2")
    half = load(make_module("qwen2").bfloat16(), tokenizer=word_tokenizer())
    ids, mask = pad(PROMPTS, 0, "left")
    got = read_all(half, ids, mask, Site(1), {Site(1): shift(1.0)})
    wanted = read_all(model, ids, mask, Site(1), {Site(1): shift(1.0)})
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).norm() / wanted.norm() < 2e-2


def test_positions_by_policy():
    where = torch_hooks.Where(torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]), torch.tensor([2, 4]))

    def on(policy):
        return where.mask(policy).int().tolist()

    assert on("last") == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]
    assert on("prompt") == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert on("generated") == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert on("all") == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert on("first:1") == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert on("last:2") == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0]]
    with pytest.raises(UserError, match="unknown positions 'middle'"):
        where.mask("middle")


def test_prompt_lengths_may_be_given_for_chunked_prefill(small_model):
    ids, mask = pad([PROMPTS[0]], 0, "right")
    seen = []
    with (
        torch.inference_mode(),
        torch_hooks.edit(
            small_model, {Site(0): lambda h, w: seen.append(w.mask("last").int().tolist()) or h}, prompt_lengths=[6]
        ),
    ):
        first = small_model.module(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        small_model.module(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    assert seen == [[[0, 0, 0, 0]], [[0, 1]]]


def test_a_second_turn_in_one_context_is_edited_at_its_own_end(small_model):
    first, second = [1, 20, 21], [1, 20, 21, 50, 51, 52, 22, 23]
    seen = []
    with torch_hooks.edit(small_model, {Site(1): lambda h, w: seen.append(w.mask("last").int().tolist()) or h}):
        for turn in (first, second):
            generate(small_model, *pad([turn], 0, "left"))
    assert seen[0] == [[0, 0, 1]]
    assert seen[8] == [[0, 0, 0, 0, 0, 0, 0, 1]]


def test_a_prompt_that_is_prefilled_in_chunks_is_edited_at_its_end(small_model):
    adapter = vector(Site(1), 20 * torch.randn(small_model.width, generator=torch.Generator().manual_seed(0)))
    prompts = ["w20 w21 w22 w23 w24 w25"]
    whole, chunked = (
        small_model.generate(prompts, max_new_tokens=6, adapter=adapter, **options)
        for options in ({}, {"prefill_chunk_size": 2})
    )
    assert whole == chunked
    assert whole != small_model.generate(prompts, max_new_tokens=6)
