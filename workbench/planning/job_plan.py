"""`plan_job`: every step of a transfer job with its cost, from two configurations, two tokenizers and the prompt sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..behaviour_transfer import MEASURED, REPEATS
from ..job_options import open_job
from ..jobs import BehaviourTable, Job, ModelTable
from ..maps import counts
from ..prompts import PromptSet
from ..sites import Site
from ..trials import PROMPTS, STRENGTHS, TRIED
from ..work import Lengths, ModelShape, Work, forward, generation, training
from ..work.rates import Rates, measured
from ..work.room import generation_bytes, training_bytes
from .plan import Plan, Step
from .profile_plan import open_planned, run_dtype
from .steps import store_step
from .texts import count_demonstrations, count_prompts

FISHER = 4
"""backward passes over neutral text: `sensitivity.fisher`"""
OPENER = 8
"""tokens of an answer where the behaviour is not wanted: an opener's, and a few"""
FEWER = (
    'a smaller model, dtype = "bfloat16", a smaller training.batch_size, evaluate.batch_size or profile.batch_tokens'
)
SMALLER = "a smaller profile.limit, or another folder for --out"


@dataclass
class _Side:
    """A model of the job, and its prompts counted once each."""

    shape: ModelShape
    tokenizer: Any
    dtype: str

    def __post_init__(self) -> None:
        self._counted: dict[tuple[str, int | None], Lengths] = {}

    def lengths(self, source: str, limit: int | None = None) -> Lengths:
        key = (source, limit)
        if key not in self._counted:
            prompts = PromptSet.load(source)[:limit]
            self._counted[key] = count_prompts(prompts, self.tokenizer, max_length=self.shape.context).texts
        return self._counted[key]

    def last(self, texts: Lengths) -> Work:
        """A forward pass with the logits of each last token."""
        return forward(self.shape, texts, head="last", dtype=self.dtype)

    def gradients(self, texts: Lengths) -> Work:
        """A forward pass and one back to the first block, with the logits of each last token."""
        whole = training(self.shape, texts, [Site(0, "resid_pre")], dtype=self.dtype)
        unused = Work({self.dtype: -4.0 * self.shape.head * (texts.tokens - texts.sequences)})
        return whole + unused


def plan_job(job: Job | str | Path, *, rates: Rates | None = None, gpus: int = 1, tokens: float | None = None) -> Plan:
    """What `run_job(job)` would cost, step by step as its run folder names them; no weights are loaded.

    rates: the machine (`workbench.work.rates`): this one, measured, unless given. tokens: of the profile, in place of what
    its prompts have. A layer that is chosen while the job runs is taken in the middle. Raises UserError as `Job.load` does,
    and for models, tokenizers and prompts that cannot be read.

    >>> print(plan_job("bundled:demo"))  # doctest: +SKIP
    """
    job = job if isinstance(job, Job) else open_job(job)
    rates = rates or measured(folder=job.folder)
    return _JobPlan(job, rates, gpus, tokens).plan()


