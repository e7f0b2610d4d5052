"""Samples of rows are even, repeatable, and read no more of a store than they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from workbench import UserError
from workbench.sites import Site
from workbench.store import Store, sample
from workbench.store.context import row_frame, rows_in_context
from workbench.store.rows import RowFiles
from workbench.store.sample import stratified_rows

from .made import made_store, noise

LENGTHS = [2, 5, 40, 3, 60, 10] * 5


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    texts = [" ".join(f"w{j}" for j in range(length)) for length in LENGTHS]
    labels = ["rare" if i == 3 else "long" if LENGTHS[i] >= 40 else None for i in range(len(LENGTHS))]
    metas = [{"topic": i % 2, "odd": [i]} for i in range(len(LENGTHS))]
    values = {Site(0): noise(sum(LENGTHS), 4)}
    path = tmp_path_factory.mktemp("sample") / "s"
    return made_store(path, values, texts, labels=labels, metas=metas, group=37, shard=50)


def test_an_even_sample_takes_one_row_from_each_stretch(store):
    rows = stratified_rows(store, 60)
    assert len(rows) == 60
    assert torch.equal(rows, rows.unique())
    for i, row in enumerate(rows.tolist()):
        assert i * store.n_rows // 60 <= row < (i + 1) * store.n_rows // 60


@pytest.mark.parametrize("by", ["row", "prompt", "position", "token_id", "label", "id", "meta.topic"])
def test_a_sample_is_repeatable_ascends_and_has_no_row_twice(store, by):
    rows = stratified_rows(store, 41, by)
    assert len(rows) == 41
    assert torch.equal(rows, stratified_rows(store, 41, by))
    assert not torch.equal(rows, stratified_rows(store, 41, by, seed=1))
    assert (rows.diff() > 0).all()


@pytest.mark.parametrize(("by", "column"), [("prompt", "prompt"), ("position", "position"), ("label", "label")])
def test_every_value_has_as_many_rows_as_any_other_that_has_more(store, by, column):
    every = row_frame(store, None)[column].value_counts(dropna=False)
    for n in (30, 77, 150):
        drawn = row_frame(store, stratified_rows(store, n, by))[column].value_counts(dropna=False)
        most = drawn.max()
        for value, count in every.items():
            got = drawn.get(value, 0)
            assert got == min(count, most) or got == most - 1


def test_more_rows_than_there_are_give_all(store):
    for by in ("row", "prompt", "label"):
        assert torch.equal(stratified_rows(store, 10**6, by), torch.arange(store.n_rows))


def test_first_rows_are_told_apart(store):
    position = store.rows()["position"].to_numpy()
    assert (position[stratified_rows(store, 20, first=True).numpy()] == 0).all()
    assert (position[stratified_rows(store, 200, first=False).numpy()] > 0).all()
    assert len(stratified_rows(store, 10**6, first=True)) == len(LENGTHS)


def test_a_large_store_is_sampled_in_windows_and_never_read_whole(store, monkeypatch):
    monkeypatch.setattr(sample, "CONSIDERED", 40)
    monkeypatch.setattr(sample, "WINDOWS", 4)
    read: Counter[str] = Counter()
    group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, columns: (
        read.update(groups=1, columns=len(columns)), group(self, i, columns))[1])  # fmt: skip
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("the table was read whole"))
    monkeypatch.setattr(RowFiles, "gather", lambda *_: pytest.fail("activations were read"))
    monkeypatch.setattr(RowFiles, "map", lambda *_: pytest.fail("activations were read"))
    fresh = Store.open(store.path)
    rows = stratified_rows(fresh, 20, "position")
    assert len(rows) == 20
    assert read["groups"] <= 8 < -(-store.n_rows // 37), "four windows of ten rows lie in two row groups each at most"
    assert read["columns"] == read["groups"], "one column"
    quarters = np.unique(rows.numpy() * 4 // store.n_rows)
    assert len(quarters) == 4


def test_what_cannot_be_drawn_is_refused(store):
    with pytest.raises(UserError, match="n=0: a sample has at least one row"):
        stratified_rows(store, 0)
    with pytest.raises(UserError, match=r"unknown column 'topic'.*allowed: row, prompt.*meta.KEY"):
        stratified_rows(store, 5, "topic")


def test_rows_are_shown_with_what_their_tables_say(store):
    rows = [200, 3, 3, 0]
    frame, whole = row_frame(store, rows), store.rows()
    assert frame["row"].tolist() == rows
    for mine, theirs in (("prompt", "prompt"), ("position", "position"), ("token_id", "token_id"), ("token", "text")):
        assert frame[mine].tolist() == whole[theirs].iloc[rows].tolist()
    prompts = store.prompts()
    assert frame["id"].tolist() == prompts["id"].iloc[frame["prompt"].tolist()].tolist()
    assert frame["meta.topic"].tolist() == [p % 2 for p in frame["prompt"]]
    assert frame["meta.odd"].tolist() == [f"[{p}]" for p in frame["prompt"]]


def test_a_token_stands_in_its_prompt(store):
    frame = rows_in_context(store, None, width=7)
    prompts = store.prompts()["text"]
    numbers = store.rows()["prompt"]
    for line, number in zip(frame.itertuples(), numbers, strict=True):
        assert f"{line.before}{line.token}{line.after}" in prompts[number]
        assert len(line.before) <= 7
        assert len(line.after) <= 7
    first = frame.iloc[2]  # the second prompt's first word
    assert (first["before"], first["token"], first["after"]) == ("", "w0", " w1 w2 ")


def test_what_is_known_of_rows_is_not_read_again(store, monkeypatch):
    rows = [200, 3, 7]
    expected, known = rows_in_context(store, rows), row_frame(store, [5, *rows])
    take = type(store.tables).take
    monkeypatch.setattr(type(store.tables), "take", lambda self, name, *rest: (
        pytest.fail("rows were read") if name == "rows.parquet" else take(self, name, *rest)))  # fmt: skip
    found = rows_in_context(store, rows, known=known.iloc[1:])
    assert found.equals(expected)


def test_a_store_that_says_little_is_shown_with_empty_cells(tmp_path: Path):
    from tests.transport.streams import stream, write_stream

    made = write_stream(tmp_path / "s", stream(40), 10)
    frame = rows_in_context(made, [39, 0])
    assert frame["token"].tolist() == ["t", "t"]
    assert frame["before"].tolist() == frame["after"].tolist() == ["", ""]
    with pytest.raises(UserError, match="has rows 0 to 39"):
        row_frame(made, [40])


def test_no_rows_are_no_lines(store):
    assert len(row_frame(store, [])) == len(rows_in_context(store, [])) == 0


def test_lines_of_a_table_are_taken_in_the_order_asked_for(store):
    lines = np.array([100, 5, 5, 36, 37, store.n_rows - 1])
    taken = store.tables.take("rows.parquet", lines, ["text", "row"])
    assert taken.column_names == ["text", "row"]
    assert taken["row"].to_pylist() == lines.tolist()
    assert taken["text"].to_pylist() == store.rows()["text"].iloc[lines].tolist()
    with pytest.raises(UserError, match="has no column nothing"):
        store.tables.take("rows.parquet", lines, ["nothing"])
