"""The features of a run are measured where its model is."""

from __future__ import annotations

import torch

import probes.feature_tokens
import probes.transport_report
import probes.transport_run
from probes.dictionaries import Dictionary
from probes.transport_job import TransportJob
from probes.transport_run import run_transport
from tests.conftest import make_model
from workbench.prompts import PromptSet


def test_features_are_measured_on_the_models_device(tmp_path, monkeypatch):
    model = make_model("llama")
    d, g = model.width, torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(6, d, generator=g), dim=1)
    Dictionary(directions.T.contiguous(), torch.zeros(6), directions, torch.zeros(d), "relu").save(tmp_path / "d")
    prompts = PromptSet.load([" ".join(f"w{(7 * i + 11 * j + i * j) % 170}" for j in range(12)) for i in range(60)])
    seen = []

    def watched(plain):
        def call(*args, **options):
            seen.append(options.get("device"))
            return plain(*args, **options)

        return call

    monkeypatch.setattr(probes.transport_run, "store_batches", watched(probes.transport_run.store_batches))
    monkeypatch.setattr(probes.feature_tokens, "top_tokens", watched(probes.feature_tokens.top_tokens))
    monkeypatch.setattr(probes.transport_report, "write_transport_report", lambda folder: None)  # plots take their time
    job = TransportJob("llama", "prompts", pairs=("0:1",), causal="none", alpha=0.1, folds=2, shards=2,
                       dictionaries=(f"resid_post.1={tmp_path / 'd'}",))  # fmt: skip
    run_transport(model, prompts, tmp_path / "run", job)
    assert seen == [model.device, model.device]
