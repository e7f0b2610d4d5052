"""A transport whose rows come from replicas is the transport of one process, bit for bit."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from workbench.engines import Engine
from workbench.errors import UserError
from workbench.models import Model
from workbench.profile import plan as profile_plan
from workbench.profile import profile_model
from workbench.transport import TransportGrid, replica_rows, transport_grid

PROMPTS = [" ".join(f"w{(7 * i * n + 3) % 150}" for i in range(4 + n % 9)) for n in range(1, 81)]
QUICK: dict[str, Any] = {"sites": [0, 1, 2], "folds": 2, "shards": 4, "keep_maps": True}


def made(model: Model, engine: Engine | None, **options: Any) -> TransportGrid:
    return transport_grid(model, PROMPTS, engine=engine, **{**QUICK, **options})


@pytest.mark.xdist_group("ray")
class TestRay:
    @pytest.mark.parametrize("positions", ["same", "previous"])
    def test_the_table_and_the_maps_are_those_of_one_process(
        self, saved_model: Model, two_workers: Engine, monkeypatch: pytest.MonkeyPatch, positions: str
    ):
        monkeypatch.setattr(profile_plan, "BLOCK_ROWS", 64)
        monkeypatch.setattr(replica_rows, "AHEAD", 1 << 15)  # several stretches
        alone = made(saved_model, None, positions=positions)
        for workers in (1, 2):
            monkeypatch.setattr(two_workers, "workers", workers)
            found = made(saved_model, two_workers, positions=positions)
            pd.testing.assert_frame_equal(found.table, alone.table, check_exact=True)
            assert found.meta == alone.meta
            for pair, kept in alone.operators.items():
                assert torch.equal(found.operators[pair].weight, kept.weight)

    def test_what_stays_here_is_refused_in_one_line(self, saved_model: Model, two_workers: Engine):
        with pytest.raises(UserError, match=r"positions='attention' needs the attention maps of the model at hand"):
            made(saved_model, two_workers, positions="attention")
        with profile_model(saved_model, PROMPTS[:4], tokens="all") as store:
            with pytest.raises(UserError, match="an engine runs a model, and rows of a store are read here"):
                transport_grid(store, engine=two_workers)
