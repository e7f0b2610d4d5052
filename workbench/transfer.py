"""The main job: profile both models, forecast, paste, train the native, measure everything beside its controls."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .behaviour_transfer import BehaviourTransfer
from .convert import ConverterFits
from .engines import Engine
from .jobs import BehaviourTable, Job, ModelTable
from .models import Model, load
from .profile import profile_model
from .prompts import PromptSet, partial_openers
from .runs import Run, environment
from .sensitivity import Gradients, fisher, gradients
from .store import Store
from .trials import TrialSets


@dataclass
class Transfer:
    """What the steps of one job share: models, profiles, factorised fits, prompt sets and gradients, each made once."""

    job: Job
    run: Run
    engine: Engine | None = None
    """who runs profiles and evaluations; training, gradients and fits are done here"""

    @cached_property
    def donor(self) -> Model:
        return self._load(self.job.donor)

    @cached_property
    def recipient(self) -> Model:
        return self._load(self.job.recipient)

    def _load(self, table: ModelTable) -> Model:
        model = load(table.model, dtype=table.dtype, device=table.device, revision=table.revision, blocks=table.blocks)
        model.engine = self.engine
        return model

    def model(self, side: str) -> Model:
        return self.donor if side == "donor" else self.recipient

    def prompts(self, source: str) -> PromptSet:
        """A prompt set, read once."""
        if source not in self._sets:
            self._sets[source] = PromptSet.load(source)
        return self._sets[source]

    @cached_property
    def _sets(self) -> dict[str, PromptSet]:
        return {}

    def hash_of(self, source: str | None) -> str | None:
        """What a step that reads a prompt set depends on; None where there is no set."""
        return self.prompts(source).full_hash if source else None

    def store(self, side: str) -> Store:
        """The profile of one side (a step of the run)."""
        return self._stores[side]

    @cached_property
    def _stores(self) -> dict[str, Store]:
        return {side: Store.open(self.run.folder / "profiles" / side) for side in ("donor", "recipient")}

    @cached_property
    def fits(self) -> ConverterFits:
        return self.new_fits()

    def new_fits(self) -> ConverterFits:
        """Converters of the two profiles with nothing factorised yet."""
        profile = self.job.profile
        stores = self.store("donor"), self.store("recipient")
        return ConverterFits(*stores, profile.holdout, self.job.seed, pairing=profile.pairing)

    def scale(self, side: str) -> Store | None:
        """The profile that training takes its units from, where it holds the last tokens that adapters act on."""
        return self.store(side) if self.job.profile.pairing == "last" else None

    def key(self, *more: Any, sides: tuple[str, ...] = ("donor", "recipient")) -> list[Any]:
        """What every step after the profiles depends on; sides: the models that it is made from."""
        profile, models = self.job.profile, [self.model(side).fingerprint_id for side in sides]
        return [*models, self.profiled.hash, profile.holdout, profile.pairing, self.job.seed, *more]

    @cached_property
    def profiled(self) -> PromptSet:
        return PromptSet.load(self.job.profile.prompts, limit=self.job.profile.limit)

    def gradient(self, behaviour: str, source: str) -> Gradients:
        """Gradients of a behaviour's log-odds on a prompt set of the recipient; one backward pass, kept for all."""
        key = (behaviour, source)
        if key not in self._gradients:
            openers = next(b.openers for b in self.job.behaviours if b.name == behaviour)
            self._gradients[key] = gradients(self.recipient, self.prompts(source), openers)
        return self._gradients[key]

    @cached_property
    def _gradients(self) -> dict[tuple[str, str], Gradients]:
        return {}

    @cached_property
    def neutral(self) -> list[Gradients]:
        source = self.job.evaluate.validation_text
        return fisher(self.recipient, self.prompts(source), seed=self.job.seed) if source else []

    def trial_sets(self, table: BehaviourTable) -> TrialSets:
        """What pastes of a behaviour are tried on: validation prompts of all behaviours, and plain text."""
        off = {b.name: (self.prompts(b.validation), b.openers) for b in self.job.behaviours if b.name != table.name}
        if table.validation_not:
            off["where not wanted"] = self.prompts(table.validation_not), table.openers
        source = self.job.evaluate.validation_text
        texts = self.prompts(source) if source else None
        return TrialSets(self.recipient, (self.prompts(table.validation), table.openers), off, texts)


def _profiles(t: Transfer) -> dict[str, Any]:
    made = {}
    for side in ("donor", "recipient"):
        model, table = t.model(side), t.job.profile
        path = t.run.folder / "profiles" / side

        tokens = "last" if table.pairing == "last" else "all"

        def make(
            model: Model = model, path: Path = path, size: int = table.batch_tokens, tokens: str = tokens
        ) -> dict[str, Any]:
            start = time.perf_counter()
            shutil.rmtree(path, ignore_errors=True)  # of other inputs, or damaged: the run's own, made again
            store = profile_model(model, t.profiled, path, tokens=tokens, batch_tokens=size, overwrite=True,
                                  engine=t.engine)  # fmt: skip
            return {"seconds": time.perf_counter() - start, "rows": store.n_rows, "sites": [str(s) for s in store.sites],
                    "model": model.name, "width": model.width}  # fmt: skip

        inputs = [model.fingerprint_id, t.profiled.full_hash, tokens]
        made[side] = t.run.step(
            f"profile-{side}", inputs, make, (f"profiles/{side}",), lambda p: Store.open(p).verify()
        )
    return made


def transfer(job: Job, run: Run, engine: Engine | None = None) -> dict[str, Any]:
    """Runs the job and returns its metrics, the same on any engine; artefacts and step records lie in the run folder."""
    from .evaluate.arms import measure_arms

    t = Transfer(job, run, engine)
    start = time.perf_counter()
    metrics: dict[str, Any] = {"schema": 1, "environment": environment(), "warnings": []}
    metrics["job"] = {"name": job.name, "seed": job.seed, "donor": t.donor.name, "recipient": t.recipient.name,
                      "profile_prompts": len(t.profiled)}  # fmt: skip
    metrics["profiles"] = _profiles(t)
    metrics["behaviours"] = {}
    for table in job.behaviours:
        b = BehaviourTransfer(t, table)
        b.donor_adapter()
        forecast = b.forecast()
        chosen = b.chosen(forecast)
        pasted = b.paste(chosen, forecast["chosen"])
        native = (
            b.native([r for _, r in chosen.candidate.pairs]) if job.evaluate.native and table.demonstrations else None
        )
        metrics["behaviours"][table.name] = measure_arms(b, chosen, forecast, pasted, native)
        metrics["warnings"] += [f"{table.name}: {said}" for said in forecast.get("warnings", [])]
        metrics["warnings"] += [f"{table.name}: {c['warning']}" for c in pasted["converters"] if c["warning"]]
        for model in (t.donor, t.recipient):
            for opener, token in partial_openers(
                table.openers, model.tokenizer, t.prompts(table.evaluation)[0]
            ).items():
                metrics["warnings"].append(f"{table.name}: {model.name} cuts the opener {opener!r} after {token!r}; log-odds "
                                           f"count every answer that begins with {token!r}")  # fmt: skip
    metrics["seconds"] = time.perf_counter() - start
    return metrics
