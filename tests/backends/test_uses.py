"""What is built on a model works through any backend: profiles, forecasts, pasted adapters, training."""

import pytest
import torch

from probes.geometry import write_geometry
from tests.backends.test_contract import OTHERS, model_of
from workbench.adapters.train import train_adapter
from workbench.convert import fit_converters
from workbench.evaluate.causal import causal_effects
from workbench.maps.linear_map import LinearMap
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
def test_interventions_cost_the_same(backend):
    """States put in the place of others, parts of writes taken away, and blocks side by side: in nats per token."""
    plain, other = model_of("gpt2", "hooks"), model_of("gpt2", backend)
    half = LinearMap(0.5 * torch.eye(plain.width), torch.zeros(plain.width), {})
    a, b = (causal_effects(model, PROMPTS[:6], 0, 1, half) for model in (plain, other))
    assert a.arms["transported"].delta.value != 0
    for name, effect in a.arms.items():
        assert b.arms[name].delta.value == pytest.approx(effect.delta.value, abs=1e-4)
    found = [write_geometry(model, PROMPTS[:6], layers=[1], lengths=[2]) for model in (plain, other)]
    for frames in ([f.cost_frame() for f in found], [f.run_frame() for f in found]):
        wanted, given = (frame["delta"].tolist() for frame in frames)
        assert max(map(abs, wanted)) > 0.01
        assert given == pytest.approx(wanted, abs=1e-4)


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
