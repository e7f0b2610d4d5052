"""One behaviour of a transfer: its donor's adapter, the forecast and the choice, the paste, the native, the controls."""

from __future__ import annotations

import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .adapters.adapter import Adapter
from .adapters.card import licence_of
from .adapters.demonstrations import check_lengths
from .adapters.train import default_layer, train_adapter
from .backends.torch_hooks import tokens_needed
from .convert import ConverterFits
from .converter_specs import method_pairs
from .errors import UserError
from .evaluate.behaviour import log_odds_each
from .evaluate.controls import at_length, delta_norm, mean_delta, random_converter, shuffled_pairs, sigma_length
from .evaluate.idleness import ineffective
from .evaluate.statistics import mean_interval, sign_agreement, spearman
from .forecast import Candidate, Forecast, candidates_of, forecast_pastes, matched_candidates, paste_candidate, rank
from .jobs import BehaviourTable
from .layer_matching import match_layers, matched_sites
from .prompts import PromptSet, encode
from .sensitivity import Gradients
from .sites import Site
from .trials import TRIED, try_pastes

log = logging.getLogger("workbench")
REPEATS = 5  # a paste takes milliseconds: its time is the median of so many
MEASURED = 24  # candidates whose forecast is checked against a measurement on validation prompts

if TYPE_CHECKING:
    from .transfer import Transfer


@dataclass(frozen=True)
class Choice:
    """What is pasted: a candidate and its strength."""

    candidate: Candidate
    strength: float


