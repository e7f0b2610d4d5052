"""Arms side by side and dose-response curves on a small random model."""

import pytest
import torch

from tests.conftest import make_model
from workbench import plots
from workbench.adapters.adapter import vector
from workbench.errors import UserError
from workbench.evaluate.behaviour import Behaviour, log_odds, measure
from workbench.evaluate.comparison import arms_frame, dose_response
from workbench.prompts import PromptSet
from workbench.sites import Site

PROMPTS = [f"w{i} w{(7 * i) % 100}" for i in range(12)]
BEHAVIOUR = Behaviour("counting", ("w7",), "starts_with", {"openers": ["w7"]})


def push(model, size: float = 2.0):
    """A steering vector towards the opener: its column of the unembedding."""
    row = model.module.get_output_embeddings().weight[model.tokenizer("w7", add_special_tokens=False)["input_ids"][0]]
    return vector(Site(model.n_layers - 1), size * row.detach() / row.norm() * 10)


def test_arms_side_by_side():
    model = make_model("gpt2")
    prompts = PromptSet.load(PROMPTS)
    arms = [
        measure(model, BEHAVIOUR, prompts, a, name=n, max_new_tokens=2)
        for n, a in (("base", None), ("push", push(model)))
    ]
    frame = arms_frame(arms)
    assert list(frame.index) == ["base", "push"]
    assert frame.loc["base", "p vs first"] == 1
    for arm in arms:
        row = frame.loc[arm.name]
        assert row["rate low"] <= row["rate"] <= row["rate high"]
        assert row["log-odds"] == pytest.approx(float(arm.log_odds.mean()))
    assert frame.loc["push", "log-odds"] > frame.loc["base", "log-odds"]
    assert "push" in repr(arms[1])
    assert "12 prompts" in repr(arms[1])
    with pytest.raises(UserError, match="at least one"):
        arms_frame([])


def test_dose_and_response():
    model = make_model("gpt2")
    adapter = push(model) * 0.5
    points = dose_response(model, PROMPTS, ["w7"], adapter, (1.0, 0.5, 2), texts=[{"text": p} for p in PROMPTS])
    assert [p["strength"] for p in points] == [0, 0.25, 0.5, 1]
    assert points[0]["kl"] == 0
    assert points[0]["log_odds"]["value"] == pytest.approx(float(log_odds(model, PROMPTS, ["w7"]).mean()))
    assert points[2]["log_odds"]["value"] == pytest.approx(float(log_odds(model, PROMPTS, ["w7"], adapter).mean()))
    values = torch.tensor([[p["log_odds"]["value"], p["kl"]] for p in points])
    assert (values.diff(dim=0) > 0).all()
    assert "kl" not in dose_response(model, PROMPTS, ["w7"], adapter, ())[0]


def test_curves_are_drawn_with_what_they_cost():
    point = {"strength": 0.0, "log_odds": {"value": -1.0, "low": -1.1, "high": -0.9}}
    curve = [point, {**point, "strength": 1.0, "kl": 0.01}]
    figure = plots.dose_curves({"refusal": curve, "style": []})
    assert {t.name for t in figure.data if t.name} == {"refusal"}
    assert "KL" in figure.layout.yaxis2.title.text
    assert "No dose" in plots.dose_curves({"style": []}).layout.annotations[0].text
