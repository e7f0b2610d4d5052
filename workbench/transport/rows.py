"""Where a transport's rows come from: a store, or a model that runs the prompts and keeps nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from ..profile.plan import Block, Plan, make_plan
from ..profile.run import BlockRunner
from ..profile.told import lengths_of
from ..progress import progress
from ..rendering import special_ids
from ..sites import Site
from ..tokens import WITH_SPECIAL, Policy
from ..work import Lengths
from .positions import ATTENTION, Index, is_first
from .replica_rows import spread_rows
from .routing import Route, RoutedRunner, Span

if TYPE_CHECKING:
    from ..engines import Engine
    from ..models import Model
    from ..store import Store

STORE_ROWS = 8192  # read at once, whole prompts


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of whole prompts at some sites, with where each comes from."""

    blocks: dict[Site, Tensor]
    prompt: Index
    position: Index
    routes: Mapping[Span, Route] = field(default_factory=dict)
    """where attention takes the source of each row from, for the spans of layers that were asked for"""


class StoreRows:
    """The rows of a store, on a device."""

    def __init__(self, store: Store, device: torch.device | str | None = None) -> None:
        self.store, self.device = store, torch.device(device or "cpu")
        self.n_prompts = int(store.manifest["prompts"]["count"])

    @property
    def every_site(self) -> list[Site]:
        return [s for s in self.store.sites if s.point == "resid_post"] or self.store.sites

    @cached_property
    def _position(self) -> Index:
        return np.asarray(self.store.rows(["position"])["position"].to_numpy(), dtype=np.int64)

    @property
    def has_first(self) -> bool:
        return bool(is_first(self._position).any())

    @property
    def about(self) -> dict[str, Any]:
        m = self.store.manifest
        prompts = {key: m["prompts"].get(key) for key in ("name", "count", "hash")}
        return {"model": m["model"]["name"], "fingerprint": m["model"].get("fingerprint"), "prompts": prompts,
                "tokens": self.store.tokens, "dtype": self.store.dtype}  # fmt: skip

    def site(self, site: Site | str | int) -> Site:
        parsed = Site.parse(site, self.store.manifest["model"]["n_layers"])
        self.store.width(parsed)  # says which sites there are where this one is not
        return parsed

    def width(self, site: Site) -> int:
        return self.store.width(site)

    def read(self, sites: Sequence[Site], spans: Sequence[Span] = ()) -> Iterator[Rows]:
        assert not spans, "a store has no attention weights"
        prompt = self.store.prompt_index.numpy().astype(np.int64)
        ends = np.flatnonzero(np.diff(prompt, append=-1)) + 1  # where a prompt's rows end
        start = 0
        with progress(total=self.store.n_rows, desc="reading the store", unit="row", scale=True) as bar:
            while start < len(prompt):
                later = ends[ends > start]
                fits = later[later <= start + STORE_ROWS]
                stop = int(fits[-1] if len(fits) else later[0])
                part = slice(start, stop)
                blocks = {s: self.store.read(s, part, dtype=torch.float32, device=self.device) for s in sites}
                yield Rows(blocks, prompt[part], self._position[part])
                bar.update(stop - start)
                start = stop


