"""All pastes of an adapter ranked: what is forecast is what the pastes do, and what cannot be forecast is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import make_model
from workbench.adapters.adapter import Adapter, LowRank
from workbench.convert import ConverterFits
from workbench.errors import UserError
from workbench.forecast_table import rank_pastes
from workbench.profile import profile_model
from workbench.sites import Site

from .test_sensitivity import PROMPTS, SHOWN

SETS = {"openers": (PROMPTS, ["w7"]), "answers": (SHOWN, [])}


@pytest.fixture(scope="module")
def pair():
    donor, recipient = make_model("llama"), make_model("gpt2", seed=1)
    prompts = [f"w{i} w{(3 * i) % 150}" for i in range(80)]
    fits = ConverterFits(profile_model(donor, prompts), profile_model(recipient, prompts))
    draw = torch.Generator().manual_seed(0)
    parts = {Site(l): LowRank(torch.randn(48, 2, generator=draw) / 48, torch.randn(2, generator=draw),
                              torch.randn(2, 48, generator=draw)) for l in (0, 1)}  # fmt: skip
    return Adapter(parts, base=donor.fingerprint), fits, donor, recipient


@pytest.mark.parametrize("positions", ["last", "prompt"])
@pytest.mark.parametrize("kind", SETS)
def test_small_pastes_do_what_was_forecast(pair, kind, positions):
    adapter, *others = pair
    adapter = replace(adapter, parts={Site(1): adapter.parts[Site(1)]}, positions=positions)
    found = rank_pastes(adapter, *others, *SETS[kind], strength=0.01, measured=30)
    assert len(found.forecasts) == len(found.measured) == 3 * 5
    for f, m in zip(found.forecasts, found.measured, strict=True):
        assert m.value == pytest.approx(f.on, abs=0.05 * abs(f.on) + 2e-4)
        assert m.low <= m.value <= m.high
    assert found.spearman > 0.95


def test_all_layers_of_an_adapter_and_what_must_not_change(pair):
    adapter, *others = pair
    found = rank_pastes(adapter, *others, PROMPTS, ["w7"], off={"elsewhere": (PROMPTS[:5], ["w9"])}, texts=[{"text": p}
                        for p in PROMPTS], methods=[("ridge", 0.1), ("pls", 4.0)], measured=1)  # fmt: skip
    assert {len(f.candidate.pairs) for f in found.forecasts} == {2}
    assert all(f.kl > 0 and f.off_rate["elsewhere"] > 0 for f in found.forecasts)
    assert found.texts
    frame = found.frame()
    assert frame["measured value"].notna().tolist() == [True] + [False] * (len(frame) - 1)
    assert "log-odds" in found._repr_html_()


def test_what_no_forecast_is_of(pair):
    adapter, *others = pair
    with pytest.raises(UserError, match="moves no first token"):
        rank_pastes(replace(adapter, positions="generated"), *others, PROMPTS, ["w7"])
    with pytest.raises(UserError, match="one set of positions"):
        rank_pastes(adapter + replace(adapter, positions="all"), *others, PROMPTS, ["w7"])
