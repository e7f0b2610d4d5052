"""What is built on a model works through any backend: profiles, forecasts, pasted adapters, training."""

import pytest
import torch

from tests.backends.test_contract import OTHERS, model_of
from workbench.adapters.train import train_adapter
from workbench.convert import fit_converters
from workbench.paste import paste_adapter
from workbench.profile import profile_model
from workbench.sensitivity import gradients
from workbench.sites import Site

PROMPTS = [f"w{i} w{(5 * i) % 150} w{(11 * i) % 150}"[: 4 + 4 * (i % 3)].strip() for i in range(24)]


@pytest.mark.parametrize("backend", OTHERS)
def test_profiles_and_forecasts_are_the_same(backend):
    plain, other = model_of("gpt2", "hooks"), model_of("gpt2", backend)
    sites = [Site(0), Site(2, "resid_pre"), Site(1, "attn_out")]
    stores = [profile_model(model, PROMPTS, sites=sites, tokens="all", batch_tokens=64) for model in (plain, other)]
    for site in sites:
        torch.testing.assert_close(stores[1].read(site), stores[0].read(site), atol=1e-5, rtol=1e-5)
    a, b = (gradients(model, PROMPTS[:6], ["w7"]) for model in (plain, other))
    torch.testing.assert_close(b.value, a.value, atol=1e-4, rtol=1e-4)
    for site, grad in a.grads.items():
        torch.testing.assert_close(b.grads[site], grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", OTHERS)
def test_an_adapter_is_trained_on_one_backend_and_pasted_onto_another(backend):
    donor, recipient = model_of("llama", backend), model_of("gpt2", backend)
    demonstrations = [{"prompt": p, "response": "w7 w8"} for p in PROMPTS[:8]]
    trained = [train_adapter(model, demonstrations, [1], steps=3, rank=2).adapter
               for model in (donor, model_of("llama", "hooks"))]  # fmt: skip
    for key in ("V", "b", "U"):
        ours, wanted = (getattr(adapter.parts[Site(1)], key) for adapter in trained)
        torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)
    converters = fit_converters(profile_model(donor, PROMPTS), profile_model(recipient, PROMPTS), {1: 1})
    pasted = paste_adapter(trained[0], converters)
    answers = [model.generate(PROMPTS[:4], max_new_tokens=4, adapter=pasted * 5)
               for model in (recipient, model_of("gpt2", "hooks"))]  # fmt: skip
    assert answers[0] == answers[1]