@dataclass
class _JobPlan:
    job: Job
    rates: Rates
    gpus: int
    tokens: float | None

    def _side(self, table: ModelTable) -> _Side:
        shape, tokenizer = open_planned(table.model, table.revision)
        return _Side(shape, tokenizer, run_dtype(shape, table.dtype, self.rates))

    @cached_property
    def donor(self) -> _Side:
        return self._side(self.job.donor)

    @cached_property
    def recipient(self) -> _Side:
        return self._side(self.job.recipient)

    def plan(self) -> Plan:
        job = self.job
        profiles = [self._profile(name, side) for name, side in (("donor", self.donor), ("recipient", self.recipient))]
        self.rows = profiles[1].rows
        steps = [*profiles, *(step for b in job.behaviours for step in self._behaviour(b))]
        title = f"Job {job.name}: {self.donor.shape.name} to {self.recipient.shape.name}"
        return Plan(title, tuple(steps), self.rates, self.gpus, fixes=(FEWER, SMALLER))

    def _profile(self, name: str, side: _Side) -> Step:
        table = self.job.profile
        policy = "last" if table.pairing == "last" else "all"
        prompts = PromptSet.load(table.prompts, limit=table.limit)
        counted = count_prompts(prompts, side.tokenizer, policy, max_length=side.shape.context, tokens=self.tokens)
        return store_step(f"profile-{name}", side.shape, counted, side.shape.layers(), dtype=side.dtype,
                          batch_tokens=table.batch_tokens)  # fmt: skip

    def _behaviour(self, b: BehaviourTable) -> list[Step]:
        donor, native = self.donor.shape, self.job.evaluate.native and b.demonstrations
        if b.adapter is not None:
            parts = Adapter.load(b.adapter).parts
            sites, rank = sorted(parts), max(part.rank for part in parts.values())
        else:
            layers = self.job.training.layers or [2 * donor.n_layers // 3]
            sites, rank = [Site(layer) for layer in layers], self.job.training.rank
        there = [Site(round(s.layer * (self.recipient.shape.n_layers - 1) / max(donor.n_layers - 1, 1))) for s in sites]
        steps = [] if b.adapter is not None else [self._training(f"donor-{b.name}", self.donor, b, sites)]
        steps += [self._forecast(b, sites, rank), self._paste(b, len(sites), rank)]
        return [*steps, *([self._training(f"native-{b.name}", self.recipient, b, there)] if native else []),
                self._evaluate(b)]  # fmt: skip

    def _training(self, name: str, side: _Side, b: BehaviourTable, sites: Sequence[Site]) -> Step:
        table = self.job.training
        shown = PromptSet.load(b.demonstrations) if b.demonstrations else PromptSet(())
        texts = count_demonstrations(shown, side.tokenizer)
        seen = texts.scaled(table.steps * table.batch_size / texts.sequences)
        batch = table.batch_size * texts.mean
        work = training(side.shape, seen, sites, batch_tokens=max(1, round(batch)), dtype=side.dtype)
        first = min(site.layer for site in sites)
        held = training_bytes(side.shape, table.batch_size * texts.longest, first + 1, dtype=side.dtype)
        return Step(name, f"{table.steps} steps of {table.batch_size} demonstrations", work, seen.tokens, device=held,
                    spread=False)  # fmt: skip

    def _forecast(self, b: BehaviourTable, sites: Sequence[Site], rank: int) -> Step:
        """The donor's own effect, gradients of the recipient, maps at every layer, trials, and the forecast's own check."""
        job, donor, ours = self.job, self.donor, self.recipient
        on = ours.lengths(b.validation)
        others = [ours.lengths(o.validation) for o in job.behaviours if o.name != b.name]
        others += [ours.lengths(b.validation_not)] if b.validation_not else []
        plain = ours.lengths(job.evaluate.validation_text).halved() if job.evaluate.validation_text else Lengths({})
        work = 2 * donor.last(donor.lengths(b.validation))
        work += sum((ours.gradients(texts) for texts in (on, *others)), FISHER * ours.gradients(plain))
        if job.paste.strength == "validation":
            tried = [texts.first(PROMPTS) for texts in (on, *others, plain)]
            work += (TRIED * len(STRENGTHS) + 1) * sum((ours.last(texts) for texts in tried), Work())
        work += (MEASURED + 3) * ours.last(on)
        n, a, r = self._fitted, donor.shape.width, ours.shape.width
        many = len(job.paste.methods or job.paste.alphas) * ours.shape.n_layers * len(sites)
        fits = ours.shape.n_layers * counts.factor_flops(n, r) + len(sites) * counts.factor_flops(n, a)
        fits += many * counts.solver_fold_flops(n, r, a, rank)
        passes = sum(t.tokens for t in (on, *others)) + FISHER * plain.tokens
        longest = max(t.longest for t in (on, *others, plain) if t.counts)
        held = training_bytes(ours.shape, 64 * longest, 0, dtype=ours.dtype)
        return Step(f"forecast-{b.name}", f"gradients, {many} candidates" + (", trials" if job.paste.strength == "validation"
                    else ""), work + Work({"float64": fits}), passes, device=held,
                    host=8.0 * n * (r * ours.shape.n_layers + a * len(sites)), spread=False)  # fmt: skip

    @property
    def _fitted(self) -> int:
        """Rows that converters are fitted to."""
        return max(1, round(self.rows * (1 - self.job.profile.holdout)))

    def _paste(self, b: BehaviourTable, parts: int, rank: int) -> Step:
        n, r, a = self._fitted, self.recipient.shape.width, self.donor.shape.width
        one = counts.factor_flops(n, r) + counts.factor_flops(n, a) + counts.solver_fold_flops(n, r, a, rank)
        return Step(f"paste-{b.name}", f"{parts} parts of rank {rank}, {REPEATS} times to time it",
                    Work({"float64": REPEATS * parts * one}), rows=n, host=8.0 * n * (r + a), spread=False)  # fmt: skip

    def _evaluate(self, b: BehaviourTable) -> Step:
        """Answers and log-odds of every arm, side effects, the dose."""
        table, donor, ours = self.job.evaluate, self.donor, self.recipient
        prompts = ours.lengths(b.evaluation, table.limit)
        native = bool(table.native and b.demonstrations)
        arms = 4 + native  # base, paste, pinv, mean delta, and the native
        drawn = 2 * table.draws
        graded = arms + 2 * min(table.draws, table.rate_draws)
        work = 2 * self._answers(donor, donor.lengths(b.evaluation, table.limit)) + graded * self._answers(
            ours, prompts
        )
        work += 2 * donor.last(donor.lengths(b.evaluation, table.limit))
        work += (arms + drawn + len(table.dose) + 1) * ours.last(prompts)
        if table.neutral_text:
            texts = ours.lengths(table.neutral_text, table.limit)
            work += 2 * (arms - 1) * forward(ours.shape, texts, head="all", dtype=ours.dtype)
        if b.evaluation_not:
            away = ours.lengths(b.evaluation_not, table.limit)
            work += arms * generation(ours.shape, away, OPENER, batch_size=table.batch_size, dtype=ours.dtype)
        for other in self.job.behaviours:
            if other.name != b.name:
                work += arms * ours.last(ours.lengths(other.evaluation, table.limit))
        tokens = (graded + 2) * prompts.longer(table.max_new_tokens).tokens
        at_once = min(table.batch_size, prompts.sequences)
        held = max(generation_bytes(s.shape, at_once * (prompts.longest + table.max_new_tokens), at_once * prompts.longest,
                                    dtype=s.dtype) for s in (donor, ours))  # fmt: skip
        return Step(f"evaluate-{b.name}", f"{graded + 2} sets of answers to {prompts.sequences:,.0f} prompts", work, tokens,
                    device=held)  # fmt: skip

    def _answers(self, side: _Side, prompts: Lengths) -> Work:
        table = self.job.evaluate
        return generation(side.shape, prompts, table.max_new_tokens, batch_size=table.batch_size, dtype=side.dtype)
