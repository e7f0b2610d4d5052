"""Several stores of one model made into one: by rows (other prompts) or by sites (the same rows)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..hashes import json_hash, json_list_hash
from ..sites import Site
from .checks import TABLES
from .staging import row_groups, write_store
from .store import Store

WAYS = ("auto", "rows", "sites")
UNKNOWN = "unknown"
SHOWN = 5  # entries in a message
_NONE = "none"


def merge_stores(
    stores: Sequence[Store | str | Path],
    out: str | Path,
    *,
    by: str = "auto",
    allow_duplicates: bool = False,
    overwrite: bool = False,
) -> Store:
    """One store of several, at `out`. Rows are streamed block by block; memory stays flat.

    by: `rows` appends the prompts of stores that have the same sites; `sites` joins the sites of stores that have the
        same prompts and rows; `auto` takes whichever of them fits.
    allow_duplicates: with `rows`, a prompt may occur in two of the stores. It does where its content is the same, or
        an id that its source gave it (any but its number).
    The result has the values that one profile of the joint prompts (or sites) gives; it has no plan, so that a damaged
    one is made again from its sources and not by `repair`.
    Raises UserError for fewer than two stores, for stores that differ in what must be the same (each is named), for
    duplicates, and where `out` exists (unless `overwrite`) or cannot be written; nothing half-made is left.
    """
    if by not in WAYS:
        raise UserError(f"cannot merge by {by!r}; allowed: {', '.join(WAYS)}")
    if len(stores) < 2:
        raise UserError("merge takes two stores or more; give their folders")
    opened = [store if isinstance(store, Store) else Store.open(store) for store in stores]
    by = _way(opened) if by == "auto" else by
    _check_same(opened, by)
    key = json_hash([by, [store.manifest["checksum"] for store in opened]])
    if by == "rows":
        manifest, tables, cuts = _row_manifest(opened, allow_duplicates), _row_tables(opened), None
    else:
        manifest, tables, cuts = _site_manifest(opened), _site_tables(opened), _shared_cuts(opened)
    manifest |= {"plan": None, "source": {"kind": "merge", "by": by, "stores": _origins(opened)}}
    blocks = _row_blocks(opened) if cuts is None else _site_blocks(opened, cuts)
    count = sum(len(store.shards) for store in opened) if cuts is None else len(cuts) - 1
    return write_store(out, key, manifest, blocks, tables, count=count, overwrite=overwrite, doing="merging")


def _way(stores: list[Store]) -> str:
    first = stores[0]
    if all(store.sites == first.sites for store in stores[1:]):
        return "rows"
    if all(store.prompt_hash == first.prompt_hash for store in stores[1:]):
        return "sites"
    raise UserError(f"stores {', '.join(str(s.path) for s in stores)} have neither the same sites (to be merged by "
                    "rows) nor the same prompts (to be merged by sites); merge stores that share one of them")  # fmt: skip


def _alike(store: Store, by: str) -> dict[str, Any]:
    """What two stores must share to be merged, by the name it has in a message."""
    manifest = store.manifest
    options = dict(manifest.get("options") or {})
    options.pop("batch_tokens", None)  # changes a result by float noise only
    found = {
        "model": [manifest["model"]["name"], manifest["model"]["n_layers"]],
        "fingerprint": manifest["model"]["fingerprint"],
        "basis": manifest["basis"],
        "template": (manifest.get("template") or {}).get("sha256"),
        "dtype": store.dtype,
        "tokens": store.tokens,
        "options": options,
    }
    if by == "rows":
        return {**found, "sites": manifest["sites"]}
    return {**found, "prompts": [store.prompt_hash, store.rendered_hash], "rows": store.n_rows}


def _check_same(stores: list[Store], by: str) -> None:
    first = _alike(stores[0], by)
    for store in stores[1:]:
        other = _alike(store, by)
        differ = [_difference(name, first[name], other[name]) for name in first if first[name] != other[name]]
        if differ:
            raise UserError(f"stores {stores[0].path} and {store.path} cannot be merged by {by}: they differ in "
                            f"{'; '.join(differ)}")  # fmt: skip
    if by == "sites":
        seen: dict[Site, Store] = {}
        for store in stores:
            for site in store.sites:
                if site in seen:
                    raise UserError(f"stores {seen[site].path} and {store.path} cannot be merged by sites: both have "
                                    f"{site}; give stores of other sites, or of other prompts to merge by rows")  # fmt: skip
                seen[site] = store
        _check_rows(stores)


def _difference(name: str, a: Any, b: Any) -> str:
    """What differs; of two dicts only the entries that do.

    >>> _difference("options", {"stride": 1, "max_length": 9}, {"stride": 2, "max_length": 9})
    'options: stride (1 and 2)'
    """
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return f"{name} ({_short(a)} and {_short(b)})"
    keys = [key for key in {**a, **b} if a.get(key, _NONE) != b.get(key, _NONE)]
    shown = [f"{key} ({_short(a.get(key, _NONE))} and {_short(b.get(key, _NONE))})" for key in keys[:SHOWN]]
    return f"{name}: {', '.join(shown)}{f' and {len(keys) - SHOWN} more' if len(keys) > SHOWN else ''}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_rows(stores: list[Store]) -> None:
    """Row i must be the same token of the same prompt in each; read in batches."""
    columns = ["prompt", "position", "token_id"]
    for store in stores[1:]:
        for a, b in zip(row_groups(stores[0], TABLES[0], columns), row_groups(store, TABLES[0], columns), strict=True):
            if not a.equals(b):
                raise UserError(f"stores {stores[0].path} and {store.path} cannot be merged by sites: their rows are "
                                "other tokens; profile them with the same tokenizer and options")  # fmt: skip


# -- by rows ----------------------------------------------------------------------------------------------------------


def _row_manifest(stores: list[Store], allow_duplicates: bool) -> dict[str, Any]:
    manifests = [store.manifest for store in stores]
    prompts = {key: [m["prompts"].get(key) for m in manifests] for key in manifests[0]["prompts"]}
    if not allow_duplicates:
        _check_duplicates(stores)
    for store in stores:
        if not _unknown(store):
            store.tables.check_prompts()
    name = "+".join(prompts["name"])
    if any(map(_unknown, stores)):
        prompt_hash = f"{UNKNOWN}:{json_hash(prompts['hash'])}"
    else:
        prompt_hash = json_list_hash(prompt.content for store in stores for prompt in store.tables.prompts())
    texts = (batch["text"].to_pylist() for store in stores for batch in row_groups(store, TABLES[1], ["text"]))
    unknown_text = any(str(value).startswith(UNKNOWN) for value in prompts["rendered_hash"])
    return {
        **_kept(stores[0]),
        "n_rows": sum(store.n_rows for store in stores),
        "sites": manifests[0]["sites"],
        "prompts": {
            **manifests[0]["prompts"], "name": name, "count": sum(prompts["count"]), "hash": prompt_hash,
            "rendered_hash": f"{UNKNOWN}:{json_hash(prompts['rendered_hash'])}" if unknown_text 
            else json_list_hash(chain.from_iterable(texts)),
            "truncated": sum(value or 0 for value in prompts.get("truncated", [0])),
        },
    }  # fmt: skip


def _unknown(store: Store) -> bool:
    return store.prompt_hash.startswith(UNKNOWN)


def _check_duplicates(stores: list[Store]) -> None:
    seen: dict[str, Store] = {}
    for store in stores:
        if _unknown(store):
            raise UserError(f"store {store.path}: its prompts are unknown, so nobody can tell whether they repeat those "
                            "of another; pass allow_duplicates=True (--allow-duplicates) to merge it")  # fmt: skip
        mine: dict[str, str] = {}
        for i, prompt in enumerate(store.tables.prompts()):
            named = {f"content:{json_hash(prompt.content)}": f"prompt {prompt.id!r}"}
            if prompt.id != str(i):  # a number is the place in its source, and no name
                named[f"id:{prompt.id}"] = f"the id {prompt.id!r}"
            for key, what in named.items():
                if key in seen:
                    raise UserError(f"stores {seen[key].path} and {store.path} both have {what}; leave one of them out, "
                                    "or pass allow_duplicates=True (--allow-duplicates)")  # fmt: skip
                mine[key] = what
        seen |= dict.fromkeys(mine, store)


def _row_blocks(stores: list[Store]) -> Iterator[dict[Site, Tensor]]:
    """The blocks of each store as they are: they hold whole prompts, and their sizes were chosen to fit memory."""
    for store in stores:
        ends = list(accumulate(shard["rows"] for shard in store.shards))
        for start, stop in zip([0, *ends], ends, strict=False):
            yield {site: store.read(site, slice(start, stop)) for site in store.sites}


def _row_tables(stores: list[Store]) -> tuple[Iterator[Any], Iterator[Any]]:
    rows = [0, *accumulate(store.n_rows for store in stores)]
    prompts = [0, *accumulate(store.manifest["prompts"]["count"] for store in stores)]

    def shifted(table: str, offsets: dict[str, list[int]]) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.compute as pc

        schema = None
        for i, store in enumerate(stores):
            for group in row_groups(store, table):
                for column, by in offsets.items():
                    at = group.schema.get_field_index(column)
                    group = group.set_column(at, group.schema.field(at), pc.add(group[column], pa.scalar(by[i])))
                schema = schema or group.schema
                yield group.select(schema.names).cast(schema)

    return shifted(TABLES[0], {"row": rows, "prompt": prompts}), shifted(TABLES[1], {"index": prompts})


# -- by sites ---------------------------------------------------------------------------------------------------------


def _site_manifest(stores: list[Store]) -> dict[str, Any]:
    first = stores[0].manifest
    sites = {site: entry for store in stores for site, entry in store.manifest["sites"].items()}
    return {**_kept(stores[0]), "n_rows": first["n_rows"], "sites": sites, "prompts": first["prompts"]}


def _shared_cuts(stores: list[Store]) -> list[int]:
    """Rows at which any of the stores has a new shard: what lies between two of them is one piece of each."""
    return sorted({0, *(end for store in stores for end in accumulate(shard["rows"] for shard in store.shards))})


def _site_blocks(stores: list[Store], cuts: list[int]) -> Iterator[dict[Site, Tensor]]:
    for start, stop in pairwise(cuts):
        yield {site: store.read(site, slice(start, stop)) for store in stores for site in store.sites}


def _site_tables(stores: list[Store]) -> tuple[Iterator[Any], Iterator[Any]]:
    return row_groups(stores[0], TABLES[0]), row_groups(stores[0], TABLES[1])


# -- both -------------------------------------------------------------------------------------------------------------


def _kept(store: Store) -> dict[str, Any]:
    """What the result has of its first source; every other has the same."""
    left = ("shards", "tables", "checksum", "n_rows", "sites", "prompts", "plan", "source")
    return {key: value for key, value in store.manifest.items() if key not in left}


def _origins(stores: list[Store]) -> list[dict[str, Any]]:
    return [{"name": s.path.name, "checksum": s.manifest["checksum"], "rows": s.n_rows,
             "sites": [str(site) for site in s.sites], "plan": s.manifest.get("plan")} for s in stores]  # fmt: skip