@dataclass
class BehaviourTransfer:
    """The steps of one behaviour."""

    shared: Transfer
    table: BehaviourTable

    @property
    def name(self) -> str:
        return self.table.name

    def path(self, arm: str) -> str:
        return f"adapters/{self.name}/{arm}"

    def adapter(self, arm: str) -> Adapter:
        return Adapter.load(self.shared.run.folder / self.path(arm))

    def _keep(self, adapter: Adapter, arm: str) -> None:
        folder = self.shared.run.folder / self.path(arm)
        if not (folder / "adapter.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what is left of a damaged one
        adapter.save(folder, overwrite=True)

    def _step(self, name: str, inputs: Any, make: Callable[[], Any], arms: tuple[str, ...] = ()) -> Any:
        artefacts = tuple(self.path(a) for a in arms)
        sides = ("donor",) if name == "donor" else ("donor", "recipient")  # its adapter is the same for any recipient
        key = self.shared.key(inputs, sides=sides)
        return self.shared.run.step(f"{name}-{self.name}", key, make, artefacts, Adapter.load)

    @cached_property
    def _training(self) -> dict[str, Any]:
        """The recipe, as far as it decides the adapter."""
        return self.shared.job.training.model_dump(exclude={"layers"})

    def _train(self, side: str, sites: list[Site], arm: str) -> dict[str, Any]:
        t = self.shared
        if self.table.demonstrations is None:
            raise UserError(
                f"behaviour {self.name!r} has neither an adapter nor demonstrations to train one on; give one"
            )
        trained = train_adapter(t.model(side), t.prompts(self.table.demonstrations), sites, profile=t.scale(side),
                                seed=t.job.seed, name=f"{self.name} {arm}", checkpoint=self._checkpoint(arm),
                                **self._training)  # fmt: skip
        self._keep(trained.adapter, arm)
        self._checkpoint(arm).unlink(missing_ok=True)
        return {"seconds": trained.seconds, "flops": trained.flops, "steps": trained.steps, "curve": trained.curve,
                "validation": trained.validation, "best_step": trained.best_step,
                "sites": [str(s) for s in sites]}  # fmt: skip

    def _checkpoint(self, arm: str) -> Path:
        """What a training that is stopped goes on from."""
        return self.shared.run.folder / f".{self.name}-{arm}.training.safetensors"

    def donor_adapter(self) -> dict[str, Any]:
        """The donor's adapter: the folder that was given, or one trained on the demonstrations."""
        t = self.shared
        if self.table.adapter is not None:
            given = Adapter.load(self.table.adapter)
            self._check_lengths({term.positions for term in given.split()})

            def copy() -> dict[str, Any]:
                given.check(t.donor, self.table.allow_mismatch)
                elsewhere = [str(s) for s in given.parts if s.point != "resid_post"]
                if elsewhere:
                    raise UserError(f"{self.table.adapter} edits {', '.join(elsewhere)}; a job pastes resid_post only")
                self._keep(replace(given, base=t.donor.fingerprint), "donor")
                return {"source": self.table.adapter, "sites": [str(s) for s in given.parts]}

            inputs = [self.table.adapter, given.hash, self.table.allow_mismatch]
            return self._step("donor", inputs, copy, ("donor",))
        self._check_lengths({t.job.training.positions})
        layers = t.job.training.layers or [default_layer(t.donor)]
        sites = [t.donor.site(l) for l in layers]
        inputs = [self._training, layers, self.demonstrations_hash]
        return self._step("donor", inputs, lambda: self._train("donor", sites, "donor"), ("donor",))

    def _check_lengths(self, listed: Iterable[str]) -> None:
        """UserError for prompts that are too short, in either model, for positions of an adapter that meets them."""
        sources = [self.table.validation, self.table.evaluation, self.table.evaluation_not,
                   *(b.evaluation for b in self.shared.job.behaviours)]  # fmt: skip
        for positions in sorted(p for p in listed if tokens_needed(p) > 1):
            for model in (self.shared.donor, self.shared.recipient):
                for prompts in map(self.shared.prompts, dict.fromkeys(filter(None, sources))):
                    check_lengths(prompts, [len(ids) for ids in encode(prompts, model.tokenizer)], positions)

    @cached_property
    def demonstrations_hash(self) -> str | None:
        return self.shared.hash_of(self.table.demonstrations)

    def native(self, sites: list[Site]) -> dict[str, Any]:
        """The same recipe on the recipient itself, at the sites of the paste."""
        inputs = [self._training, [str(s) for s in sites], self.demonstrations_hash]
        return self._step("native", inputs, lambda: self._train("recipient", sites, "native"), ("native",))

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _candidates(self, donor: Adapter, on: Gradients, target: float) -> list[Candidate]:
        """What is forecast; every candidate pastes every layer of the adapter."""
        t, table = self.shared, self.shared.job.paste
        nd, nr = t.donor.n_layers, t.recipient.n_layers
        methods = [("ridge", a) for a in table.alphas] if table.methods is None else method_pairs(table.methods)
        if table.match == "forecast":
            if len(donor.parts) == 1:
                return candidates_of(donor, nr, methods)
            return matched_candidates(donor, t.fits, on, target, nd, methods)
        sites = [Site(l) for l in range(nr)]
        matched = matched_sites(t.fits, list(donor.parts), sites, table.match, n_donor=nd, n_recipient=nr,
                                alpha=table.alphas[0])  # fmt: skip
        pairs = tuple((s, Site(matched[s.layer], s.point)) for s in donor.parts)
        return [Candidate(pairs, method, alpha) for method, alpha in methods]

    def forecast(self) -> dict[str, Any]:
        """Forecasts every candidate, chooses, and measures some of them on validation prompts to check the forecast."""
        t, job = self.shared, self.shared.job
        behaviours = {b.name: [b.openers, t.hash_of(b.validation)] for b in job.behaviours}
        sets = [t.hash_of(s) for s in (self.table.validation_not, job.evaluate.validation_text)]
        inputs = [self.adapter("donor").hash, job.paste.model_dump(), behaviours, sets]
        return self._step("forecast", inputs, self._forecast)

    def _forecast(self) -> dict[str, Any]:
        t, job, donor = self.shared, self.shared.job, self.adapter("donor")
        prompts = t.prompts(self.table.validation)
        start = time.perf_counter()
        acting, plain = log_odds_each(t.donor, prompts, self.table.openers, [donor, None])
        effect = acting - plain
        target = float(effect.mean())
        idle = ineffective(self.name, mean_interval(effect))
        if idle is not None:
            log.warning("%s: %s", self.name, idle)
        aimed = time.perf_counter() - start
        on = t.gradient(self.name, self.table.validation)
        off = {b.name: t.gradient(b.name, b.validation) for b in job.behaviours if b.name != self.name}
        if self.table.validation_not:
            off["where not wanted"] = t.gradient(self.name, self.table.validation_not)
        neutral = t.neutral
        used = sum(g.seconds for g in (on, *off.values(), *neutral))
        start = time.perf_counter()
        fixed = None if isinstance(job.paste.strength, str) else job.paste.strength
        candidates = self._candidates(donor, on, target)
        made = forecast_pastes(donor, t.fits, candidates, on, off, neutral, target=target, strength=fixed,
                               max_sigma=job.paste.max_sigma)  # fmt: skip
        ranked, trials = rank(made, target), []
        if job.paste.strength == "validation":
            trials = try_pastes(t.trial_sets(self.table), donor, t.fits, ranked[:TRIED], target=target,
                                max_sigma=job.paste.max_sigma)  # fmt: skip
            best = trials[0]
            first = next(f for f in ranked if f.candidate == best.candidate)
            ranked = [first.at(best.strength), *(f for f in ranked if f is not first)]
        seconds = time.perf_counter() - start + aimed
        rows = [_forecast_row(f, chosen=i == 0) for i, f in enumerate(ranked)]
        self._measure(ranked, rows, donor, prompts, on.value)
        checked = [r for r in rows if r["measured_on"] is not None]
        said, found = [r["on"] for r in checked], [r["measured_on"] for r in checked]
        return {
            "target": target,
            "warnings": [] if idle is None else [idle],
            "candidates": rows,
            "chosen": rows[0],
            "trials": [trial.as_dict() for trial in trials],
            "seconds": seconds,
            "gradients_seconds": used,
            "spearman": spearman(said, found),
            "sign_agreement": sign_agreement(said, found),
        }

    def _measure(self, ranked: list[Forecast], rows: list[dict[str, Any]], donor: Adapter, prompts: PromptSet,
                 before: Tensor) -> None:  # fmt: skip
        """Measures the first candidates and an even spread of the rest on validation prompts."""
        t = self.shared
        step = max(1, len(ranked) // MEASURED)
        some = sorted({0, 1, 2, *range(0, len(ranked), step)} & set(range(len(ranked))))
        adapters = [self._folded(Choice(ranked[i].candidate, ranked[i].strength), donor) for i in some]
        for i, after in zip(some, log_odds_each(t.recipient, prompts, self.table.openers, adapters), strict=True):
            rows[i]["measured_on"] = float((after - before).mean())

    def _folded(self, f: Choice | Forecast, donor: Adapter, fits: ConverterFits | None = None) -> Adapter:
        """The paste of one candidate at its strength."""
        fits = fits or self.shared.fits
        return paste_candidate(donor, fits, f.candidate, f.strength, name=f"{self.name} paste")

    @staticmethod
    def chosen(forecast: Mapping[str, Any]) -> Choice:
        c = forecast["chosen"]
        pairs = tuple((Site.parse(d), Site.parse(r)) for d, r in c["pairs"])
        return Choice(Candidate(pairs, c["method"], c["alpha"]), c["strength"])

    # -- pasting ------------------------------------------------------------------------------------------------------

    def paste(self, chosen: Choice, said: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The paste, the published way beside it, and what does not belong to any draw; converters with their quality.

        said: the forecast of `chosen`, for the card of the paste.
        """
        t = self.shared
        validation = t.hash_of(self.table.validation)  # the mean delta is taken there
        inputs = [self.adapter("donor").hash, repr(chosen.candidate), chosen.strength, validation]
        return self._step("paste", inputs, lambda: self._paste(chosen, said), ("paste", "pinv", "mean_delta"))

    def _paste(self, chosen: Choice, said: Mapping[str, Any] | None) -> dict[str, Any]:
        t, donor = self.shared, self.adapter("donor")
        timed = [self._timed(chosen, donor) for _ in range(REPEATS)]
        candidate = chosen.candidate
        fitted = [t.fits.converter(d, r, candidate.method, candidate.alpha) for d, r in candidate.pairs]
        converters = [c.as_dict() for c in fitted]
        licence = licence_of(str(t.donor.folder or t.donor.name))
        known = {"evidence": {"converters": converters, "forecast": said}, "donor_licence": licence}
        adapter = replace(timed[0][0], meta={**timed[0][0].meta, **known})
        self._keep(adapter, "paste")
        self._keep(self._published(donor, t.fits), "pinv")
        self._keep(mean_delta(timed[0][0], self.states), "mean_delta")
        return {
            "fit": statistics.median(fit for _, fit, _ in timed),
            "fold": statistics.median(fold for _, _, fold in timed),
            "repeats": REPEATS,
            "flops": t.fits.flops([(d, r, donor.parts[d].rank) for d, r in candidate.pairs]),
            "converters": converters,
        }

    def _timed(self, chosen: Choice, donor: Adapter) -> tuple[Adapter, float, float]:
        """The paste made anew from the two profiles, with the seconds of fitting and of folding."""
        t = self.shared
        fresh = t.new_fits()
        for d, r in chosen.candidate.pairs:  # reading the profile is not the paste's time
            fresh.states("donor", d), fresh.states("recipient", r)
        start = time.perf_counter()
        for d, r in chosen.candidate.pairs:
            fresh.solver("donor", d, True), fresh.solver("recipient", r, True)
        fitted = time.perf_counter()
        adapter = self._folded(chosen, donor, fresh)
        return adapter, fitted - start, time.perf_counter() - fitted

    def _published(self, donor: Adapter, fits: ConverterFits) -> Adapter:
        """Command-V as published: pinv, nearest layer by depth, strength 1."""
        t = self.shared
        matched = match_layers(donor.layers, t.donor.n_layers, t.recipient.n_layers, "nearest")
        pairs = tuple((s, Site(matched[s.layer], s.point)) for s in donor.parts)
        return self._folded(Choice(Candidate(pairs, "pinv", 0.0), 1.0), donor, fits)

    @property
    def states(self) -> Mapping[Site, Tensor]:
        """The recipient's states on validation prompts, on which lengths are taken."""
        return self.shared.gradient(self.name, self.table.validation).states

    def sigma(self, adapter: Adapter) -> float:
        """Mean Mahalanobis length of an adapter's delta on validation prompts, in the recipient's profile."""
        return sigma_length(adapter, self.shared.fits, self.states)

    def norm(self, adapter: Adapter) -> float:
        """Mean Euclidean length of an adapter's delta on validation prompts."""
        return delta_norm(adapter, self.states)

    def controls(self, chosen: Choice) -> dict[str, list[Adapter]]:
        """Draws of the random controls, each scaled to the paste's length in standard deviations."""
        t, donor, length = self.shared, self.adapter("donor"), self.sigma(self.adapter("paste"))
        seeds = range(t.job.seed * 1000, t.job.seed * 1000 + t.job.evaluate.draws)
        makers = {"random_converter": random_converter, "shuffled_pairs": shuffled_pairs}
        return {
            name: [at_length(make(donor, t.fits, chosen.candidate, s), length, t.fits, self.states) for s in seeds]
            for name, make in makers.items()
        }


def _forecast_row(f: Forecast, chosen: bool) -> dict[str, Any]:
    """A candidate as metrics.json has it."""
    first = f.candidate.pairs[0]
    return {
        **{k: v for k, v in asdict(f).items() if k != "candidate"},
        **f.candidate.as_dict(),
        "donor_site": str(first[0]),
        "recipient_site": str(first[1]),
        "measured_on": None,
        "chosen": chosen,
    }
