"""Stores in formats that others read: a Hugging Face dataset, numpy files, parquet. Streamed, staged and renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import staged_folder
from ..errors import UserError
from ..progress import progress
from ..sites import Site
from .checks import TABLES
from .locks import held
from .store import Store

BATCH_BYTES = 32 << 20  # of rows in memory at a time, all sites together
FILE_BYTES = 512 << 20  # of an arrow file of a dataset
PROVENANCE = "export.json"
COLUMNS = ("prompt", "position", "token_id", "text")


def export_store(
    store: Store | str | Path,
    out: str | Path,
    *,
    to: str,
    sites: Sequence[Site | str | int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a store's rows to the folder `out` in a format that others read; memory stays flat.

    to: `dataset`, a folder that `datasets.load_from_disk` opens, with the columns prompt, position, token_id, text,
        label (where the prompts have labels) and one of fixed-size lists for each site; `numpy`, one `SITE.npy`
        [n, d] for each site beside rows.parquet and prompts.parquet; `parquet`, those columns in activations.parquet
        beside prompts.parquet.
    sites: which of the store's; all unless given.
    bfloat16, which neither numpy nor arrow knows, becomes float32 (the same numbers in twice the bytes).
    The store's manifest goes along as export.json, and in parquet's and arrow's schema under `workbench.store`.
    Returns `out`. Raises UserError for an unknown format or site, and where `out` exists (unless `overwrite`) or cannot
    be written; then nothing half-made is left.
    """
    writers: dict[str, Callable[[Store, list[Site], Path], None]] = {
        "dataset": _to_dataset, "numpy": _to_numpy, "parquet": _to_parquet,
    }  # fmt: skip
    if to not in writers:
        raise UserError(f"cannot export to {to!r}; allowed: {', '.join(writers)}")
    store = store if isinstance(store, Store) else Store.open(store)
    out = Path(out).expanduser()
    n_layers = store.manifest["model"]["n_layers"]
    chosen = store.sites if sites is None else [Site.parse(site, n_layers) for site in sites]
    for site in chosen:
        store.width(site)  # says which there are where it has none
    if len(set(chosen)) < len(chosen) or not chosen:
        raise UserError(f"sites {', '.join(map(str, chosen)) or '(none)'}: give each site to export once")
    with staged_folder(out, marker=PROVENANCE, overwrite=overwrite) as folder, held(folder):
        writers[to](store, chosen, folder)
        _write_json(folder / PROVENANCE, {**provenance(store, chosen), "to": to})
        (folder / "README.md").write_text(_readme(store, chosen, to), encoding="utf-8")
    return out


def provenance(store: Store, sites: Sequence[Site]) -> dict[str, Any]:
    """Where exported rows come from: the manifest without its lists of files, and the dtype that was written."""
    left = ("shards", "tables", "sites", "format")
    kept = {key: value for key, value in store.manifest.items() if key not in left}
    widths = {str(site): {"width": store.width(site)} for site in sites}
    return {"format": "workbench.export", "version": 1, "exported_dtype": _numpy_dtype(store).name, "sites": widths,
            "store": kept}  # fmt: skip


def _numpy_dtype(store: Store) -> Any:
    return np.dtype("float16" if store.dtype == "float16" else "float32")


def _values(store: Store, site: Site, start: int, stop: int) -> np.ndarray:
    rows = store.read(site, slice(start, stop))
    return rows.numpy() if store.dtype in ("float32", "float16") else rows.float().numpy()


