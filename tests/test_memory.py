"""Batches that run out of memory come again in halves; everything that is scored in batches is the same then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from workbench.adapters.adapter import Adapter, LowRank
from workbench.adapters.train import train_adapter
from workbench.errors import UserError
from workbench.evaluate.behaviour import kl_on_text, log_likelihood, log_odds, shift_of_answers
from workbench.evaluate.scoring import Sequences, score
from workbench.memory import batches_that_fit, out_of_memory
from workbench.sensitivity import gradients
from workbench.sites import Site

from .conftest import WIDTH, make_model

PROMPTS = [f"w{i} w{3 * i % 50} w{i % 7}"[: None if i % 2 else 5].strip() for i in range(13)]
SHOWN = [{"prompt": p, "response": "w7 w1"} for p in PROMPTS]


@contextmanager
def room_for(most: int) -> Iterator[list[int]]:
    """Inside, a pass of more than so many prompts runs out of memory; the sizes of those that did."""
    failed: list[int] = []

    def before(module: Any, args: Any, options: Any) -> None:
        ids = options.get("input_ids", args[0] if args else None)
        if isinstance(module, PreTrainedModel) and ids is not None and len(ids) > most:
            failed.append(len(ids))
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    whole = PreTrainedModel.__call__

    def call(self: Any, *args: Any, **options: Any) -> Any:
        before(self, args, options)
        return whole(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "__call__", call)
        yield failed


def adapter() -> Adapter:
    draw = torch.Generator().manual_seed(0)
    part = LowRank(torch.randn(WIDTH, 2, generator=draw), torch.zeros(2), torch.randn(2, WIDTH, generator=draw))
    return Adapter({Site(1): part})


def close(a: Any, b: Any) -> bool:
    return bool(torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), atol=1e-4, rtol=1e-4))


SCORED: dict[str, Callable[[Any], Any]] = {
    "log-odds": lambda m: log_odds(m, PROMPTS, ["w7"], adapter()),
    "log-likelihood": lambda m: log_likelihood(m, SHOWN, adapter()),
    "neutral text": lambda m: kl_on_text(m, PROMPTS, adapter()).per_text,
    "answers": lambda m: shift_of_answers(m, [([1, 20, 21 + i], [30, 31]) for i in range(9)], adapter()),
    "gradients": lambda m: gradients(m, PROMPTS, ["w7"]).grads[Site(1)],
    "scores": lambda m: score(m, Sequences.of(m, PROMPTS), {})["untouched"].loss,
}


@pytest.mark.parametrize("what", SCORED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_scored_in_smaller_batches_is_the_same(family, what):
    model = make_model(family)
    whole = SCORED[what](model)
    with room_for(3) as failed:
        cut = SCORED[what](model)
    assert failed
    assert max(failed) > 3
    assert close(whole, cut)


def test_answers_in_smaller_batches_are_the_same(caplog):
    model = make_model("llama")
    whole = model.generate(PROMPTS, max_new_tokens=4, adapter=adapter())
    with room_for(2) as failed, caplog.at_level("WARNING", "workbench"):
        assert model.generate(PROMPTS, max_new_tokens=4, adapter=adapter()) == whole
    assert failed == [13, 6, 3]
    assert "out of memory with 13 prompts at once; going on with 6" in caplog.text


def test_one_prompt_that_does_not_fit_is_told():
    model = make_model("llama")
    with room_for(0), pytest.raises(UserError, match="one prompt alone does not fit the memory; give shorter prompts"):
        log_odds(model, PROMPTS, ["w7"])


def test_a_training_that_does_not_fit_says_which_size_to_change():
    model = make_model("llama")
    with (
        room_for(4),
        pytest.raises(UserError, match=r"out of memory with [58] demonstrations at once; give a smaller batch"),
    ):
        train_adapter(model, SHOWN, [1], steps=2, batch_size=8)
    assert not any(len(m._forward_hooks) for m in model.module.modules())


@pytest.mark.parametrize("err", [ValueError("other"), RuntimeError("shapes differ")])
def test_other_errors_are_not_swallowed(err):
    def fail() -> None:
        for batch in batches_that_fit([[1, 2]]):
            with batch:
                raise err

    with pytest.raises(type(err), match=str(err)):
        fail()


@pytest.mark.parametrize("fits", [1, 2, 3, 5, 100])
def test_every_row_is_done_once_and_in_order(fits):
    rows, done = [list(range(0, 7)), list(range(7, 9)), [9], list(range(10, 20))], []
    for batch in batches_that_fit(rows):
        with batch as some:
            if len(some) > fits:
                raise MemoryError
            done += some
    assert done == list(range(20))


def test_what_counts_as_too_little_memory():
    told = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried ..."
    )
    assert out_of_memory(told)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(None)
    assert not out_of_memory(ValueError("can't allocate memory"))
