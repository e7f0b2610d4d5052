"""Evaluation on replicas: answers are equal and figures bit-equal, for whatever engine and number of workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.adapters import Blend
from workbench.adapters.adapter import Adapter, LowRank
from workbench.engines import Engine, LocalEngine
from workbench.errors import UserError
from workbench.evaluate.behaviour import (
    Behaviour,
    kl_on_text,
    log_likelihood,
    log_odds,
    log_odds_each,
    measure_each,
    shift_of_answers,
)
from workbench.evaluate.comparison import dose_response
from workbench.generation import Decoding
from workbench.models import Model
from workbench.prompts import PromptSet
from workbench.replicas import batch_seed, packed_adapter, run_batches, spread_over, unpacked_adapter
from workbench.sites import Site

from ..conftest import make_model

OPENERS = ("w3 w4", "w9")
TEXTS = [" ".join(f"w{(7 * i * n + 3) % 150}" for i in range(2 + n % 7)) for n in range(1, 18)]
BEHAVIOUR = Behaviour("x", OPENERS, "starts_with", {"openers": ["w1"]})


def adapter(positions: str = "last", seed: int = 0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    v, b, u = (torch.randn(*shape, generator=g) for shape in ((48, 2), (2,), (2, 48)))
    return Adapter({Site(1): LowRank(0.3 * v, b, 0.3 * u, "relu")}, positions, strength=0.7, meta={"kind": "test"})


def adapters() -> list[Any]:
    """One of each kind that travels."""
    two_places = adapter("last") + adapter("first:1", 1)
    return [
        None,
        adapter("prompt"),
        two_places,
        Blend([adapter("all"), adapter("generated", 2)], ["first:2", "constant"]),
    ]


def everything(model: Model) -> dict[str, Any]:
    """What can be asked of a model in batches."""
    prompts = PromptSet.load(TEXTS)
    shown = [{"prompt": p, "response": "w4 w5"} for p in TEXTS]
    drawn = Decoding(5, temperature=5.0, seed=3).options
    arms = measure_each(
        model, BEHAVIOUR, prompts, [("plain", None), ("steered", adapter())], max_new_tokens=4, batch_size=4
    )
    shift = kl_on_text(model, [{"text": t} for t in TEXTS], adapter(), batch_size=3)
    return {
        "greedy": model.generate_each(prompts, adapters(), max_new_tokens=4, batch_size=5),
        "drawn": model.generate(prompts, adapter=adapter(), batch_size=4, **drawn),
        "measured": [(arm.name, arm.answers, arm.passed, arm.log_odds.tolist()) for arm in arms],
        "log_odds": log_odds_each(model, prompts, OPENERS, adapters(), batch_size=6).tolist(),
        "log_likelihood": log_likelihood(model, shown, adapter("all"), batch_size=4).tolist(),
        "kl": (shift.per_text.tolist(), shift.perplexity_base, shift.perplexity_edited, shift.n_tokens),
        "along_answers": shift_of_answers(model, [([1, 7, 9], [4 + i]) for i in range(5)], adapter(), 2).tolist(),
        "dose": dose_response(model, prompts, OPENERS, adapter(), [0.5, 2.0], texts=TEXTS),
    }  # fmt: skip


@contextmanager
def only(engine: Engine, workers: int) -> Iterator[Engine]:
    """The engine with so many workers of its own."""
    before = engine.workers
    engine.workers = workers
    try:
        yield engine
    finally:
        engine.workers = before


@pytest.mark.parametrize("number", range(4))
def test_adapters_travel_as_they_are(number: int):
    given = adapters()[number]
    if given is None:
        assert packed_adapter(None) is None
        return
    back = unpacked_adapter(packed_adapter(given) or {})
    assert type(back) is type(given)
    assert [a == b for a, b in zip(back.split(), given.split(), strict=True)] == [True] * len(given.split())
    assert getattr(back, "schedules", None) == getattr(given, "schedules", None)
    with pytest.raises(UserError, match=r"a dict does not travel to replicas of a model; give an Adapter or a Blend"):
        packed_adapter({})


def test_a_batch_has_a_seed_of_its_own():
    seeds = [batch_seed(seed, number) for seed in range(3) for number in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert [batch_seed(seed, 0) for seed in range(3)] == [0, 1, 2]


def test_what_is_drawn_in_a_batch_does_not_hang_on_the_batches_before_it(llama: Model):
    options = {**Decoding(6, temperature=5.0).options, "pad_token_id": 0}
    del options["seed"]
    pieces = [(0, ([[1, 26, 27], [1, 28, 29]], batch_seed(5, number))) for number in range(3)]
    runs = [[texts for _, texts in run_batches(llama, "workbench.generation:answer_batch", order, options=options)]
            for order in (pieces, pieces[::-1])]  # fmt: skip
    assert runs[0] == runs[1][::-1]
    assert runs[0][0] != runs[0][1] != runs[0][2]


def test_several_adapters_at_once_are_each_by_itself(small_model: Model):
    prompts = PromptSet.load(TEXTS)
    together = log_odds_each(small_model, prompts, OPENERS, adapters(), batch_size=6)
    alone = torch.stack([log_odds(small_model, prompts, OPENERS, a, batch_size=6) for a in adapters()])
    assert torch.equal(together, alone)
    answers = small_model.generate_each(prompts, adapters(), max_new_tokens=4, batch_size=5)
    assert answers == [small_model.generate(prompts, max_new_tokens=4, batch_size=5, adapter=a) for a in adapters()]


def test_an_engine_is_given_for_the_time_of_a_block(llama: Model):
    engine = LocalEngine()
    with spread_over(engine, llama):
        assert llama.engine is engine
        with pytest.raises(UserError), spread_over(None, llama):
            llama.generate(["w1"], batch_size=0)
        assert llama.engine is engine
    assert llama.engine is None


def test_a_batch_that_does_not_fit_is_done_in_halves(llama: Model, monkeypatch: pytest.MonkeyPatch):
    prompts, texts, given = PromptSet.load(TEXTS), [{"text": t} for t in TEXTS], adapter()
    shown = [{"prompt": p, "response": "w4 w5"} for p in TEXTS]

    def found() -> list[torch.Tensor]:
        return [log_odds(llama, prompts, OPENERS, given), kl_on_text(llama, texts, given).per_text,
                log_likelihood(llama, shown, given)]  # fmt: skip

    whole, call, sizes = (found(), llama.generate(prompts, max_new_tokens=3)), llama.backend.call, []

    def short_of_memory(model: Any, method: Any, options: Any, stop_after: Any = None) -> Any:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(model, method, options, stop_after)

    monkeypatch.setattr(llama.backend, "call", short_of_memory)
    for a, b in zip(found(), whole[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert llama.generate(prompts, max_new_tokens=3) == whole[1]
    assert max(sizes) > 5


def dying(model: Model, batch: Any, adapter: Any, folder: str) -> list[int]:
    """Kills its own process with the second batch, the first time."""
    if batch == [2] and not (Path(folder) / "died").exists():
        (Path(folder) / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [10 * i for i in batch]


@pytest.mark.xdist_group("ray")
class TestRay:
    def test_answers_and_figures_are_those_of_one_process_bit_for_bit(self, saved_model: Model, two_workers: Engine):
        alone = everything(saved_model)
        for workers in (1, 2):
            with only(two_workers, workers), spread_over(two_workers, saved_model):
                assert everything(saved_model) == alone

    def test_a_worker_that_is_killed_costs_its_batch_alone(
        self, saved_model: Model, two_workers: Engine, tmp_path: Path
    ):
        before = two_workers.redone
        pieces = [(0, [i]) for i in range(5)]
        with spread_over(two_workers, saved_model):
            found = dict(run_batches(saved_model, f"{__name__}:dying", pieces, [adapter()], folder=str(tmp_path)))
        assert found == {i: [10 * i] for i in range(5)}
        assert two_workers.redone - before == 1

    def test_an_edit_that_replicas_would_not_see_is_refused(self, saved_model: Model, two_workers: Engine):
        with spread_over(two_workers, saved_model), adapter().on(saved_model):
            with pytest.raises(UserError, match=r"is edited inside a `with` block, which its replicas would not see"):
                saved_model.generate(["w1"])
        assert saved_model.edited == 0

    def test_a_model_made_in_memory_is_refused(self, two_workers: Engine):
        model = make_model("llama")
        with spread_over(two_workers, model), pytest.raises(UserError, match=r"was made in memory"):
            model.generate(["w1"])
