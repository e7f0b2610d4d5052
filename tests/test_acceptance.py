"""The acceptance checks of Command-V that need models: A6, A7, A12, A13 (the others stand beside what they check)."""

import pytest
import torch

from tests.conftest import FAMILIES, make_model, make_module, word_tokenizer
from workbench.adapters.adapter import Adapter, LowRank
from workbench.backends import torch_hooks
from workbench.convert import ConverterFits, fit_converters
from workbench.models import load
from workbench.paste import capture, paste_adapter
from workbench.profile import profile_model
from workbench.prompts import pad
from workbench.sites import Site

PROMPTS = [f"w{i % 173} w{(3 * i) % 171} w{(7 * i) % 170} w{(13 * i) % 169}" for i in range(200)]
ROWS = [[1, 20, 21, 22, 23, 24], [1, 30, 31], [1], [1, 40, 41, 42]]


def random_adapter(width: int, layers: tuple[int, ...] = (1,), rank: int = 3, size: float = 2.0) -> Adapter:
    g = torch.Generator().manual_seed(7)
    return Adapter(
        {
            Site(l): LowRank(
                torch.randn(width, rank, generator=g) / width**0.5,
                torch.randn(rank, generator=g),
                size * torch.randn(rank, width, generator=g),
            )
            for l in layers
        }
    )


@pytest.mark.parametrize("method", ["pinv", "ridge"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a6_self_paste_with_enough_rows_is_the_native_adapter(family, method):
    model = make_model(family)
    store = profile_model(model, PROMPTS)
    adapter = random_adapter(model.width, (0, 1))
    converters = fit_converters(store, store, {0: 0, 1: 1}, method=method, alpha=1e-12, holdout=0.2)
    pasted = paste_adapter(adapter, converters)
    for site in adapter.parts:
        h = store.read(site, dtype=torch.float32)
        error = (pasted.delta(site, h) - adapter.delta(site, h)).norm() / adapter.delta(site, h).norm()
        assert error < 1e-4
    answers = [model.generate(PROMPTS[:12], max_new_tokens=12, adapter=a) for a in (adapter, pasted, None)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_a7_self_paste_with_too_few_rows_is_projected_and_says_so():
    model = make_model("llama")
    store = profile_model(model, PROMPTS[:30])
    fits = ConverterFits(store, store, holdout=0.0)
    site = Site(1)
    part = random_adapter(model.width).parts[site]
    folded = fits.fold(part, site, site, "pinv")
    x = fits.states("recipient", site).double()
    projector = torch.linalg.pinv(x) @ x
    h = profile_model(model, PROMPTS[100:110]).read(site, dtype=torch.float32).double()
    wanted = part.to(torch.float64).delta(h @ projector) @ projector
    got = folded.to(torch.float64).delta(h)
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    found = capture(part, x.float())
    assert found.write < 0.95


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a13_the_delta_is_that_of_the_captured_state(family):
    adapter = random_adapter(48)
    site = Site(1)
    ids, mask = pad(ROWS, 0, "left")
    for half, tolerance in ((False, 1e-5), (True, 2e-2)):
        module = make_module(family)
        model = load(module.bfloat16() if half else module, tokenizer=word_tokenizer())
        with torch.inference_mode():
            with torch_hooks.read(model, [site]) as seen:
                model.run(ids, mask)
            with adapter.on(model), torch_hooks.read(model, [site]) as edited:
                model.run(ids, mask)
        plain, moved = seen[site][:, -1].float(), edited[site][:, -1].float()
        by_hand = plain + adapter.delta(site, plain)
        assert (moved - by_hand).norm() / by_hand.norm() < tolerance
        assert torch.equal(seen[site][:, :-1], edited[site][:, :-1])


def test_a12_batches_equal_single_prompts_under_an_adapter(small_model):
    adapter = random_adapter(48, (0, 2))
    prompts = ["w20 w21 w22 w23 w24", "w30 w31", "w9", "w40 w41 w42"]
    together = small_model.generate(prompts, max_new_tokens=10, adapter=adapter)
    alone = [small_model.generate([p], max_new_tokens=10, adapter=adapter)[0] for p in prompts]
    no_cache = small_model.generate(prompts, max_new_tokens=10, adapter=adapter, use_cache=False)
    assert together == alone == no_cache
    assert together != small_model.generate(prompts, max_new_tokens=10)
