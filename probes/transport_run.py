"""A run folder of the transport of one model: the grid, and what its operators carry, predict and are worth."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.atomic import make_parent, write_json, write_text
from workbench.errors import UserError
from workbench.maps.moments import Moments, total
from workbench.runs import Run, environment, failures_told
from workbench.sites import Site
from workbench.transport.grid import TransportGrid, transport_grid
from workbench.transport.map_files import MapFolder
from workbench.transport.pairs import SitePair
from workbench.transport.rows import ModelRows, row_source
from workbench.transport.sums import Split, free_bytes
from workbench.work.work import duration

from .efficiency import transport_efficiency
from .features import Batch, store_batches
from .transport_choice import Jumps, PairChoice, grid_flops, planned_passes
from .transport_job import TransportJob, check_job, foreign, hash_of_tensors

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models import Model
    from workbench.prompts import PromptSet
    from workbench.store import Store

log = logging.getLogger("workbench")
MARKER, FORMAT = "transport.toml", "workbench.transport"
SEQUENCES = 128  # prompts of the causal figures
BUNDLED_TEXT = "bundled:evaluation_text"  # held-out text of the kind that the bundled models were trained to predict
FITTED = ".maps.partial"  # where maps lie until their grid is whole
LATER = ("dictionaries", "text", "causal", "keep_maps")
"""of a job: what the grid does not depend on"""
FEATURE_PROMPTS = 512  # held-out prompts of the features' figures
TOKENS_OF_NAME = 8  # those that a feature fires on hardest


def run_transport(model: Model, prompts: PromptSet, out: str | Path, job: TransportJob) -> Run:
    """Runs a job to its end and returns its run folder: transport.toml, grid/, *.parquet, metrics.json, report.html.

    Run again with the same arguments it keeps the steps that are done. Where a figure cannot be had (too few rows for
    it, no dictionary), a warning says so and the others are made. Raises UserError for a folder that holds something
    else, and what `transport_grid` raises.
    """
    from .transport_report import write_transport_report

    run = Run(out)
    if not run.fresh and not _is_run(run.folder):
        raise UserError(f"{run.folder} is not a transport run: it holds no {MARKER}; choose another folder")
    check_job(prompts, job)  # what is wrong is told before the work
    choice = PairChoice.of(model, job)
    make_parent(run.folder / MARKER)
    text = tomli_w.dumps({key: value for key, value in asdict(job).items() if value not in ((), "")})
    with run.alone(), run.logging(), failures_told("", run.folder):
        if not _is_run(run.folder):
            write_text(run.folder / MARKER, text)
        steps = _Steps(run, model, prompts, job, choice)
        grid = steps.grid_made()
        # only now, so that input that cannot be fitted costs nobody the results that were there
        _clear_stale(run.folder, text, job)
        write_text(run.folder / MARKER, text)
        metrics = steps.all(grid)
        write_json(run.folder / "environment.json", metrics["environment"])
        write_json(run.folder / "metrics.json", metrics)
        write_transport_report(run.folder)
    return run


def _clear_stale(folder: Path, text: str, job: TransportJob) -> None:
    """Results of another job are not this one's. What the grid's step made stands or falls with that step."""
    file = folder / MARKER
    if file.exists() and file.read_bytes() != text.encode():
        of_grid = () if job.grid_only else (folder / "efficiency.parquet",)
        for stale in (*folder.glob("*.parquet"), folder / "metrics.json", folder / "report.html"):
            if stale not in of_grid:
                stale.unlink(missing_ok=True)


def _is_run(folder: Path) -> bool:
    return (folder / MARKER).is_file()


class _Steps:
    """The steps of one run; each is kept by the hash of what it depends on."""

    def __init__(self, run: Run, model: Model, prompts: PromptSet, job: TransportJob, choice: PairChoice) -> None:
        self.run, self.model, self.prompts, self.job, self.choice = run, model, prompts, job, choice
        # what later steps alone are made of is no part of the grid's key: its maps are, as files that must be there
        about = {key: value for key, value in asdict(job).items() if key not in LATER}
        self.key: list[Any] = [model.fingerprint_id, prompts.hash, about, str(model.dtype)]

    def grid_made(self) -> dict[str, Any]:
        """The result of the first step."""
        files = ("grid",) if self.job.grid_only else ("grid", "efficiency.parquet", "means.safetensors")
        for name in ("operators", "controls"):
            maps = MapFolder(Path("grid") / name)
            files += tuple(str(maps.file(pair)) for pair in getattr(self.choice, name))
        made: dict[str, Any] = self._step("grid", self._grid, files)
        return made

    def all(self, grid: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {"grid": grid}
        self.grid = TransportGrid.load(self.run.folder / "grid")
        if not self.job.grid_only:
            made["efficiency"] = made["grid"].pop("efficiency")
            split = Split.of(len(self.prompts), folds=self.job.folds, shards=self.job.shards, holdout=self.job.holdout,
                             seed=self.job.seed)  # fmt: skip
            held = [i for i, part in enumerate(split.part.tolist()) if part >= split.folds]
            self.held = type(self.prompts)(tuple(self.prompts[i] for i in held), f"{self.prompts.name} (held out)")
            if self.choice.dictionaries:
                read: list[Any] = [[d.site, hash_of_tensors(d.tensors)] for d in self.choice.dictionaries]
                made["features"] = self._step("features", self._features, read=read)
            read = [self._text.hash, [[str(a), str(b)] for a, b in self.choice.causal]]
            made["causal"] = self._step("causal", self._causal, read=read)
            made["shortcut"] = self._step("shortcut", self._shortcut, read=read)
        warnings = [*self.grid.warnings, *(w for part in made.values() for w in part.pop("warnings", [])),
                    *self.choice.left_out]  # fmt: skip
        job = {"name": f"Transport in {self.model.name}", **asdict(self.job), "n_prompts": len(self.prompts)}
        return {"format": FORMAT, "schema": 1, "job": job, **made, "warnings": warnings, "environment": environment()}

    def _step(self, name: str, make: Callable[[], Any], artefacts: tuple[str, ...] = (), *, read: Any = None) -> Any:
        """read: what the step depends on beside the model, the prompts and the job."""
        return self.run.step(name, [*self.key, read], make, artefacts or (f"{name}.parquet",), _whole)

    def _write(self, name: str, table: pd.DataFrame) -> None:
        table.to_parquet(self.run.folder / f"{name}.parquet", index=False)

    def _grid(self) -> dict[str, Any]:
        import pandas as pd

        tables: list[pd.DataFrame] = []
        sizes: list[dict[str, Any]] = []
        notes: list[str] = []
        means: dict[str, Tensor] = {}

        def visit(pair: SitePair, block: str, parts: list[Moments], held: list[Moments]) -> None:
            a, b = map(str, pair)
            # of this pair alone: a sum over all of them for each would take longer than the fits
            train, test = ([part.select([(block, b)]) for part in some] for some in (parts, held))
            means[b] = total(train).mean(b).cpu().float()
            try:
                found = transport_efficiency(train, total(test), block, b, alpha=self.job.alpha)
            except UserError as err:
                notes.append(f"no efficiency of {a} to {b}: {err}")
                return
            names = ("optimal", "truncated", "bound", "ceiling", "ceiling_corrected", "efficiency",
                     "efficiency_truncated")  # fmt: skip
            columns = {name: getattr(found, name).cpu().numpy() for name in names}
            tables.append(pd.DataFrame({"source": a, "target": b, "rank": found.ranks.numpy(), **columns}))
            last = {name: float(getattr(found, name)[-1]) for name in ("optimal", "bound", "efficiency")}
            sizes.append({"source": a, "target": b, **last, **asdict(found.size)})

        job, choice, maps = self.job, self.choice, self.run.folder / FITTED
        shutil.rmtree(maps, ignore_errors=True)  # of a run that was stopped
        rows = row_source(self.model, self.prompts, positions=job.positions, tokens=job.tokens)
        assert isinstance(rows, ModelRows)  # of a model
        passes, begin = planned_passes(rows, choice.pairs, job, free_bytes(self.model.device)), time.monotonic()
        try:
            grid = transport_grid(
                rows, pairs=choice.pairs, positions=job.positions,
                alpha=job.alpha, folds=job.folds, shards=job.shards, holdout=job.holdout, seed=job.seed,
                keep_maps=choice.operators, keep_controls=choice.controls, maps=maps,
                visit=None if job.grid_only else visit,
            )  # fmt: skip
            (self.run.folder / "steps" / "grid.json").unlink(
                missing_ok=True
            )  # what stands there is about to be replaced
            grid.save(self.run.folder / "grid", overwrite=(self.run.folder / "grid").exists())
            self._tell(rows, passes, time.monotonic() - begin)
        finally:
            shutil.rmtree(maps, ignore_errors=True)
        made = {**grid_metrics(grid), "warnings": notes}
        if not job.grid_only:
            self._write("efficiency", pd.concat(tables) if tables else pd.DataFrame())
            save_file(means, self.run.folder / "means.safetensors")
            made["efficiency"] = {"sizes": sizes}
        return made

    def _tell(self, rows: ModelRows, passes: list[list[SitePair]], seconds: float) -> None:
        """What the grid took, counted, beside its time."""
        sums, fits = grid_flops(rows, passes, self.job)
        if sums:
            log.info("%d pairs in %s, %.3g FLOPs of passes and sums and %.3g of fits (%.3g a second)", len(self.choice.pairs),
                     duration(seconds), sums, fits, (sums + fits) / max(seconds, 1e-9))  # fmt: skip

    @cached_property
    def _text(self) -> PromptSet:
        """What the causal figures are measured on: no map was fitted on it."""
        name = self.job.text or (BUNDLED_TEXT if self.model.name == "bundled:recipient" else "")
        return (type(self.prompts).load(name) if name else self.held)[:SEQUENCES]

    def _features(self) -> dict[str, Any]:
        import pandas as pd

        from workbench.profile import profile_model

        from .feature_tokens import top_tokens
        from .verdicts import feature_verdicts

        tables, counts, notes = [], [], []
        if self.job.positions != "same":
            notes.append(f"features are measured at the same token alone, not with positions={self.job.positions!r}")
        notes += [note for d in self.choice.dictionaries for note in foreign(self.model, d)]
        by_site = {Site.parse(str(d.site)): d for d in self.choice.dictionaries}
        wanted = {pair: by_site[pair[1]] for pair in self.choice.features}
        if wanted:
            sites = sorted({site for pair in wanted for site in pair})
            with profile_model(self.model, self.held[:FEATURE_PROMPTS], sites=sites, tokens=self.job.tokens) as store:
                for (a, b), dictionary in wanted.items():
                    rows = _without_first(store, a, b, self.model.device)
                    found = feature_verdicts(self.grid.operators[a, b], dictionary, rows,
                                             control=self.grid.controls.get((a, b)))  # fmt: skip
                    names = top_tokens(dictionary, store, TOKENS_OF_NAME, device=self.model.device).names
                    table = _of_pair(found.frame().reset_index(), a, b).assign(name=names)
                    tables.append(table)
                    median = {"r2": found.operator.median("r2"), "identity_r2": found.identity.median("r2")}
                    if found.control is not None:
                        median["control_r2"] = found.control.median("r2")
                    counts.append({"source": str(a), "target": str(b), **found.counts, "tokens": found.operator.tokens,
                                   "f1": _number(found.operator.median("f1")),
                                   **{k: _number(v) for k, v in median.items()}})  # fmt: skip
        self._write("features", pd.concat(tables).reset_index(drop=True) if tables else pd.DataFrame())
        return {"pairs": counts, "warnings": notes}

    def _causal(self) -> dict[str, Any]:
        import pandas as pd

        from workbench.evaluate.causal import causal_effects

        if self.job.positions != "same":
            self._write("causal", pd.DataFrame())
            return {
                "warnings": [f"causal arms write at the same token alone, not with positions={self.job.positions!r}"]
            }
        if not self.choice.causal:
            self._write("causal", pd.DataFrame())
            return {"warnings": ["no causal figures and no shortcuts were asked for (--causal none)"]}
        tables, about = [], {}
        means = load_file(self.run.folder / "means.safetensors")
        for a, b in self.choice.causal:
            found = causal_effects(self.model, self._text, a, b, self.grid.operators[a, b], mean=means[str(b)])
            tables.append(_of_pair(found.frame().reset_index(), a, b))
            about = {
                "prompts": self._text.name,
                "sequences": found.n_sequences,
                "tokens": found.n_tokens,
                "positions": found.positions,
            }
        every = pd.concat(tables).reset_index(drop=True)
        self._write("causal", every)
        return {**about, "lines": _records(every)}

    def _shortcut(self) -> dict[str, Any]:
        import pandas as pd

        from workbench.evaluate.shortcut import greedy_skips, shortcut_curve

        jumps = Jumps(self.grid.operators, self.choice.causal)
        if not self.choice.causal and self.job.causal == "none":
            self._write("shortcut", pd.DataFrame())
            return {}
        if self.job.positions != "same" or not jumps:
            self._write("shortcut", pd.DataFrame())
            return {"warnings": ["blocks are skipped between resid_post sites at the same token alone"]}
        some = self._text
        single = shortcut_curve(self.model, some, jumps).frame()
        half = len(some) // 2
        greedy = (
            greedy_skips(self.model, some[:half], jumps, budget=2.0, held_out=some[half:]).frame()
            if half
            else single[:0]
        )
        both = pd.concat([single.assign(search="single"), greedy.assign(search="greedy")]).reset_index(drop=True)
        self._write("shortcut", both)
        return {"lines": _records(both)}


def grid_metrics(grid: TransportGrid) -> dict[str, Any]:
    """What metrics.json holds of a grid, and the command prints: its lines and where it comes from."""
    keep = ("r2_uniform", "r2_uniform_low", "r2_uniform_high", "r2_weighted", "r2_whitened", "alpha")
    lines = [{"source": r["source"], "target": r["target"], "bos": bool(r["bos"]), "arm": r["arm"],
              **{k: _number(r[k]) for k in keep}} for r in grid.frame().to_dict("records")]  # fmt: skip
    return {"lines": lines, "meta": dict(grid.meta)}


def _whole(path: Path) -> None:
    if path.name == "grid":
        TransportGrid.load(path)


def _without_first(store: Store, a: Site, b: Site, device: torch.device) -> Iterator[Batch]:
    """The rows of a pair that the grid is made of, without those at position 0, on the device where they are measured."""
    later, start = torch.from_numpy(store.rows(["position"])["position"].to_numpy() > 0), 0
    for x, y, prompt in store_batches(store, a, b, device=device):
        keep, start = later[start : start + len(x)].nonzero().flatten(), start + len(x)
        there = keep.to(device)
        yield x[there], y[there], prompt[keep]


def _of_pair(table: pd.DataFrame, a: Site, b: Site) -> pd.DataFrame:
    return table.assign(source=str(a), target=str(b))


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): _number(v) if isinstance(v, float) else v for k, v in line.items()}
            for line in table.to_dict("records")]  # fmt: skip


def _number(value: Any) -> float | None:
    value = float(value)
    return value if value == value and abs(value) != float("inf") else None