def _batch_rows(store: Store, sites: Sequence[Site]) -> int:
    """How many rows are read together."""
    return max(1, BATCH_BYTES // sum(4 * store.width(site) for site in sites))


# -- numpy ------------------------------------------------------------------------------------------------------------


def _to_numpy(store: Store, sites: list[Site], folder: Path) -> None:
    """Appended to a plain file behind its header: on a full disk a memory map would kill the process."""
    size = _batch_rows(store, sites[:1])
    for site in progress(sites, desc=f"exporting {store.path.name}", unit="site"):
        with open(folder / f"{site}.npy", "wb") as stream:
            header = {"descr": np.lib.format.dtype_to_descr(_numpy_dtype(store)), "fortran_order": False,
                      "shape": (store.n_rows, store.width(site))}  # fmt: skip
            np.lib.format.write_array_header_1_0(stream, header)
            for start in range(0, store.n_rows, size):
                stream.write(np.ascontiguousarray(_values(store, site, start, start + size)).data)
    for name in TABLES:
        shutil.copyfile(store.path / name, folder / name)


# -- arrow ------------------------------------------------------------------------------------------------------------


def _schema(store: Store, sites: list[Site], labelled: bool) -> Any:
    import pyarrow as pa

    value = pa.from_numpy_dtype(_numpy_dtype(store))
    fields = [("prompt", pa.int64()), ("position", pa.int32()), ("token_id", pa.int32()), ("text", pa.string())]
    fields += [("label", pa.string())] if labelled else []
    return pa.schema(fields + [(str(site), pa.list_(value, store.width(site))) for site in sites])


def _labels(store: Store) -> Any:
    """The label of each prompt; None where no prompt has one."""
    labels = store.tables.read(TABLES[1], ["label"])["label"].combine_chunks()
    return None if labels.null_count == len(labels) else labels


def _tables(store: Store, sites: list[Site]) -> Iterator[Any]:
    """The rows as pyarrow tables, a batch at a time."""
    import pyarrow as pa

    labels = _labels(store)
    schema = _schema(store, sites, labels is not None)
    start = 0
    with progress(total=store.n_rows, desc=f"exporting {store.path.name}", unit="row") as bar:
        for batch in store.tables.batches(TABLES[0], COLUMNS, _batch_rows(store, sites)):
            columns = [batch.column(name).combine_chunks() for name in COLUMNS]
            if labels is not None:
                columns.append(labels.take(batch.column("prompt")))
            for site in sites:
                flat = pa.array(np.ascontiguousarray(_values(store, site, start, start + len(batch))).reshape(-1))
                columns.append(pa.FixedSizeListArray.from_arrays(flat, store.width(site)))
            yield pa.table([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
            start += len(batch)
            bar.update(len(batch))


def _to_parquet(store: Store, sites: list[Site], folder: Path) -> None:
    import pyarrow.parquet as pq

    note = {b"workbench.store": json.dumps(provenance(store, sites), sort_keys=True).encode()}
    schema = _schema(store, sites, _labels(store) is not None).with_metadata(note)
    plain = ["text", "label"]  # floats neither repeat nor compress
    with pq.ParquetWriter(folder / "activations.parquet", schema, use_dictionary=plain, compression="none") as writer:
        for table in _tables(store, sites):
            writer.write_table(table.replace_schema_metadata(note))
    shutil.copyfile(store.path / TABLES[1], folder / TABLES[1])


def _to_dataset(store: Store, sites: list[Site], folder: Path) -> None:
    """The layout of `Dataset.save_to_disk`, written directly: `from_generator` would write all of it twice."""
    import datasets
    import pyarrow as pa

    note = json.dumps(provenance(store, sites), sort_keys=True)
    features = datasets.Features.from_arrow_schema(_schema(store, sites, _labels(store) is not None))
    schema = features.arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), b"workbench.store": note.encode()})
    files: list[Path] = []
    sink: Any = None
    writer: Any = None
    try:
        for table in _tables(store, sites):
            if writer is None or sink.tell() > FILE_BYTES:
                _close(writer, sink)
                files.append(folder / f"part-{len(files):05d}.arrow")
                sink = pa.OSFile(str(files[-1]), "wb")
                writer = pa.ipc.new_stream(sink, schema)
            writer.write_table(table.cast(schema))
    finally:
        _close(writer, sink)
    names = [f"data-{i:05d}-of-{len(files):05d}.arrow" for i in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    about = f"Activations of {store.name}, exported by the workbench; see {PROVENANCE}."
    datasets.DatasetInfo(description=about, features=features).write_to_directory(str(folder))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": store.manifest["checksum"][:16],
             "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
             "_split": None}  # fmt: skip
    _write_json(folder / "state.json", state)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _close(writer: Any, sink: Any) -> None:
    if writer is not None:
        writer.close()
        sink.close()


def _readme(store: Store, sites: list[Site], to: str) -> str:
    how = {
        "dataset": "import datasets\ndata = datasets.load_from_disk('.').with_format('numpy')",
        "numpy": f"import numpy as np\nx = np.load('{sites[0]}.npy', mmap_mode='r')",
        "parquet": "import pyarrow.parquet as pq\ntable = pq.read_table('activations.parquet')",
    }
    dtype = _numpy_dtype(store).name
    note = "" if dtype == store.dtype else f" (stored as {store.dtype}; the numbers are the same)"
    return (
        f"# Activations of {store.name}\n\n{store.n_rows} rows of the prompts {store.manifest['prompts']['name']!r}, "
        f"tokens `{store.tokens}`, {dtype}{note}.\nSites: {', '.join(f'`{s}`' for s in sites)}.\n"
        f"`{PROVENANCE}` says where they come from.\n\n```python\n{how[to]}\n```\n"
    )
