"""The control carries nothing however long prompts are: every source is a stranger's, of the same role and kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.sites import Site
from workbench.transport import transport_grid
from workbench.transport.control import Batch, Control, control_notes
from workbench.transport.rows import StoreRows
from workbench.transport.sums import FIRST, LATER, Split, sum_pairs

from .streams import write_stream

PROMPTS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 1), st.booleans()), min_size=1, max_size=20)


def batch(prompts: list[tuple[int, int, int]]) -> Batch:
    """Rows (of each prompt its number, rows and group) whose source holds prompt and group, whose target which row it is."""
    prompt, group = (np.repeat([p[i] for p in prompts], [p[1] for p in prompts]) for i in (0, 2))
    x = torch.from_numpy(np.stack([prompt, group], 1)).double()
    y = torch.cat([torch.arange(p[1]) + 1000.0 * p[0] for p in prompts]).double()[:, None]
    return Batch({"x": x, "y": y}, prompt, group, np.full(len(prompt), LATER), group)


@settings(max_examples=40, deadline=None)
@given(PROMPTS, st.integers(1, 8))
def test_each_row_has_the_source_of_a_stranger_of_its_group_wherever_there_is_one(prompts, keep):
    """Prompts of 1 to 30 rows in two groups, one or a few to a batch."""
    control, dealt, waiting = Control({"x@": "x"}, np.random.default_rng(0), keep=keep), [], []
    numbered = [(i, n, group, cut) for i, (n, group, cut) in enumerate(prompts)]
    for i, n, group, cut in numbered:
        waiting.append((i, n, group))
        if cut:
            dealt.append(control.deal(batch(waiting)))
            waiting = []
    dealt += [control.deal(batch(waiting)), control.deal(None)] if waiting else [control.deal(None)]
    found = [d for d in dealt if d is not None]
    x, y, given_x = (torch.cat([d.blocks[name] for d in found]) for name in ("x", "y", "x@"))
    assert sorted(y.flatten().tolist()) == sorted(batch([p[:3] for p in numbered]).blocks["y"].flatten().tolist())
    assert torch.equal(x[:, 0], torch.cat([torch.from_numpy(d.prompt) for d in found]).double())
    assert torch.equal(given_x[:, 1], x[:, 1])
    alone = [g for g in (0, 1) if sum(p[2] == g for p in numbered) == 1]
    own = given_x[:, 0] == x[:, 0]
    assert torch.equal(own, torch.isin(x[:, 1], torch.tensor(alone, dtype=torch.float64)))
    assert (control.own, control.rows) == (int(own.sum()), len(x))
    assert all(len(kept) <= keep for kept, _ in control._kept.values())


def test_of_one_endless_prompt_no_more_rows_wait_than_is_said():
    control, waited, dealt = Control({"x@": "x"}, np.random.default_rng(0), keep=8, most=100), [], 0
    for _ in range(40):
        made = control.deal(batch([(0, 30, 0)]))
        dealt += 0 if made is None else len(made)
        waited.append(0 if control._late is None else len(control._late))
    assert max(waited) <= 100
    assert dealt + waited[-1] == 1200
    assert control.share == 1.0


def drift(prompts: int, per_prompt: int, d: int = 4) -> dict[Site, torch.Tensor]:
    """Rows of one prompt share an offset between source and target, and nothing else."""
    g = torch.Generator().manual_seed(0)
    offset = torch.randn(prompts, 1, d, generator=g).expand(-1, per_prompt, -1).reshape(-1, d)
    return {Site(layer): offset + 0.3 * torch.randn(len(offset), d, generator=g) for layer in (0, 1)}


@pytest.mark.parametrize("read_at_once", [1, 70])
def test_prompts_as_long_as_what_is_read_at_once_have_no_control_of_their_own_rows(tmp_path, monkeypatch, read_at_once):
    store = write_stream(tmp_path / "s", drift(160, 24), 24)
    monkeypatch.setattr("workbench.transport.rows.STORE_ROWS", read_at_once)
    grid = transport_grid(store, baselines=())
    assert grid.cell(0, 1)["r2_uniform"] > 0.7
    control = grid.cell(0, 1, arm="shuffled")
    assert control["r2_uniform"] < 0.02
    shuffled = transport_grid(store, baselines=(), positions="shuffled")
    assert shuffled.cell(0, 1)["r2_uniform"] < 0.02
    assert grid.warnings == shuffled.warnings == []
    assert (control["n_train"], control["n_held_out"]) == (2880, 960)
    again = transport_grid(store, baselines=()).cell(0, 1, arm="shuffled")
    assert again["r2_uniform"] == control["r2_uniform"]


@pytest.mark.parametrize(
    ("positions", "read_at_once"), [("same", 8192), ("same", 7), ("shuffled", 8192), ("shuffled", 7)]
)
def test_sources_keep_their_role_and_their_kind(tmp_path, monkeypatch, positions, read_at_once):
    """The source's first dimension is its prompt's role, its second whether it is at position 0."""
    split = Split.of(40, folds=2, shards=2, holdout=0.25, seed=0)
    held = torch.from_numpy(split.part >= 2).double().repeat_interleave(5)
    g = torch.Generator().manual_seed(0)
    x = torch.stack([held, (torch.arange(200) % 5 == 0).double(), torch.randn(200, generator=g).double()], 1).float()
    store = write_stream(tmp_path / "s", {Site(0): x, Site(1): torch.randn(200, 3, generator=g)}, 5, start=0)
    monkeypatch.setattr("workbench.transport.rows.STORE_ROWS", read_at_once)
    (sums,) = sum_pairs(StoreRows(store), [(Site(0), Site(1))], split, positions=positions, control=positions == "same",
                        first=True, products=torch.float64, seed=0)  # fmt: skip
    assert sums.own == 0
    assert sum(m.n for m in sums.grouped.groups.values()) == 200
    for (part, kind), moments in sums.grouped.groups.items():
        mean = moments.mean("resid_post.0@shuffled")
        assert mean[0] == pytest.approx(float(part >= 2), abs=1e-12)
        assert mean[1] == pytest.approx(float(kind == FIRST), abs=1e-12)
        assert moments.names == sorted({"resid_post.0@shuffled", "resid_post.1"} | (
            {"resid_post.0"} if positions == "same" else set()))  # fmt: skip


def test_rows_that_keep_their_own_prompt_are_told(tmp_path):
    """Position 0 is in the first prompt alone: the rows that start there have no stranger of their kind."""
    rows = StoreRows(write_stream(tmp_path / "s", drift(40, 10), 10))
    rows.__dict__["_position"] = np.where(rows.store.prompt_index.numpy() == 0, rows._position - 1, rows._position)
    options = dict(positions="random", baselines=(), folds=2, shards=2)
    (note,) = transport_grid(rows, **options).warnings
    assert "% of the rows are of their own prompt" in note
    share = float(note.split("sources of ")[1].split(" %")[0])
    assert 1 < share < 100 * 9 / 360
    assert transport_grid(rows, with_bos=False, **options).warnings == []
    assert control_notes(0.01) == []
    assert control_notes(0.5)[0].startswith("the shuffled sources of 50.0 % of the rows are of their own prompt")