class ModelRows:
    """The rows of prompts as a model makes them; nothing is stored."""

    def __init__(
        self, model: Model, prompts: Any, *, tokens: Policy = "all", batch_tokens: int = 8192,
        max_length: int | None = None, engine: Engine | None = None,
    ) -> None:  # fmt: skip
        from ..prompts import PromptSet

        engine = engine or model.engine
        self.engine = None if engine is None or engine.name == "local" else engine  # None: the model at hand
        self.model, self.prompts, self.tokens = model, PromptSet.load(prompts), tokens
        self.n_prompts, self.device = len(self.prompts), model.device
        # `all` passes over special tokens, BOS among them; it is asked for here and told apart afterwards
        self._policy = "all" + WITH_SPECIAL if tokens == "all" else tokens
        self._options: dict[str, Any] = {"batch_tokens": batch_tokens, "max_length": max_length, "dtype": "float32"}
        self._special = np.array(sorted(special_ids(model.tokenizer)), dtype=np.int64)

    @property
    def every_site(self) -> list[Site]:
        return [Site(layer) for layer in range(self.model.n_layers)]

    @cached_property
    def _looked_at(self) -> tuple[bool, dict[str, Any], tuple[Lengths, int]]:
        """What is asked about the prompts before they are run, of one encoding of them, which is not kept."""
        plan = self._plan(self.every_site[:1])
        first = bool(is_first(plan.spool.rows(0, plan.n_rows)[1]).any())
        return first, plan.manifest, (lengths_of(plan), plan.n_rows)

    @property
    def has_first(self) -> bool:
        return self._looked_at[0]

    @cached_property
    def about(self) -> dict[str, Any]:
        manifest = self._looked_at[1]
        prompts = {key: manifest["prompts"][key] for key in ("name", "count", "hash")}
        tokens = manifest["tokens"] if self.tokens != "all" else "all"
        return {"model": manifest["model"]["name"], "fingerprint": manifest["model"]["fingerprint"], "prompts": prompts,
                "tokens": tokens, "dtype": str(self.model.dtype).removeprefix("torch.")}  # fmt: skip

    @property
    def counted(self) -> tuple[Lengths, int]:
        """The texts of one pass, and its rows."""
        return self._looked_at[2]

    def site(self, site: Site | str | int) -> Site:
        return self.model.site(site)

    def width(self, site: Site) -> int:
        return self.model.width_of(site)

    def read(self, sites: Sequence[Site], spans: Sequence[Span] = ()) -> Iterator[Rows]:
        """Rows as the model makes them; with `spans` it runs with eager attention, and each row has its routes."""
        plan = self._plan(sites)
        with progress(total=plan.n_tokens, desc="running the prompts", unit="tok", scale=True) as bar:
            made = spread_rows(self.model, plan, self.engine, bar) if self.engine else self._here(plan, spans, bar)
            for block, rows, routes in made:
                prompt, position, _, _ = plan.spool.rows(block.start, block.n)
                keep = self._kept(plan, block)
                index = torch.from_numpy(np.flatnonzero(keep))
                # on the device of the sums: a model that is spread has its sites on several
                blocks = {site: h.index_select(0, index.to(h.device)).to(self.device) for site, h in rows.items()}
                yield Rows(blocks, prompt[keep].astype(np.int64), position[keep].astype(np.int64),
                           {span: route.kept(keep) for span, route in routes.items()})  # fmt: skip

    def _here(
        self, plan: Plan, spans: Sequence[Span], bar: Any
    ) -> Iterator[tuple[Block, dict[Site, Tensor], Mapping[Span, Route]]]:
        """The rows of each block, and their routes where there are spans, from the model at hand."""
        if not spans:
            runner = BlockRunner(self.model, plan, bar)
            yield from ((block, runner.run(block), {}) for block in plan.blocks)
            return
        routed = RoutedRunner(self.model, plan, spans, bar)
        yield from ((block, *routed.run_routed(block, self._kept(plan, block))) for block in plan.blocks)

    def _kept(self, plan: Plan, block: Block) -> NDArray[np.bool_]:
        """Which rows of a block take part."""
        _, position, token, _ = plan.spool.rows(block.start, block.n)
        if self._policy == self.tokens:
            return np.ones(block.n, dtype=np.bool_)
        return ~np.isin(token, self._special) | is_first(position)

    def _plan(self, sites: Sequence[Site]) -> Plan:
        return make_plan(self.model, self.prompts, sites=list(sites), tokens=self._policy, **self._options)


RowSource = StoreRows | ModelRows
"""What `transport_grid` reads: more than once where the moments do not fit into memory at once."""


def row_source(
    source: Store | Model | RowSource, prompts: Any, *, positions: str = "same",
    device: torch.device | str | None = None, engine: Engine | None = None, **options: Any,
) -> RowSource:  # fmt: skip
    """A store, or a model with its prompts, as rows; UserError where the prompts or positions do not belong there."""
    from ..models import Model
    from ..store import Store

    if positions == ATTENTION and isinstance(source, Store | StoreRows):
        raise UserError("positions='attention' needs the attention weights of a model that runs, and a store has none: "
                        "give the model and its prompts")  # fmt: skip
    if engine is not None and not isinstance(source, Model):
        raise UserError("an engine runs a model, and rows of a store are read here; leave the engine out, or give the model "
                        "and its prompts")  # fmt: skip
    if isinstance(source, Store):
        if prompts is not None:
            raise UserError("a store has its prompts already; give prompts only with a model")
        return StoreRows(source, device)
    if isinstance(source, Model):
        if prompts is None:
            raise UserError("a model needs prompts to run; give a PromptSet or what it reads")
        made = ModelRows(source, prompts, engine=engine, **options)
        if made.engine is not None and positions == ATTENTION:
            raise UserError(f"positions={ATTENTION!r} needs the attention maps of the model at hand, which no engine spreads; "
                            "leave the engine out (--engine local), or choose other positions")  # fmt: skip
        return made
    return source
