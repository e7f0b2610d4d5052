"""Planted transport and the massive first token through the whole grid, its report and its table (checks 10 and 11)."""

from __future__ import annotations

from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import Tensor

from probes.transport_report import render_transport
from probes.transport_run import grid_metrics
from workbench.atomic import write_json
from workbench.cli_transport import _table
from workbench.runs import environment
from workbench.sites import Site
from workbench.transport import TransportGrid, transport_grid

from .streams import write_stream

PER_PROMPT = 250


def draw(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("positions", ["same", "previous"])
def test_10_planted_transport_is_found_within_three_standard_errors(tmp_path, positions):
    """y = x + P x (rank 5) + noise on 100 dimensions, and (x^2 - 1) / 2, an even function, on 28, at the same token or
    one on; the truth is the share of the variance that is linear."""
    n, d, linear = 40_000, 128, 100
    x = draw(n, d, 0)
    weight = torch.eye(d, linear) + draw(d, 5, 1) @ draw(5, linear, 2) / d
    clean = x @ weight
    spread = 0.2 * weight.square().sum(0).sqrt()
    y = torch.cat([clean + spread * draw(n, linear, 3), 0.5 * (x[:, linear:] ** 2 - 1)], 1)
    signal, rest = weight.square().sum(), spread.square().sum() + 0.5 * (d - linear)
    truth = float(signal / (signal + rest))
    if positions == "previous":
        y = y.roll(1, 0)
    store = write_stream(tmp_path / "s", {Site(0): x, Site(1): y}, PER_PROMPT)
    grid = transport_grid(store, positions=positions, shards=20)
    cell = grid.cell(0, 1)
    assert 0 < cell["r2_weighted_se"] < 0.005
    assert abs(cell["r2_weighted"] - truth) < 3 * cell["r2_weighted_se"]
    each, error = grid.per_output[Site(0), Site(1)]
    assert float(each[:linear].min()) > 0.95
    assert float(each[linear:].abs().max()) < 0.02
    assert ((error > 0) & (error < 0.02)).all()
    assert float((each[:linear] - 1 / 1.04).abs().div(error[:linear]).median()) < 1.5  # 0.7 if the errors are right
    control = grid.cell(0, 1, arm="shuffled")
    assert abs(control["r2_weighted"]) < 3 * control["r2_weighted_se"] + d / n


@pytest.fixture(scope="module")
def massive(tmp_path_factory) -> TransportGrid:
    """y = x A + noise of equal variance, R2 = 0.5; position 0 of each prompt is one row of amplitude 100."""
    n, d = 20_000, 24
    x = draw(n, d, 0)
    y = x @ torch.linalg.qr(draw(d, d, 1)).Q + draw(n, d, 2)
    x[::PER_PROMPT], y[::PER_PROMPT] = 100 * draw(1, d, 3), 100 * draw(1, d, 4)
    store = write_stream(tmp_path_factory.mktemp("massive") / "s", {Site(0): x, Site(1): y}, PER_PROMPT, start=0)
    return transport_grid(store)


def test_11_without_bos_is_the_default_and_with_it_every_score_is_lifted(massive):
    without, with_bos = massive.cell(0, 1), massive.cell(0, 1, bos=True)
    assert without["r2_uniform"] == pytest.approx(0.499, abs=0.01)
    assert without["r2_uniform_low"] < 0.5 < without["r2_uniform_high"]
    assert with_bos["r2_uniform"] >= 0.85
    assert with_bos["n_train"] + with_bos["n_held_out"] == without["n_train"] + without["n_held_out"] + 80 == 20_000
    # what the massive row lends is no transport: pairs of different prompts have it too
    assert massive.cell(0, 1, arm="shuffled", bos=True)["r2_uniform"] > 0.7
    assert abs(massive.cell(0, 1, arm="shuffled")["r2_uniform"]) < 0.01


def test_11_the_report_and_the_table_of_the_command_show_both(massive, tmp_path):
    job = {"name": "planted", "prompts": "p", "tokens": "all", "n_prompts": 80, "positions": "same", "alpha": "cv"}
    metrics = {"format": "workbench.transport", "grid": grid_metrics(massive), "warnings": [], "environment": environment(),
               "job": job}  # fmt: skip
    massive.save(tmp_path / "grid")
    write_json(tmp_path / "metrics.json", metrics)
    report, printed = render_transport(tmp_path), StringIO()
    Console(file=printed, width=300).print(_table(metrics))
    shown = printed.getvalue()
    table = report.split("<h2>With BOS</h2>")[1].split("</table>")[0]
    for bos in (False, True):
        line = massive.cell(0, 1, bos=bos)
        score, low, high = (line[f"r2_uniform{end}"] for end in ("", "_low", "_high"))
        assert f"{score:.3f}" in table
        assert f"{low:.3f} to {high:.3f}" in table
        assert f"{score:.4f} ({low:.4f} to {high:.4f})" in shown
    assert "ridge with BOS" in shown
