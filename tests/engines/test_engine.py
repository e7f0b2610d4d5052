"""Engines: whatever the engine and the number of workers, and whoever dies, the results are those of one process."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench.engines import Engine, LocalEngine, Recipe, in_order, open_engine
from workbench.errors import UserError
from workbench.interrupts import Asked, Stopped
from workbench.models import Model

from ..conftest import make_model

TASKS = "tests.engines.tasks:"
PIECES = [[1, 7, 9 + i, 4] for i in range(7)]


def test_the_local_engine_runs_in_order_on_the_model_at_hand():
    model = make_model("llama")
    found = list(LocalEngine().spread(model, TASKS + "logits", PIECES, common={"scale": 2.0}))
    assert [i for i, _ in found] == list(range(7))
    assert {pid for _, (_, pid) in found} == {os.getpid()}


def test_the_local_engine_stops_between_pieces():
    stop = Asked()
    results = LocalEngine().spread(make_model("llama"), TASKS + "sleeps", [0.0, 0.0], stop=stop)
    assert next(results) == (0, 0.0)
    stop.asked = True
    with pytest.raises(Stopped):
        next(results)


def test_results_come_in_order_only_when_those_before_are_there():
    assert list(in_order([(2, "c"), (0, "a"), (1, "b"), (3, "d")])) == ["a", "b", "c", "d"]


def test_an_unknown_engine_and_options_of_another_are_refused():
    with pytest.raises(UserError, match=r"unknown engine 'dask'; allowed: local, ray"):
        with open_engine("dask"):
            pass
    with pytest.raises(UserError, match=r"workers: of the engine ray alone.*--engine ray"):
        with open_engine(workers=2):
            pass
    for bad, message in (
        ({"workers": 0}, "workers=0: give at least 1"),
        ({"gpus_per_worker": 1.5}, "or a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            with open_engine("ray", **bad):  # type: ignore[arg-type]
                pass


def test_ray_that_is_not_installed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Ray, which is not installed: pip install 'workbench\[ray\]'"):
        with open_engine("ray"):
            pass


def test_a_recipe_loads_the_same_model_and_refuses_another(saved_model: Model):
    recipe = Recipe.of(saved_model)
    assert recipe.load().fingerprint_id == saved_model.fingerprint_id
    with pytest.raises(UserError, match=r"is another model here \(fingerprint .*\) than on the driver \(0123"):
        Recipe(recipe.source, fingerprint="0123").load()


@pytest.mark.xdist_group("ray")
class TestRay:
    def test_results_are_those_of_one_process_bit_for_bit(self, saved_model: Model, two_workers: Engine):
        alone = dict(LocalEngine().spread(saved_model, TASKS + "logits", PIECES, common={"scale": 2.0}))
        spread = dict(two_workers.spread(saved_model, TASKS + "logits", PIECES, common={"scale": 2.0}))
        assert spread.keys() == alone.keys()
        assert all(np.array_equal(spread[i][0], alone[i][0]) for i in alone)
        assert os.getpid() not in {pid for _, pid in spread.values()}

    def test_workers_have_the_drivers_threads_and_model(self, saved_model: Model, two_workers: Engine):
        found = [result for _, result in two_workers.spread(saved_model, TASKS + "threads", [0])]
        assert found == [(torch.get_num_threads(), "torch.float32", saved_model.fingerprint_id)]

    def test_what_a_task_raises_is_raised_here(self, two_workers: Engine):
        with pytest.raises(UserError, match=r"^piece 2 is not for this; give another$"):
            list(two_workers.spread(None, TASKS + "fails", range(4)))
        with pytest.raises(ZeroDivisionError, match="five"):
            list(two_workers.spread(None, TASKS + "fails", [5]))
        assert [r for _, r in two_workers.spread(None, TASKS + "fails", [7])] == [7]  # and the engine goes on

    def test_what_workers_say_is_told_once(self, two_workers: Engine, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.INFO, "workbench"):
            list(two_workers.spread(None, TASKS + "talks", [0, 1, 2, 3]))
        said = [record.getMessage() for record in caplog.records]
        assert sorted(s for s in said if s.startswith("piece")) == [f"piece {i}" for i in range(4)]
        assert said.count("this model is small") == said.count("UserWarning: that is old") == 1

    def test_a_lost_worker_costs_its_piece_only(self, two_workers: Engine, tmp_path: Path):
        before = two_workers.redone
        common = {"folder": str(tmp_path), "times": 1}
        assert dict(two_workers.spread(None, TASKS + "dies", range(5), common=common)) == {i: 10 * i for i in range(5)}
        assert two_workers.redone - before == 1 == len(list(tmp_path.iterdir()))

    def test_a_piece_that_kills_every_worker_ends_in_one_line(self, two_workers: Engine, tmp_path: Path):
        with pytest.raises(UserError, match=r"piece 1 of dies was lost 3 times.*give fewer or larger workers"):
            list(two_workers.spread(None, TASKS + "dies", range(3), common={"folder": str(tmp_path), "times": 9}))

    def test_a_stop_is_heeded_while_workers_are_busy(self, two_workers: Engine):
        stop = Asked()
        results = two_workers.spread(None, TASKS + "sleeps", [0.0, 60.0], stop=stop)
        assert next(results) == (0, 0.0)
        stop.asked = True
        with pytest.raises(Stopped):
            next(results)
        assert dict(two_workers.spread(None, TASKS + "sleeps", [0.0])) == {0: 0.0}

    def test_refusals(self, saved_model: Model, two_workers: Engine):
        with pytest.raises(UserError, match=r"was made in memory.*or use the local engine"):
            list(two_workers.spread(make_model("llama"), TASKS + "fails", [0]))
        other: Any = Recipe.of(saved_model)
        with pytest.raises(UserError, match="is another model here"):
            list(two_workers.spread(Recipe(other.source, fingerprint="0123"), TASKS + "fails", [0]))
        with pytest.raises(UserError, match=r"has torch .* and not 0\.1, as the driver"):
            list(two_workers.spread(Recipe(other.source, versions=(("torch", "0.1"),)), TASKS + "fails", [0]))
        with pytest.raises(UserError, match=r"room for 3 workers of 1 CPU each, and 9 are wanted"):
            with open_engine("ray", workers=9):
                pass
        with pytest.raises(UserError, match=r"connected to Ray at .* already, not to 10\.0\.0\.1:6379"):
            with open_engine("ray", address="10.0.0.1:6379"):
                pass
