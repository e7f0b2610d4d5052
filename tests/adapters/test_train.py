"""Training moves the answers where the demonstrations point, keeps the model frozen and the delta short."""

import pytest
import torch

from workbench.adapters.train import Scale, train_adapter
from workbench.errors import UserError
from workbench.evaluate.behaviour import log_odds
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.sites import Site

QUESTIONS = [f"w{i} w{(3 * i) % 90}" for i in range(24)]
DEMONSTRATIONS = PromptSet.load([{"prompt": q, "response": "w7 w8"} for q in QUESTIONS])


@pytest.mark.parametrize("kind", ["nodireft", "loreft", "vector"])
def test_training_brings_the_answer_out_and_leaves_the_model_frozen(small_model, kind):
    before = {k: v.clone() for k, v in small_model.module.state_dict().items()}
    trained = train_adapter(
        small_model, DEMONSTRATIONS, 1, kind=kind, rank=2, steps=60, batch_size=8, learning_rate=0.2, size_weight=0.0
    )
    gain = log_odds(small_model, QUESTIONS, ["w7"], trained.adapter) - log_odds(small_model, QUESTIONS, ["w7"])
    assert gain.mean() > 1
    assert trained.curve[-1][1] < trained.curve[0][1]
    assert trained.adapter.layers == [1]
    assert trained.adapter.rank == (1 if kind == "vector" else 2)
    assert trained.flops > 0
    assert all(torch.equal(before[k], v) for k, v in small_model.module.state_dict().items())
    assert all(p.grad is None for p in small_model.module.parameters())


def test_two_trainings_with_one_seed_are_equal(llama):
    one, other = (train_adapter(llama, DEMONSTRATIONS, [0, 2], steps=5, batch_size=8, seed=4).adapter for _ in range(2))
    assert one == other
    assert one.layers == [0, 2]


def test_the_size_penalty_keeps_deltas_short(llama):
    free, held = (
        train_adapter(llama, DEMONSTRATIONS, 1, steps=60, batch_size=8, learning_rate=0.03, size_weight=w)
        for w in (0.0, 100.0)
    )
    assert held.curve[-1][2] < 0.5 < free.curve[-1][2]


def test_loreft_writes_in_an_orthonormal_subspace(llama):
    adapter = train_adapter(llama, DEMONSTRATIONS, 1, kind="loreft", rank=3, steps=5, batch_size=8).adapter
    write = adapter.parts[Site(1)].U
    torch.testing.assert_close(write @ write.T, torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "magic"}, "unknown adapter kind 'magic'"),
        ({"rank": 0}, "rank 0 is not between"),
        ({"sites": 7}, "out of range"),
        ({"positions": "middle"}, "unknown positions"),
        ({"demonstrations": ["w1"]}, "has no response"),
    ],
)
def test_bad_arguments_are_named(llama, arguments, message):
    with pytest.raises(UserError, match=message):
        train_adapter(llama, **{"demonstrations": DEMONSTRATIONS, "sites": 1, "steps": 1, **arguments})


def test_the_unit_of_training_is_the_profile():
    states = torch.tensor([[0.0, 0.0], [6.0, 8.0]])
    assert Scale.of(states).mean.tolist() == [3.0, 4.0]
    assert Scale.of(states).spread == pytest.approx(5.0)
    with pytest.raises(UserError, match="does not vary"):
        Scale.of(states[:1])


def test_a_profile_of_another_model_is_refused(llama, gpt2):
    with pytest.raises(UserError, match="profile this model"):
        train_adapter(llama, DEMONSTRATIONS, 1, steps=1, profile=profile_model(gpt2, QUESTIONS))
