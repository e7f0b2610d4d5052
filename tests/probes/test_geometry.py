"""The geometry of writes: planted truths, what must cost nothing, and what the bundled models show."""

from __future__ import annotations

import pytest
import torch

from probes.geometry import write_geometry
from workbench.errors import UserError
from workbench.models import load
from workbench.prompts import PromptSet

from ..conftest import make_model

TEXTS = ["w1 w2 w3 w4 w5", "w7 w3 w9", "w2 w2 w8 w4", "w11 w12 w13 w14 w1"]


@pytest.fixture(scope="module")
def recipient():
    return write_geometry(load("bundled:recipient"), PromptSet.load("bundled:evaluation_text")[:12], max_length=32)


def test_a_block_that_writes_nothing_has_no_part_that_costs():
    """Nor does leaving it out."""
    model = make_model("llama")
    with torch.no_grad():
        model.block(2).mlp.down_proj.weight.zero_()
        model.block(2).self_attn.o_proj.weight.zero_()
    found = write_geometry(model, TEXTS, layers=[2], lengths=[1])
    for part in ("parallel", "orthogonal"):
        for write in ("attn", "mlp", "block"):
            assert found.cost(2, write, part).value == 0.0
    assert found.run_cost("skipped", 2, 1).value == pytest.approx(0, abs=1e-6)
    assert abs(found.run_cost("skipped", 0, 1).value) > 0.1


def test_one_block_alone_costs_nothing_and_two_are_the_same_either_way(recipient):
    for start in range(recipient.n_layers):
        for kind in ("parallel", "stale"):
            assert recipient.run_cost(kind, start, 1).value == 0.0
    for start in range(recipient.n_layers - 1):
        assert recipient.run_cost("parallel", start, 2) == recipient.run_cost("stale", start, 2)


def test_the_bundled_recipient_needs_the_orthogonal_parts_and_longer_runs_cost_more(recipient):
    """As the original does beyond the first block; runs that begin at the same block cost more the longer they are."""
    for layer in range(1, recipient.n_layers):
        assert recipient.difference(layer).low > 0
        assert recipient.cost(layer, "block", "orthogonal").value > 4 * recipient.cost(layer, "block", "parallel").value
    for length in range(2, recipient.n_layers + 1):
        grown = recipient.growth("parallel", length)
        assert grown is not None
        assert grown.low > 0
        assert recipient.length_cost("skipped", length).value > recipient.length_cost("parallel", length).high
    assert recipient.growth("parallel", 1) is None


def test_the_tables_hold_every_arm(recipient):
    costs, runs, lengths, sizes = (
        recipient.cost_frame(), recipient.run_frame(), recipient.length_frame(), recipient.size_frame()
    )  # fmt: skip
    assert len(costs) == 4 * 3 * 3
    assert len(runs) == 3 * 10
    assert len(lengths) == 3 * 4
    assert lengths["places"].tolist() == [4, 3, 2, 1] * 3
    assert len(sizes) == 4 * 2
    assert ((costs["delta_low"] <= costs["delta"]) & (costs["delta"] <= costs["delta_high"])).all()
    assert ((sizes["share"] >= 0) & (sizes["share"] <= 1)).all()
    assert "<table" in recipient._repr_html_()
    assert repr(recipient).startswith("WriteGeometry(bundled:recipient, 4 blocks")


def test_batches_do_not_matter(gpt2):
    made = [write_geometry(gpt2, TEXTS, layers=[1], lengths=[2], batch_size=size) for size in (1, 4)]
    for a, b in zip(made[0].cost_frame().to_dict("records"), made[1].cost_frame().to_dict("records"), strict=True):
        assert a["delta"] == pytest.approx(b["delta"], abs=1e-4)
    for a, b in zip(made[0].run_frame().to_dict("records"), made[1].run_frame().to_dict("records"), strict=True):
        assert a["delta"] == pytest.approx(b["delta"], abs=1e-4)


def test_a_parallel_family_is_taken_apart_too():
    found = write_geometry(make_model("gpt_neox"), TEXTS, layers=[1], lengths=[2])
    assert found.cost(1, "block", "orthogonal").value != 0


def test_refusals(gpt2):
    for options, message in (
        ({"layers": [7]}, r"layers \[7\] are out of range: .* has layers 0 to 2"),
        ({"layers": []}, "are out of range"),
        ({"lengths": [4]}, r"lengths of runs \[4\] are out of range: .* has 3 blocks"),
        ({"lengths": [0]}, "are out of range"),
        ({"positions": "some"}, "unknown tokens 'some'"),
        ({"max_length": 1}, "needs at least 2 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            write_geometry(gpt2, TEXTS, **options)
    with pytest.raises(UserError, match="post-norm"):
        write_geometry(make_model("opt_post_norm"), TEXTS)
    found = write_geometry(gpt2, TEXTS, layers=[1], lengths=[2])
    with pytest.raises(UserError, match=r"\(0, 'attn', 'parallel'\) was not measured"):
        found.cost(0, "attn", "parallel")
    with pytest.raises(UserError, match=r"no run 'stale' of 3 blocks was measured; there are \[2\]"):
        found.length_cost("stale", 3)
