"""A job file: its tables, checked, with every key described; and `run_job`, which runs one."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .atomic import write_json, write_text
from .converter_specs import ConverterSpec
from .errors import UserError
from .runs import Run, failures_told
from .small_files import read_toml, reason

if TYPE_CHECKING:
    from .engines import Engine

log = logging.getLogger("workbench")


class _Table(BaseModel):
    """A table of a job file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelTable(_Table):
    """A model of the job."""

    model: str
    """A hub id, a local folder, `bundled:donor`, `bundled:recipient` or `bundled:outsider`."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The dtype to run in; `auto` follows the checkpoint."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `map` for accelerate's device map."""
    revision: str | None = None
    """The revision of a hub model."""
    blocks: str | None = None
    """The path of the ModuleList of blocks, for a family that is not recognised."""


class ProfileTable(_Table):
    """What both models are profiled on."""

    prompts: str = "bundled:profile"
    """A prompt set: `bundled:NAME`, or a .txt, .jsonl, .csv or .parquet file."""
    limit: int | None = Field(None, gt=0)
    """Use the first so many prompts only."""
    holdout: float = Field(0.2, ge=0, lt=1)
    """The share of prompts that converters are not fitted to, for their quality figures."""
    pairing: Literal["last", "aligned"] = "last"
    """The rows that converters are fitted to: the last token of each prompt, or all tokens of both that end at the same
    character, so that few prompts give many rows."""
    batch_tokens: int = Field(8192, gt=0)
    """Tokens in a batch, padding included."""


class TrainingTable(_Table):
    """How adapters are trained: the donor's where a behaviour gives none, and the native ones."""

    layers: list[int] | None = None
    """Donor layers; unless given, the layer at two thirds of the donor's depth."""
    kind: Literal["nodireft", "loreft", "direft", "vector"] = "nodireft"
    """The form of the adapter."""
    positions: str = "last"
    """Where it acts: `last`, `prompt`, `all`, `first:n`, `last:n`, `generated`, or several joined by +."""
    rank: int = Field(4, gt=0)
    """Rank at each layer."""
    steps: int = Field(100, gt=0)
    """Optimiser steps."""
    batch_size: int = Field(32, gt=0)
    """Demonstrations a step."""
    learning_rate: float = Field(1e-2, gt=0)
    """Peak learning rate, in units of the profile: states are scaled to about 1 a coordinate."""
    max_size: float = Field(0.4, gt=0)
    """Deltas longer than this many spreads of the profile are penalised."""
    validation: float = Field(0.0, ge=0, lt=1)
    """The share of the demonstrations that is held out; the adapter is then the one that does best on them."""
    validate_every: int = Field(10, gt=0)
    """Steps from one look at the held-out demonstrations to the next."""
    patience: int | None = Field(None, gt=0)
    """So many looks without a better one end the training early; needs `validation`."""


class PasteTable(_Table):
    """How the paste is made."""

    match: Literal["forecast", "nearest", "floor", "ends", "cka", "svcca", "r2"] = "forecast"
    """Which recipient layer answers to a donor layer: by forecast, by depth, by likeness, or by held-out fit."""
    methods: list[str] | None = Field(None, min_length=1)
    """Converters to choose among, such as `["ridge:0.1", "ridge:cv", "pinv", "procrustes", "rrr:16", "pls:32", "whitened",
    "cycle:1"]`; unless given, ridge at each of `alphas`."""
    alphas: list[float] = Field([0.01, 0.03, 0.1, 0.3, 1.0], min_length=1)
    """Ridge strengths, in units of the mean diagonal of X'X."""
    strength: float | Literal["validation", "forecast"] = "validation"
    """A number; `forecast`, which should reach the donor's own effect; or `validation`: the first four candidates by forecast
    are tried at 0.5, 1, 2 and 4 on validation prompts, and the one with the most gain less damage is taken: the rise of the
    behaviour's probability, less the largest change of a probability on the other prompts or on plain text."""
    max_sigma: float = Field(12.0, gt=0)
    """The longest delta that may be chosen, in standard deviations of the recipient's profile; without trials on validation
    prompts take 4: a forecast of a long delta says little."""

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str] | None) -> list[str] | None:
        for text in methods or ():
            try:
                kind = ConverterSpec.parse(text).kind
            except UserError as err:
                raise ValueError(str(err)) from err
            if kind == "autoencoder":
                raise ValueError("an autoencoder does not fold into an adapter; take linear converters")
        return methods

    @field_validator("alphas")
    @classmethod
    def _not_negative(cls, alphas: list[float]) -> list[float]:
        if min(alphas) < 0:
            raise ValueError(f"alpha {min(alphas)} is negative; give 0 or more")
        return alphas


class EvaluateTable(_Table):
    """What is measured."""

    native: bool = True
    """Train the behaviour into the recipient directly, for comparison."""
    neutral_text: str = "bundled:evaluation_text"
    """Plain texts on which side effects are measured; `""` for none."""
    validation_text: str = "bundled:validation_text"
    """Plain texts on which side effects are forecast; `""` for none."""
    draws: int = Field(16, ge=0)
    """Draws of each random control, for its log-odds."""
    rate_draws: int = Field(3, ge=1)
    """Draws of each random control whose answers are generated and graded."""
    dose: list[float] = [0.25, 0.5, 0.75, 1.25, 1.5, 2.0]
    """Multiples of the paste's strength for the dose-response curve."""
    max_new_tokens: int = Field(72, gt=0)
    """Length at which an answer is cut."""
    batch_size: int = Field(160, gt=0)
    """Prompts generated at once."""
    limit: int | None = Field(None, gt=0)
    """Evaluate on the first so many prompts only."""


