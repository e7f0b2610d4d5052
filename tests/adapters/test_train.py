"""Training moves the answers where the demonstrations point, keeps the model frozen and the delta short."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as to_bytes

from tests.conftest import ctrl_c_in_training
from workbench.adapters import Adapter, train
from workbench.adapters.demonstrations import answer_loss, encode_demonstrations
from workbench.adapters.train import train_adapter, train_into
from workbench.adapters.trainable import Scale, TrainablePart
from workbench.errors import UserError
from workbench.evaluate.behaviour import log_odds
from workbench.interrupts import Stopped
from workbench.maps.linear_map import read_safetensors
from workbench.profile import profile_model
from workbench.prompts import PromptSet
from workbench.sites import Site

QUESTIONS = [f"w{i} w{(3 * i) % 90}" for i in range(24)]
DEMONSTRATIONS = PromptSet.load([{"prompt": q, "response": "w7 w8"} for q in QUESTIONS])


@pytest.mark.parametrize("kind", ["nodireft", "loreft", "direft", "vector"])
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
        ({"positions": "last:6"}, "prompt '0' has 5 tokens, too few for positions 'last:6', which name 6"),
        ({"steps": 0}, "steps 0 is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate nan is out of range"),
        ({"patience": 0, "validation": 0.5}, "patience 0 is out of range"),
        ({"patience": 3}, "patience needs demonstrations to validate on"),
        ({"validation": 1.5}, "validation 1.5 is no share"),
        ({"validation": 0.99}, "24 demonstrations are too few to hold a share of 0.99 out of them"),
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


RECIPE = {"sites": [0, 2], "rank": 2, "steps": 7, "batch_size": 8, "validation": 0.25, "validate_every": 2,
          "learning_rate": 0.1}  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("at", range(1, 8))
def test_a_training_killed_at_any_step_ends_with_the_same_bytes(llama, tmp_path, monkeypatch, at):
    train_into(tmp_path / "whole", llama, DEMONSTRATIONS, kind="direft", checkpoint_every=3, **RECIPE)
    step = train._step

    def dies(state, *rest):
        if state.step == at - 1:
            raise SystemExit
        step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", dies)
        with pytest.raises(SystemExit):
            train_into(tmp_path / "killed", llama, DEMONSTRATIONS, kind="direft", checkpoint_every=3, **RECIPE)
    assert (tmp_path / ".killed.training.safetensors").exists() == (at > 3)
    assert not (tmp_path / "killed").exists()
    made = []
    monkeypatch.setattr(train, "_step", lambda state, *rest: (made.append(state.step), step(state, *rest)))
    train_into(tmp_path / "killed", llama, DEMONSTRATIONS, kind="direft", checkpoint_every=3, **RECIPE)
    assert made == list(range((at - 1) // 3 * 3, 7))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_checkpoint_that_outlived_its_training_goes_and_one_that_is_newer_stays(llama, tmp_path):
    train_into(tmp_path / "a", llama, DEMONSTRATIONS, **RECIPE)
    left, made = tmp_path / ".a.training.safetensors", (tmp_path / "a" / "adapter.json").stat().st_mtime
    for newer in (True, False):
        left.write_bytes(b"checkpoint")
        os.utime(left, (made, made + (9 if newer else -9)))
        with pytest.raises(UserError, match="exists already"):
            train_into(tmp_path / "a", llama, DEMONSTRATIONS, **RECIPE)
        assert left.exists() == newer


def test_ctrl_c_keeps_the_steps_that_were_made(llama, tmp_path, monkeypatch):
    whole = train_adapter(llama, DEMONSTRATIONS, **RECIPE)
    with ctrl_c_in_training(monkeypatch, after=4):
        with pytest.raises(Stopped, match="4 of 7 steps are kept; run the same again"):
            train_adapter(llama, DEMONSTRATIONS, checkpoint=tmp_path / "c.safetensors", **RECIPE)
    again = train_adapter(llama, DEMONSTRATIONS, checkpoint=tmp_path / "c.safetensors", **RECIPE)
    assert (again.adapter, again.curve, again.validation) == (whole.adapter, whole.curve, whole.validation)


@pytest.mark.parametrize("damage", ["another training", "cut short", "other parameters", "one bit"])
def test_a_checkpoint_that_does_not_fit_is_not_taken_up(llama, tmp_path, damage, caplog):
    file = tmp_path / "c.safetensors"
    other = {"seed": 5} if damage == "another training" else {}
    train_adapter(llama, DEMONSTRATIONS, checkpoint=file, **{**RECIPE, **other})
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-9])
    if damage == "one bit":
        file.write_bytes(file.read_bytes()[:-9] + bytes([file.read_bytes()[-9] ^ 4]) + file.read_bytes()[-8:])
    if damage == "other parameters":
        tensors, header = read_safetensors(file)
        tensors.pop(next(k for k in tensors if k.startswith("parameter/")))
        file.write_bytes(to_bytes(tensors, header))
    with caplog.at_level("INFO", "workbench"):
        again = train_adapter(llama, DEMONSTRATIONS, checkpoint=file, **RECIPE)
    assert "begins anew" in caplog.text
    assert again.adapter == train_adapter(llama, DEMONSTRATIONS, **RECIPE).adapter


def test_the_best_on_the_validation_split_is_kept_and_patience_ends_it(llama):
    recipe = {**RECIPE, "steps": 60, "learning_rate": 2.0, "size_weight": 0.0}  # far too fast: it overshoots
    long, short = (train_adapter(llama, DEMONSTRATIONS, **recipe, patience=p) for p in (None, 3))
    steps, losses = zip(*long.validation, strict=True)
    assert steps == tuple(range(2, 61, 2))
    assert long.best_step == steps[losses.index(min(losses))]
    assert short.steps == short.validation[-1][0] < 60
    assert [loss for _, loss in short.validation[-3:]] >= [min(loss for _, loss in short.validation)] * 3
    assert short.validation == long.validation[: len(short.validation)]
    until = train_adapter(llama, DEMONSTRATIONS, **{**recipe, "validate_every": short.best_step}, patience=1)
    assert until.validation[0] == (short.best_step, min(loss for _, loss in short.validation))


def test_the_learning_curve_is_kept_with_the_adapter(llama, tmp_path):
    trained = train_adapter(llama, DEMONSTRATIONS, **RECIPE)
    trained.adapter.save(tmp_path / "a")
    said = Adapter.load(tmp_path / "a").meta["training"]
    assert said["curve"] == [list(point) for point in trained.curve]
    assert said["validation"] == [list(point) for point in trained.validation]
    assert (said["demonstrations"], said["held_out"], said["steps_made"]) == (18, 6, 7)


@pytest.mark.parametrize("positions", ["prompt", "all", "first:2", "last:3", "generated", "first:1+last"])
def test_the_positions_that_are_trained_are_those_that_act(llama, positions):
    adapter = train_adapter(llama, DEMONSTRATIONS, 1, positions=positions, steps=25, rank=2, batch_size=8,
                            learning_rate=0.05, size_weight=0.0).adapter  # fmt: skip
    assert adapter.positions == positions
    pairs = encode_demonstrations(llama, DEMONSTRATIONS)
    with torch.no_grad():
        plain = float(answer_loss(llama, pairs))
    with torch.no_grad(), adapter.on(llama, prompt_lengths=[len(p) for p, _ in pairs]):
        assert float(answer_loss(llama, pairs)) < plain - 0.05


def test_direft_writes_in_an_orthonormal_subspace_and_begins_at_nothing(llama):
    drawn = torch.Generator().manual_seed(0)
    part = TrainablePart("direft", Scale(torch.zeros(48), 1.0), 3, drawn).frozen()
    assert not part.delta(torch.randn(5, 48)).any()
    write = (
        train_adapter(llama, DEMONSTRATIONS, 1, kind="direft", rank=3, steps=5, batch_size=8).adapter.parts[Site(1)].U
    )
    torch.testing.assert_close(write @ write.T, torch.eye(3), atol=1e-5, rtol=0)


def test_out_is_looked_at_before_anything_is_trained(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_adapter", lambda *_, **__: pytest.fail("it was trained"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    for overwrite, words in ((False, "exists already"), (True, "is not overwritten")):
        with pytest.raises(UserError, match=words):
            train_into(tmp_path / "a", llama, DEMONSTRATIONS, 1, overwrite=overwrite)


def test_a_loss_that_is_not_finite_ends_it(llama):
    with pytest.raises(UserError, match=r"the loss of step \d is (nan|inf); lower the learning rate"):
        train_adapter(llama, DEMONSTRATIONS, 1, steps=5, batch_size=8, learning_rate=1e30)
