"""`workbench transport` on a small random model: pairs that are chosen, and rows that cannot be fitted, told in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from workbench.transport import TransportGrid

from .conftest import WIDTH, make_module, save_folder
from .test_cli import good, told, tree, workbench


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("rows")
    save_folder(make_module("llama"), home / "llama")
    lines = (" ".join(f"w{(7 * i + 11 * j + i * j) % 170}" for j in range(12)) + "\n" for i in range(60))
    (home / "many.txt").write_text("".join(lines))
    (home / "few.txt").write_text("".join(f"w{i} w{i + 3} w{i + 7}\n" for i in range(12)))
    (home / "hardly.txt").write_text("".join(f"w{i}\n" for i in range(6)))
    return home


def line(home: Path, out: Path, prompts: str, *more: Any, model: str = "llama") -> tuple[Any, ...]:
    return ("transport", home / model, "--prompts", home / prompts, "--pairs", "0:1", "--folds", 2, "--shards", 2,
            "--grid-only", "--out", out, *more)  # fmt: skip


def test_chosen_pairs_are_measured_and_more_of_them_later(home, tmp_path):
    run = tmp_path / "run"
    whole = ("transport", home / "llama", "--prompts", home / "many.txt", "--pairs", "0:1,0:2", "--alpha", "0.1", "--folds", 2,
             "--shards", 2, "--keep-maps", "all", "--out", run)  # fmt: skip
    planned = good(*whole, "--causal", "0:1", "--dry-run").stdout
    assert "2 pairs of sites, causal figures of 1\n2 maps and 0" in planned
    assert not run.exists()
    result = good(*whole, "--causal", "0:1")
    (counted,) = re.findall(r"(\S+) FLOPs of passes and sums, (\S+) of the grid's fits", planned)
    assert "{} FLOPs of passes and sums and {} of fits".format(*counted) in (run / "log.txt").read_text(
        encoding="utf-8"
    )
    assert "warning: causal figures and shortcuts are of 1 of 2 pairs" in result.stderr
    assert "--causal all measures every pair" in (run / "report.html").read_text(encoding="utf-8")
    assert set(pd.read_parquet(run / "causal.parquet")["target"]) == {"resid_post.1"}
    before = (run / "grid" / "grid.json").stat().st_mtime_ns
    good(*whole, "--causal", "all")
    assert set(pd.read_parquet(run / "causal.parquet")["target"]) == {"resid_post.1", "resid_post.2"}
    assert (run / "grid" / "grid.json").stat().st_mtime_ns == before
    without = good(*whole, "--causal", "none")
    assert "no causal figures and no shortcuts were asked for" in without.stderr
    assert "<h2>Causal</h2>" not in (run / "report.html").read_text(encoding="utf-8")
    assert not list(run.glob(".maps*"))
    # a map that is gone is fitted again
    operators = TransportGrid.load(run / "grid").operators
    held = dict(operators)
    operators.file(next(iter(operators))).unlink()
    good(*whole, "--causal", "none")
    assert len(held) == 2
    assert TransportGrid.load(run / "grid").operators == held


def refused(*line: Any) -> str:
    """The line of an error that comes up in a step: exit code 2, no traceback."""
    result = workbench(*line)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    (said,) = (line for line in result.stderr.splitlines() if not line.startswith(("loaded ", "step ")))
    assert said.startswith("error: step grid: ")
    return said


def test_too_few_rows_are_told_with_how_many_are_needed_and_cost_no_earlier_results(home, tmp_path):
    run = tmp_path / "run"
    few = good(*line(home, run, "few.txt", "--alpha", "0.1"))
    assert f"rows are few for width {WIDTH} (n/d = " in few.stderr
    assert f"have at least {2 * WIDTH}" in few.stderr
    before = {name: (run / name).read_bytes() for name in tree(run) if (run / name).is_file() and name != "log.txt"}
    said = refused(*line(home, run, "few.txt", "--alpha", "0"))
    assert f"a transport from width {WIDTH} needs at least {WIDTH + 2} rows; got" in said
    assert said.endswith("profile more prompts, or use ridge")
    said = refused(*line(home, run, "hardly.txt", "--alpha", "0.1", "--tokens", "last"))
    assert f"a transport from width {WIDTH} needs at least 5 rows; got" in said
    after = {name: (run / name).read_bytes() for name in before}
    assert after == before
    assert not list(run.glob(".maps*"))


def test_dimensions_that_never_vary_are_told_and_a_site_that_never_does_is_refused(home, tmp_path):
    still = make_module("gpt2")
    with torch.no_grad():
        embeddings = (still.transformer.wte, still.transformer.wpe)
        written = [layer for block in still.transformer.h for layer in (block.attn.c_proj, block.mlp.c_proj)]
        for layer in (*embeddings, *written):
            layer.weight[:, 3] = 0
        for layer in written:
            layer.bias[3] = 1
    save_folder(still, home / "still")
    result = good(*line(home, tmp_path / "run", "many.txt", model="still"))
    assert f"1 of {WIDTH} dimensions of resid_post.1 never vary" in result.stderr
    (home / "same.txt").write_text("w5\n" * 40)
    said = refused(*line(home, tmp_path / "none", "same.txt", "--tokens", "last"))
    assert "resid_post.0 is constant, so there is nothing to fit" in said


def test_values_that_are_not_finite_are_refused(home, tmp_path):
    damaged = make_module("llama")
    with torch.no_grad():
        damaged.model.layers[1].mlp.down_proj.weight[3] = torch.nan
    save_folder(damaged, home / "damaged")
    told(workbench(*line(home, tmp_path / "run", "many.txt", model="damaged")),
         "damaged: block 1 makes NaN or infinity of a short text; its weights are damaged")  # fmt: skip
    rare = make_module("llama")
    with torch.no_grad():
        rare.model.embed_tokens.weight[150] = torch.nan
    save_folder(rare, home / "rare")
    said = refused(*line(home, tmp_path / "run", "many.txt", model="rare"))
    assert "block 'resid_post.1' holds NaN or infinite values; remove those rows first" in said


def test_sites_of_several_widths_have_a_report_and_a_wrong_text_costs_nothing(home, tmp_path):
    run = tmp_path / "run"
    whole = ("transport", home / "llama", "--prompts", home / "many.txt", "--alpha", "0.1", "--folds", 2, "--shards", 2,
             "--sites", "resid_pre.0,mlp_act.1,resid_post.2", "--out", run)  # fmt: skip
    good(*whole)
    assert "–" in (run / "report.html").read_text()
    before = tree(run)
    told(workbench(*whole, "--text", "nofile.txt"), "nofile.txt")
    assert tree(run) == before


def test_a_run_that_was_stopped_before_it_began_is_gone_on_with(home, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("lock", "log.txt", ".transport.toml.partial-abcdefgh"):
        (run / name).write_text("")
    good(*line(home, run, "many.txt"))
    assert (run / "metrics.json").is_file()
    assert not list(run.glob(".*"))
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "log.txt").write_text("")
    (other / "chapter.tex").write_text("years of work")
    told(workbench(*line(home, other, "many.txt")), "is not a transport run: it holds no transport.toml")
