"""A transfer run between two made-up models whose layers answer one to one, as a job leaves it, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w
import torch

from workbench.adapters.adapter import Adapter, LowRank
from workbench.atomic import write_json
from workbench.sites import Site

from ..metrics_example import metrics
from ..transport.streams import stream, write_stream

D_DONOR, D_RECIPIENT, LAYERS, ROWS = 12, 8, 3, 300


def converter_run(folder: Path, name: str = "demo", *, profiles: bool = True, adapter_layer: int = 2) -> Path:
    """Layer l of the donor is a linear image of layer l of the recipient, and a little noise."""
    run, g = folder / name, torch.Generator().manual_seed(1)
    run.mkdir(parents=True)
    recipient = stream(ROWS, D_RECIPIENT, LAYERS, noise=1.0)
    donor = {site: x @ torch.randn(D_RECIPIENT, D_DONOR, generator=g) + 0.05 * torch.randn(ROWS, D_DONOR, generator=g)
             for site, x in recipient.items()}  # fmt: skip
    if profiles:
        (run / "profiles").mkdir()
        write_stream(run / "profiles" / "donor", donor, 1)
        write_stream(run / "profiles" / "recipient", recipient, 1)
    behaviour = {"name": "reasoning", "openers": ["let"], "grader": "regex", "grader_args": {"pattern": "."},
                 "adapter": "bundled:reasoning", "validation": "bundled:validation_reasoning",
                 "evaluation": "bundled:evaluation_reasoning"}  # fmt: skip
    job: dict[str, Any] = {"name": name, "donor": {"model": "bundled:donor"}, "recipient": {"model": "bundled:recipient"},
                           "behaviours": [behaviour]}  # fmt: skip
    (run / "job.toml").write_text(tomli_w.dumps(job))
    part = LowRank(torch.randn(D_DONOR, 2, generator=g), torch.zeros(2), torch.randn(2, D_DONOR, generator=g))
    Adapter({Site(adapter_layer): part}, name="reasoning").save(run / "adapters" / "reasoning" / "donor")
    write_json(run / "metrics.json", metrics())
    return run
