"""Grouped moments: every subset of groups equals its rows in one pass; passes fit into the memory given."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import UserError
from workbench.maps import GroupedMoments, Moments, plan_passes

from .example_rows import noise
from .test_moments import assert_same


@pytest.fixture
def rows():
    x = noise(400, 5) + 40
    fold = torch.arange(400) % 4
    kind = ["bos" if i % 10 == 0 else "word" for i in range(400)]
    return {"x": x, "y": x[:, :3] * 2 - 7}, fold, kind


def grouped(rows, batches: int = 3) -> GroupedMoments:
    blocks, fold, kind = rows
    made = GroupedMoments("fold", "kind")
    for index in torch.arange(400).chunk(batches):
        labels = [kind[i] for i in index.tolist()]
        made.update({name: block[index] for name, block in blocks.items()}, fold=fold[index], kind=labels)
    return made


def one_pass(rows, keep: torch.Tensor) -> Moments:
    return Moments().update({name: block[keep] for name, block in rows[0].items()})


def test_4_any_subset_is_its_rows_in_one_pass(rows):
    made, fold, words = grouped(rows), rows[1], torch.tensor([kind == "word" for kind in rows[2]])
    assert made.n == 400
    assert_same(made.total(), one_pass(rows, fold >= 0))
    assert_same(made.total(kind="word"), one_pass(rows, words))
    assert_same(made.total(fold=[0, 2], kind="word"), one_pass(rows, words & (fold % 2 == 0)))
    assert_same(made.without(fold=1), one_pass(rows, fold != 1))
    parts = made.parts("fold", kind="word")
    assert list(parts) == [0, 1, 2, 3]
    assert_same(made.total(kind="word") - parts[1], one_pass(rows, words & (fold != 1)), rtol=1e-11)


def test_all_groups_share_one_shift(rows):
    shifts = [group.shift["x"] for group in grouped(rows).groups.values()]
    assert all(torch.equal(shift, shifts[0]) for shift in shifts)


def test_halves_add_up_group_by_group(rows):
    blocks, fold, kind = rows
    halves = []
    for part in (slice(0, 150), slice(150, 400)):
        half = GroupedMoments("fold", "kind")
        halves.append(half.update({k: v[part] for k, v in blocks.items()}, fold=fold[part], kind=kind[part]))
    both = halves[0] + halves[1]
    assert_same(both.total(), one_pass(rows, fold >= 0))
    assert_same(both.total(fold=3), one_pass(rows, fold == 3))
    assert halves[0].n == 150


@pytest.mark.parametrize("waiting", [0, 30, 10_000])
def test_rows_that_wait_are_never_missed(rows, waiting):
    blocks, fold, kind = rows
    made = GroupedMoments("fold", "kind", waiting=waiting)
    for i in range(0, 400, 25):
        part = slice(i, i + 25)
        made.update({k: v[part] for k, v in blocks.items()}, fold=fold[part], kind=kind[part])
        assert made.n == i + 25
    assert_same(made.total(), one_pass(rows, fold >= 0))
    assert_same(made.total(fold=2), one_pass(rows, fold == 2))


def test_one_label_for_a_whole_batch(rows):
    made = GroupedMoments("shard").update(rows[0], shard=7)
    assert made.labels("shard") == [7]
    assert_same(made.total(shard=7), Moments().update(rows[0]))


def test_save_load(rows, tmp_path):
    made = grouped(rows)
    made.save(tmp_path / "m", meta={"model": "tiny", "sites": ["x", "y"]})
    back = GroupedMoments.load(tmp_path / "m")
    assert back.meta == {"model": "tiny", "sites": ["x", "y"]}
    assert list(back.groups) == list(made.groups)
    assert_same(back.total(kind="bos"), made.total(kind="bos"), rtol=0)
    assert {file.suffix for file in (tmp_path / "m").iterdir()} == {".json", ".safetensors"}
    with pytest.raises(UserError, match="exists already"):
        made.save(tmp_path / "m")
    with pytest.raises(UserError, match=r"no groups\.json"):
        GroupedMoments.load(tmp_path)
    (tmp_path / "m" / "groups.json").write_text("{}")
    with pytest.raises(UserError, match="does not say format"):
        GroupedMoments.load(tmp_path / "m")
    (tmp_path / "m" / "groups.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        GroupedMoments.load(tmp_path / "m")


def test_refusals(rows):
    made = grouped(rows)
    with pytest.raises(UserError, match="axes with names of their own"):
        GroupedMoments()
    with pytest.raises(UserError, match="labels for fold, kind; got fold"):
        made.update(rows[0], fold=0)
    with pytest.raises(UserError, match="got 3 for 400 rows"):
        made.update(rows[0], fold=[1, 2, 3], kind="word")
    with pytest.raises(UserError, match="every batch needs the blocks"):
        made.update({"x": rows[0]["x"]}, fold=0, kind="word")
    with pytest.raises(UserError, match="every batch needs the blocks"):
        made.update({"x": rows[0]["x"][:5], "y": rows[0]["y"][:4]}, fold=0, kind="word")
    with pytest.raises(UserError, match="no rows have kind 'pad'"):
        made.total(kind="pad")
    with pytest.raises(UserError, match="no axis 'shard'; these moments are grouped by fold, kind"):
        made.parts("shard")
    with pytest.raises(UserError, match="do not add"):
        made + GroupedMoments("fold")


def test_15_passes_hold_every_pair_once_and_fit():
    widths = {f"l{i}": 8 for i in range(6)}
    pairs = [(f"l{i}", f"l{j}") for i in range(6) for j in range(i + 1, 6)]
    for memory in (100_000, 45_000, 40_000):
        passes = plan_passes(widths, pairs, memory)
        assert sorted(pair for some in passes for pair in some) == sorted(pairs)
        for some in passes:
            kept = Moments(pairs=some).update({name: torch.randn(3, 8) for name in {n for p in some for n in p}})
            assert 7 * sum(block.numel() * 8 for block in kept.product.values()) <= memory
    assert len(plan_passes(widths, pairs, 100_000)) == 1
    assert len(plan_passes(widths, pairs, 40_000)) > 1
    with pytest.raises(UserError, match="l0 with 5 targets"):
        plan_passes(widths, pairs, 1000)


def test_what_was_handed_out_stays_as_it_was(rows):
    blocks, _, kind = rows
    a, b = (GroupedMoments("fold", "kind").update(blocks, fold=i, kind=kind) for i in (0, 1))
    n = a.n
    handed = [a.total(fold=0, kind="bos"), a.without(kind="word"), a.parts("kind")["bos"], a + b, b + a]
    before = [(found.n, found.total().cov("x", "x") if isinstance(found, GroupedMoments) else found.cov("x", "x").clone())
              for found in handed]  # fmt: skip
    (a + b).update(blocks, fold=0, kind="bos").update(blocks, fold=1, kind="bos")
    assert (a.n, b.n) == (n, n)
    a.update(blocks, fold=0, kind="bos")
    b.update(blocks, fold=1, kind="bos")
    for found, (rows_before, cov) in zip(handed, before, strict=True):
        whole = found.total() if isinstance(found, GroupedMoments) else found
        assert whole.n == rows_before
        assert torch.equal(whole.cov("x", "x"), cov)


def test_adding_to_a_total_does_not_change_the_groups(rows):
    grouped_rows = GroupedMoments("fold").update(rows[0], fold=0)
    grouped_rows.total().update(rows[0])
    assert grouped_rows.n == 400
