"""A paste works under every way of running a model, and edits the positions that it names and no other.

In each case the states before and after the edit are read in every pass, and what differs is compared with what the
prompts say: the last token of each, at its own place, in the pass that holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from workbench.adapters import Adapter, LowRank
from workbench.backends.torch_hooks import Where
from workbench.convert import fit_converters
from workbench.errors import UserError
from workbench.models import Model, load
from workbench.paste import paste_adapter
from workbench.profile import profile_model
from workbench.prompts import PromptSet, encode, pad
from workbench.sites import Site

from .conftest import WIDTH, make_model, make_module, save_folder, word_tokenizer

PROMPTS = ["w20 w21 w22 w23 w24", "w30 w31", "w9", "w40 w41 w42"]
STEPS = 5
SITES = (Site(0), Site(2))


@pytest.fixture(scope="module")
def pasted() -> Adapter:
    """A random adapter of one model, rewritten for the other."""
    texts = [f"w{i % 173} w{(3 * i) % 171} w{(7 * i) % 170}" for i in range(120)]
    donor, recipient = make_model("gpt2", seed=1), make_model("llama")
    g = torch.Generator().manual_seed(7)
    shapes = ((WIDTH, 3), (3,), (3, WIDTH))
    parts = {site: LowRank(*(torch.randn(*shape, generator=g) for shape in shapes)) for site in SITES}
    stores = profile_model(donor, texts), profile_model(recipient, texts)
    return paste_adapter(Adapter(parts), fit_converters(*stores, {0: 0, 2: 2}))


@dataclass
class Watched:
    """What an adapter changed at one site, pass by pass: [rows, tokens] of truth values, and where the tokens lie."""

    changed: list[Tensor] = field(default_factory=list)
    where: list[Where] = field(default_factory=list)
    shifts: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)


def run(model: Model, adapter: Any, site: Site, call: Callable[[], Any]) -> tuple[Any, Watched]:
    """What `call` gives under the adapter, and what the adapter changed at `site`."""
    seen = Watched()

    def early(h: Tensor, where: Where) -> Tensor:
        seen.before.append(h.detach().clone())
        return h

    def late(h: Tensor, where: Where) -> Tensor:
        seen.shifts.append(h.detach() - seen.before[-1])
        seen.changed.append((h != seen.before[-1]).any(-1))
        seen.where.append(where)
        return h

    with torch.inference_mode(), model.edit({site: early}), adapter.on(model), model.edit({site: late}):
        return call(), seen


def tokens(model: Model, **options: Any) -> Tensor:
    ids, mask = pad(encode(PromptSet.load(PROMPTS), model.tokenizer), model.pad_id, "left")
    return model.module.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=STEPS,
        min_new_tokens=STEPS, pad_token_id=model.pad_id, **{"do_sample": False, **options},
    )  # fmt: skip


def lengths(model: Model) -> list[int]:
    return [len(row) for row in encode(PromptSet.load(PROMPTS), model.tokenizer)]


def check_last_alone(model: Model, seen: Watched, use_cache: bool = True, copies: int = 1) -> None:
    """In the prefill (without a cache, in every pass) the last token of each prompt, and else nothing at all."""
    longest = max(lengths(model))
    assert len(seen.changed) == STEPS
    for step, changed in enumerate(seen.changed):
        wanted = torch.zeros_like(changed)
        if step == 0 or not use_cache:
            wanted[:, longest - 1] = True  # padded left: every prompt ends in the same column
        assert changed.shape == (copies * len(PROMPTS), longest + step if step == 0 or not use_cache else 1)
        assert torch.equal(changed, wanted), f"pass {step}"


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, 1),
        ({"do_sample": True, "temperature": 2.0}, 1),
        ({"do_sample": True, "num_return_sequences": 2}, 2),
        ({"num_beams": 3}, 3),
        ({"num_beams": 2, "do_sample": True}, 2),
    ],
    ids=["greedy", "sampling", "several samples", "beams", "sampled beams"],
)
def test_generation_edits_the_last_prompt_token_and_no_other(llama, pasted, options, copies, use_cache, site):
    torch.manual_seed(0)
    _, seen = run(llama, pasted, site, lambda: tokens(llama, use_cache=use_cache, **options))
    check_last_alone(llama, seen, use_cache, copies)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 3}],
                         ids=["greedy", "sampling", "beams"])  # fmt: skip
def test_the_cache_changes_no_token(llama, pasted, options):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with pasted.on(llama):
            found.append(tokens(llama, use_cache=use_cache, **options))
    assert torch.equal(*found)
    torch.manual_seed(3)
    assert not torch.equal(found[0], tokens(llama, **options))


@pytest.mark.parametrize("positions", ["generated", "prompt", "all", "first:2", "last:2"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_other_positions_are_edited_exactly(llama, pasted, positions, use_cache):
    adapter = replace(pasted, positions=positions)
    _, seen = run(llama, adapter, SITES[0], lambda: tokens(llama, use_cache=use_cache))
    real = lengths(llama)
    for step, changed in enumerate(seen.changed):
        for row, n in enumerate(real):
            for column in range(changed.shape[1]):
                # which real token of its row this is; with a cache, a pass holds the newest alone
                at = n + step - 1 if use_cache and step else column - (max(real) - n)
                wanted = {"generated": at >= n, "prompt": 0 <= at < n, "all": at >= 0, "first:2": 0 <= at < min(2, n),
                          "last:2": max(0, n - 2) <= at < n}[positions]  # fmt: skip
                assert changed[row, column].item() == wanted, (step, row, column)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("half", [False, True])
def test_batches_of_mixed_length_padded_on_either_side(family, side, half, pasted):
    module = make_module(family)
    model = load(module.bfloat16() if half else module, tokenizer=word_tokenizer())
    adapter = replace(pasted, base={})
    rows = encode(PromptSet.load(PROMPTS), model.tokenizer)
    ids, mask = pad(rows, model.pad_id, side)
    _, seen = run(model, adapter, SITES[0], lambda: model.run(ids, mask))
    last = [max(map(len, rows)) - 1 if side == "left" else len(row) - 1 for row in rows]
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    wanted[range(len(rows)), last] = True
    assert torch.equal(seen.changed[0], wanted)
    states, shift = (t[range(len(rows)), last].float() for t in (seen.before[0], seen.shifts[0]))
    by_hand = states + adapter.delta(SITES[0], states)
    assert (states + shift - by_hand).norm() / by_hand.norm() < (2e-2 if half else 1e-5)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "no cache", "beams"])
def test_bfloat16_generation(pasted, options):
    model = load(make_module("llama").bfloat16(), tokenizer=word_tokenizer())
    _, seen = run(model, pasted, SITES[0], lambda: tokens(model, **options))
    check_last_alone(model, seen, options.get("use_cache", True), options.get("num_beams", 1))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "in place", "blocks in place"])
def test_compiled_models_generate_the_same_under_a_paste(llama, pasted, how):
    """torch's own tracing, without generating code: what a hook must survive is the graph, not the kernels."""
    torch._dynamo.reset()
    with pasted.on(llama):
        wanted = tokens(llama)
    module = make_module("llama")
    held = torch.compile(module, backend="eager", dynamic=True) if how == "whole" else module
    if how == "in place":
        module.compile(backend="eager", dynamic=True)
    if how == "blocks in place":
        for block in module.model.layers:
            block.compile(backend="eager", dynamic=True)
    model = load(held, tokenizer=word_tokenizer())
    with pasted.on(model, allow_mismatch=True):
        warm = tokens(model)
    got, seen = run(model, pasted, SITES[0], lambda: tokens(model))
    assert torch.equal(warm, wanted)
    assert torch.equal(got, wanted)
    check_last_alone(model, seen)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(make_module("llama"), tmp_path_factory.mktemp("placed"))


