"""Caches that SAELens' CacheActivationsRunner writes: a Hugging Face dataset with a context of activations in each row."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..sites import Site
from ..small_files import read_json
from .imports import LAYER, UNKNOWN, Source, source_hash

log = logging.getLogger("workbench")
CONFIG = "cache_activations_runner_cfg.json"  # what its upload to the hub puts beside the data
TOKENS = "token_ids"


@dataclass(frozen=True)
class SaeLens(Source):
    """A dataset on disk: a column [context, d] for each hook, and one of token ids where it has them."""

    data: Any = field(default=None, repr=False)
    columns: dict[Site, str] = field(default_factory=dict)
    tokenised: bool = False

    def read(self, start: int, stop: int) -> dict[Site, Tensor]:
        """Rows of contexts [start, stop), memory-mapped by datasets and copied."""
        table = self.data[start:stop]
        return {site: self._rows(table[column], site) for site, column in self.columns.items()}

    def token_ids(self, start: int, stop: int) -> list[int] | None:
        """The tokens of these contexts, one after the other."""
        if not self.tokenised:
            return None
        flat, shape = flattened(self.data[start:stop][TOKENS])
        if shape != (stop - start, self.per_prompt):
            raise UserError(f"{self.path}: contexts {start} to {stop - 1} have {TOKENS} of shape {shape}, the activations "
                            f"{self.per_prompt} rows each; the cache is damaged")  # fmt: skip
        return [int(token) for token in flat]

    def _rows(self, column: Any, site: Site) -> Tensor:
        flat, shape = flattened(column)
        if shape != (wanted := (len(column), self.per_prompt, self.widths[site])):
            raise UserError(f"{self.path}: {self.columns[site]} has rows of shape {shape[1:]}, its first of {wanted[1:]}; "
                            "the cache is damaged")  # fmt: skip
        values = np.array(flat, dtype=self.dtype)  # a copy: what is mapped cannot be written to
        return torch.from_numpy(values.reshape(-1, self.widths[site]))


def open_saelens(path: Path) -> SaeLens:
    """Checks a cache and reads what it says of itself; only its first context is read.

    A context is a window of text with its beginning-of-sequence token where there was one. The dataset alone says
    neither the model nor whether its weights had been folded; the runner's `cache_activations_runner_cfg.json`, where
    it lies in the folder, does. Raises UserError naming what is not as it should be.
    """
    data, config = _dataset(path), _config(path)
    columns: dict[Site, str] = {}
    for name in data.column_names:
        site = None if name == TOKENS else _site(name)
        if site is not None and site in columns:
            raise UserError(f"{path}: the columns {columns[site]} and {name} are both {site}; leave one of them out")
        if site is not None:
            columns[site] = name
    if not columns:
        raise UserError(f"{path}: none of its columns ({', '.join(data.column_names) or 'none'}) is named by a hook at a "
                        "site, such as blocks.3.hook_resid_post; a SAELens cache has one")  # fmt: skip
    table = data.with_format("arrow")
    widths, context, dtype = _shapes(path, table[0:1], columns)
    if len(columns) + (TOKENS in data.column_names) < len(data.column_names):
        log.warning("%s: columns that are at no site were left out", path)
    positions = _positions(config, context)
    files = sorted({Path(entry["filename"]) for entry in data.cache_files})
    return SaeLens(
        "saelens", path, widths, len(data), dtype, source_hash(files), per_prompt=context,
        model=str(config.get("model_name") or UNKNOWN),
        # SAELens loads both kinds without folding anything into the weights
        basis="raw" if config.get("model_class_name") in ("HookedTransformer", "AutoModelForCausalLM") else UNKNOWN,
        tokens="all+special" if positions == tuple(range(context)) else UNKNOWN, positions=positions,
        notes={"config": config} if config else {}, data=table, columns=columns, tokenised=TOKENS in data.column_names,
    )  # fmt: skip


def flattened(column: Any) -> tuple[Any, tuple[int, ...]]:
    """The values of a column of nested lists, and its shape; the shape ends in -1 where the lists differ in length.

    What the dataset declares is not believed: the lengths are those of the lists themselves.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    shape = [len(array)]
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        shape.append(lengths[0] if len(lengths) == 1 and lengths[0] is not None else -1)
        array = array.flatten()
    if array.null_count:
        shape[-1] = -1
    return array.to_numpy(zero_copy_only=False), tuple(shape)


def _dataset(path: Path) -> Any:
    import datasets

    if not path.is_dir():
        raise UserError(f"{path}: no such folder; a SAELens cache is a folder that `datasets.load_from_disk` opens")
    try:
        state = read_json(path / "state.json")
        files = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"{path}: has no readable state.json, so it is no dataset that SAELens saved; give the folder "
                        "that holds it") from err  # fmt: skip
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise UserError(f"{path}: its state.json names the file {outside[0]!r}, which is not in the folder; refused")
    try:
        return datasets.load_from_disk(str(path))
    except Exception as err:  # a damaged dataset fails in as many ways as there are libraries below
        reason = (str(err).splitlines() or [type(err).__name__])[0][:120]
        raise UserError(f"{path}: datasets cannot open it ({reason}); copy the cache again") from err


def _config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        return {}
    try:
        config = read_json(path / CONFIG)
    except (OSError, ValueError) as err:
        raise UserError(f"{path}: its {CONFIG} is damaged (not JSON); mend it or take it away") from err
    return config if isinstance(config, dict) else {}


def _site(name: str) -> Site | None:
    if match := LAYER.fullmatch(name):  # of AutoModelForCausalLM: what a block returns
        return Site(int(match[1]))
    try:
        return Site.parse(name) if not name.lstrip("-").isdigit() else None
    except UserError:
        return None


def _shapes(path: Path, first: Any, columns: dict[Site, str]) -> tuple[dict[Site, int], int, str]:
    """The width of each site, the rows of a context, and the dtype, from the first context."""
    widths, contexts, dtypes = {}, set(), set()
    for site, column in columns.items():
        if site.layer < 0:
            raise UserError(f"{path}: the column {column} names a negative layer; a cache names its layers from 0")
        flat, shape = flattened(first[column])
        if len(shape) != 3 or min(shape) < 1:
            raise UserError(f"{path}: the column {column} has rows of shape {list(shape[1:])}; a SAELens cache has "
                            "[context, width]")  # fmt: skip
        if str(flat.dtype) not in ("float32", "float16", "float64"):
            raise UserError(f"{path}: the column {column} is of dtype {flat.dtype}; allowed: float32, float16, float64")
        widths[site] = shape[2]
        contexts.add(shape[1])
        dtypes.add("float32" if flat.dtype == np.float64 else str(flat.dtype))
    if len(contexts) > 1 or len(dtypes) > 1:
        raise UserError(f"{path}: its columns have contexts of {sorted(contexts)} rows in {', '.join(sorted(dtypes))}; "
                        "all sites of a store have the same rows and dtype")  # fmt: skip
    return dict(sorted(widths.items())), contexts.pop(), dtypes.pop()


def _positions(config: dict[str, Any], context: int) -> tuple[int, ...] | None:
    """Where the rows of a context lie in it; None where the cache does not say."""
    size, cut = config.get("context_size"), config.get("seqpos_slice")
    if not isinstance(size, int) or not isinstance(cut, (list, type(None))):
        return None
    kept = tuple(range(size)[slice(*cut)]) if cut else tuple(range(size))
    return kept if len(kept) == context else None
