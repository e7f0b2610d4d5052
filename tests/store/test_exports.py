"""What is exported is what the store holds, in formats that their own libraries open."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.errors import UserError
from workbench.prompts import PromptSet
from workbench.sites import Site
from workbench.store import Store
from workbench.store import exports as store_exports
from workbench.store.exports import export_store
from workbench.store.staging import write_store

PER_PROMPT = 3
WIDTHS = {Site(0): 5, Site(2): 5, Site(1, "mlp_act"): 8}


def make(path: Path, n_prompts: int = 6, dtype: str = "float32", labels: bool = True, block: int = 2) -> Store:
    """A store of random values, with blocks of a few prompts."""
    import pyarrow as pa

    rows_of = [{"prompt": f"w{i}", "label": "ab"[i % 2]} if labels else f"w{i}" for i in range(n_prompts)]
    prompts = PromptSet.load(rows_of)
    n = n_prompts * PER_PROMPT
    noise = torch.Generator().manual_seed(n)
    values = {site: torch.randn(n, width, generator=noise).to(getattr(torch, dtype)) for site, width in WIDTHS.items()}
    rows = pa.table({
        "row": pa.array(range(n), pa.int64()), "prompt": pa.array([i // PER_PROMPT for i in range(n)], pa.int64()),
        "position": pa.array([i % PER_PROMPT for i in range(n)], pa.int32()),
        "token_id": pa.array([7 * i % 50 for i in range(n)], pa.int32()), "text": [f"t{i}" for i in range(n)],
    })  # fmt: skip
    lines = [{"index": i, "id": p.id, "text": p.user, "label": p.label, "meta": "{}", "content": json.dumps(p.content)}
             for i, p in enumerate(prompts)]  # fmt: skip
    schema = pa.schema([("index", pa.int64()), *((k, pa.string()) for k in ("id", "text", "label", "meta", "content"))])
    manifest = {
        "format": "workbench.store", "schema": 2, "basis": "raw", "dtype": dtype, "tokens": "all", "n_rows": n,
        "model": {"name": "m", "family": "f", "n_layers": 3, "width": 5, "fingerprint": {"tokenizer": "t"}},
        "prompts": {"name": "p", "count": n_prompts, "hash": prompts.hash, "rendered_hash": "r"},
        "sites": {str(site): {"width": width} for site, width in WIDTHS.items()},
    }  # fmt: skip
    step = block * PER_PROMPT
    blocks = ({site: x[i : i + step] for site, x in values.items()} for i in range(0, n, step))
    return write_store(
        path, "k", manifest, blocks, (iter([rows]), iter([pa.Table.from_pylist(lines, schema)])), count=0
    )


def exported(folder: Path, to: str, site: Site) -> np.ndarray:
    if to == "numpy":
        return np.load(folder / f"{site}.npy", mmap_mode="r")
    if to == "parquet":
        return np.stack(pq.read_table(folder / "activations.parquet")[str(site)].to_numpy())
    column = datasets.load_from_disk(str(folder)).with_format("arrow")[:][str(site)].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)  # the numpy format would widen float16


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("to", ["dataset", "numpy", "parquet"])
def test_the_values_are_those_of_the_store(tmp_path, to, dtype):
    store = make(tmp_path / "s", dtype=dtype)
    assert export_store(store, tmp_path / "e", to=to) == tmp_path / "e"
    for site in store.sites:
        found = exported(tmp_path / "e", to, site)
        assert found.dtype == ("float16" if dtype == "float16" else "float32")
        assert np.array_equal(found, store.read(site, dtype=torch.float32 if dtype == "bfloat16" else None).numpy())
    note = json.loads((tmp_path / "e" / "export.json").read_text())
    assert note["store"]["model"]["fingerprint"] == {"tokenizer": "t"}
    assert note["store"]["checksum"] == store.manifest["checksum"]
    assert dtype in (tmp_path / "e" / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(to=st.sampled_from(["dataset", "numpy", "parquet"]), n=st.integers(1, 9), rows=st.integers(1, 30),
       block=st.integers(1, 4))  # fmt: skip
def test_batches_and_files_of_any_size_change_nothing(tmp_path, monkeypatch, to, n, rows, block):
    with monkeypatch.context() as patch:
        patch.setattr(store_exports, "BATCH_BYTES", rows * 4 * sum(WIDTHS.values()))
        patch.setattr(store_exports, "FILE_BYTES", 600)
        folder = tmp_path / f"{to}{n}-{rows}-{block}"
        if folder.exists():
            return
        store = make(folder / "s", n, block=block)
        export_store(store, folder / "e", to=to)
        for site in store.sites:
            assert np.array_equal(exported(folder / "e", to, site), store.read(site).numpy())


def test_a_dataset_says_which_token_each_row_is(tmp_path):
    store = make(tmp_path / "s")
    data = datasets.load_from_disk(str(export_store(store, tmp_path / "e", to="dataset", sites=["resid_post.2", 0])))
    assert data.column_names == ["prompt", "position", "token_id", "text", "label", "resid_post.2", "resid_post.0"]
    rows = store.rows()
    for column in ("prompt", "position", "token_id", "text"):
        assert list(data[column]) == rows[column].tolist()
    assert list(data["label"]) == ["ab"[p % 2] for p in rows["prompt"]]
    assert data.features["resid_post.0"].length == 5
    assert len(data.filter(lambda row: row["label"] == "a")) == 9
    plain = export_store(make(tmp_path / "t", labels=False), tmp_path / "f", to="dataset")
    assert "label" not in datasets.load_from_disk(str(plain)).column_names


def test_parquet_carries_its_provenance_and_numpy_the_tables(tmp_path):
    store = make(tmp_path / "s")
    export_store(store, tmp_path / "p", to="parquet")
    schema = pq.read_schema(tmp_path / "p" / "activations.parquet")
    note = json.loads(schema.metadata[b"workbench.store"])
    assert note["store"]["prompts"]["hash"] == store.prompt_hash
    assert schema.field("mlp_act.1").type.list_size == 8
    assert pq.read_table(tmp_path / "p" / "prompts.parquet").num_rows == 6
    export_store(store, tmp_path / "n", to="numpy", sites=[Site(1, "mlp_act")])
    files = {"mlp_act.1.npy", "rows.parquet", "prompts.parquet", "export.json", "README.md"}
    assert {f.name for f in (tmp_path / "n").iterdir()} == files
    assert pq.read_table(tmp_path / "n" / "rows.parquet").num_rows == store.n_rows


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "csv"}, "cannot export to 'csv'; allowed: dataset, numpy, parquet"),
        ({"to": "numpy", "sites": [1]}, r"has no resid_post\.1; it has mlp_act\.1, resid_post\.0, resid_post\.2"),
        ({"to": "numpy", "sites": [0, "resid_post.0"]}, "give each site to export once"),
        ({"to": "numpy", "sites": []}, "give each site to export once"),
        ({"to": "numpy", "sites": ["x"]}, "cannot read 'x' as a site"),
    ],
)
def test_bad_input_is_refused(tmp_path, options, said):
    store = make(tmp_path / "s")
    with pytest.raises(UserError, match=said):
        export_store(store, tmp_path / "e", **options)
    assert {f.name for f in tmp_path.iterdir()} == {"s"}


def test_only_an_export_is_overwritten(tmp_path):
    store = make(tmp_path / "s")
    export_store(store, tmp_path / "e", to="numpy")
    with pytest.raises(UserError, match="exists already"):
        export_store(store, tmp_path / "e", to="parquet")
    export_store(store, tmp_path / "e", to="parquet", overwrite=True)
    assert (tmp_path / "e" / "activations.parquet").exists()
    with pytest.raises(UserError, match=r"holds no export\.json"):
        export_store(store, tmp_path / "s", to="parquet", overwrite=True)
    Store.open(tmp_path / "s").verify()


@pytest.mark.parametrize("to", ["dataset", "numpy", "parquet"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, to):
    store = make(tmp_path / "s")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; nothing was changed there; make room"):
            export_store(store, tmp_path / "e", to=to)
    assert {f.name for f in tmp_path.iterdir()} == {"s"}