@pytest.mark.parametrize("spread", ["auto", "offloaded"])
def test_models_that_accelerate_has_placed(llama, pasted, spread, folder, tmp_path):
    """`auto`, and a map whose middle block lies on the disk and comes for its own pass only."""
    names = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    ]
    by_hand: Any = {name: "disk" if name == "model.layers.1" else "cpu" for name in names}
    where = {"auto": "auto", "offloaded": by_hand}[spread]
    module = AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=tmp_path / "offload")
    if spread == "offloaded":
        assert next(module.model.layers[1].parameters()).is_meta
    model = load(module, tokenizer=word_tokenizer(), prove=False)
    assert model.dtype == torch.float32
    with pasted.on(llama):
        wanted = tokens(llama)
    got, seen = run(model, Loose(pasted), SITES[0], lambda: tokens(model))
    assert torch.equal(got.cpu(), wanted)
    check_last_alone(model, seen)


@dataclass
class Loose:
    """An adapter that is put on whatever model: an offloaded one cannot be hashed."""

    adapter: Adapter

    def on(self, model: Model) -> Any:
        return self.adapter.on(model, allow_mismatch=True)


def test_load_spreads_a_folder_by_a_device_map(llama, pasted, folder):
    model = load(folder, device="map")
    found = [m.generate(PROMPTS, max_new_tokens=STEPS, adapter=pasted) for m in (llama, model)]
    assert found[0] == found[1]


def test_a_static_cache_is_refused_in_one_line(llama, pasted):
    with pytest.raises(UserError, match="generate without a static cache"), pasted.on(llama):
        tokens(llama, cache_implementation="static")