class BehaviourTable(_Table):
    """A behaviour that the donor's adapter brings out."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=100)
    """Its name, used for folders."""
    openers: list[str] = Field(min_length=1)
    """How an answer that shows the behaviour begins; their first tokens give the log-odds."""
    grader: str
    """The grader of its score, by name (see `workbench.evaluate.graders`)."""
    grader_args: dict[str, Any] = {}
    """Arguments of the grader."""
    score_name: str = "rate"
    """What the score is called in tables."""
    adapter: str | None = None
    """The donor's adapter folder (ours, or a published pyreft one); unless given, it is trained on `demonstrations`."""
    allow_mismatch: bool = False
    """Take the adapter although it names another model than the donor, a copy under another path, say."""
    demonstrations: str | None = None
    """Prompts with responses: what the donor's adapter (unless given) and the native one are trained on."""
    validation: str
    """Neutral prompts for the forecast and every choice; never evaluated on."""
    evaluation: str
    """Neutral prompts for evaluation; used for nothing else."""
    validation_not: str | None = None
    """Prompts where the behaviour is not wanted, for the forecast off target."""
    evaluation_not: str | None = None
    """Prompts where the behaviour is not wanted, for over-triggering."""


class Job(_Table):
    """A transfer job: the whole of a job file."""

    name: str = Field("job", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=100)
    """The name of the run."""
    out: str = "runs"
    """The folder in which the run folder is made."""
    seed: int = Field(0, ge=0, lt=2**31)
    """The seed of everything that is random."""
    donor: ModelTable
    """The model an adapter was trained on."""
    recipient: ModelTable
    """The model that receives its effect."""
    profile: ProfileTable = ProfileTable()
    training: TrainingTable = TrainingTable()
    paste: PasteTable = PasteTable()
    evaluate: EvaluateTable = EvaluateTable()
    behaviours: list[BehaviourTable] = Field(min_length=1)

    @classmethod
    def load(cls, path: str | Path) -> Job:
        """Reads a job.toml. Raises UserError with one line: the key, what was given, what is allowed."""
        path = Path(path)
        try:
            data = read_toml(path, named=True)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
            raise UserError(f"{path} is not valid TOML: {err}") from err
        except (OSError, ValueError) as err:
            raise UserError(
                f"cannot read the job file {path}: {reason(err)}; give a job.toml, or bundled:demo"
            ) from err
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str = "job") -> Job:
        """Checks a mapping as `load` checks a file."""
        try:
            return cls.model_validate(data)
        except ValidationError as err:
            first = err.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            if first["type"] == "extra_forbidden":
                table = _table_at(first["loc"][:-1])
                raise UserError(
                    f"{source}: unknown key {where!r}; allowed here: {', '.join(table.model_fields)}"
                ) from err
            given = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
            said = first["msg"].removeprefix("Value error, ")
            said = said[:1].lower() + said[1:]
            raise UserError(f"{source}: {where}: {said}{given[:120]}; see docs/jobs.md") from err

    @property
    def folder(self) -> Path:
        return Path(self.out).expanduser() / self.name

    @property
    def text(self) -> str:
        """The job as the text of a job file, its defaults filled in."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def _table_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The table of the schema that a location in a job file lies in."""
    tables: dict[str, type[BaseModel]] = {
        "donor": ModelTable, "recipient": ModelTable, "profile": ProfileTable, "training": TrainingTable,
        "paste": PasteTable, "evaluate": EvaluateTable, "behaviours": BehaviourTable,
    }  # fmt: skip
    return tables[str(loc[0])] if loc else Job


def run_job(
    job: Job | str | Path | Mapping[str, Any], *, like: Iterable[str | Path] = (), engine: Engine | None = None
) -> Run:
    """Runs a transfer job to its end and returns its run folder, with metrics.json and report.html in it.

    Steps already done with the same inputs are reused, also those of other run folders, `like`: several recipients of one
    donor profile it, and train its adapters, once. With an `engine` of `workbench.engines.open_engine` its replicas of the
    two models make the profiles, the answers and the log-odds; adapters are trained, gradients taken and converters fitted
    here. What the run leaves is the same, the times apart; environment.json says who ran it.
    Raises UserError for anything in the job that cannot be done.

    >>> first = run_job("job.toml")  # doctest: +SKIP
    >>> run_job(open_job("job.toml", recipient="bundled:outsider"), like=[first.folder])  # doctest: +SKIP
    """
    from .job_checks import check_job
    from .replicas import noted
    from .report import write_report
    from .transfer import transfer

    if not isinstance(job, Job):
        job = Job.parse(job) if isinstance(job, Mapping) else Job.load(job)
    check_job(job)
    run = Run(job.folder, like)
    with run.alone(), run.logging(), failures_told("", run.folder):
        if not (run.folder / "job.toml").exists() or (run.folder / "job.toml").read_bytes() != job.text.encode():
            for stale in ("metrics.json", "report.html"):  # of another job: its results are not this one's
                (run.folder / stale).unlink(missing_ok=True)
        write_text(run.folder / "job.toml", job.text)
        metrics = transfer(job, run, engine)
        write_json(run.folder / "environment.json", {**metrics["environment"], **noted(engine)})
        write_json(run.folder / "metrics.json", metrics)
        write_report(run.folder)
    return run
