"""The reference of the job file, docs/jobs.md: written from the tables of jobs.py, so that it cannot differ from them."""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .jobs import (
    BehaviourTable,
    EvaluateTable,
    Job,
    ModelTable,
    PasteTable,
    ProfileTable,
    TrainingTable,
)

TABLES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("[donor] and [recipient]", ModelTable),
    ("[profile]", ProfileTable),
    ("[training]", TrainingTable),
    ("[paste]", PasteTable),
    ("[evaluate]", EvaluateTable),
    ("[[behaviours]]", BehaviourTable),
)

INTRO = """\
# The job file

Written by `workbench job --reference` from the tables in `workbench/jobs.py`; do not edit it by hand.

A job file is TOML. `workbench run job.toml` runs it, `workbench job job.toml` checks it and prints it with every default
filled in; from Python it is `run_job("job.toml")`, or `run_job({...})` with the same keys. Unknown keys are refused.
Paths in it are taken from the folder that the command is run in. With `--recipient A --recipient B` it runs once for each, in
folders of their own (NAME-A, NAME-B), and the donor is profiled and its adapters are trained once; from Python it is
`run_job(job, like=[RUN])`, which takes over any step that another run made of the same inputs.

The smallest one:

```toml
[donor]
model = "bundled:donor"

[recipient]
model = "bundled:recipient"

[[behaviours]]
name = "refusal"
openers = ["sorry"]
grader = "refusal"
demonstrations = "bundled:demonstrations_refusal"
validation = "bundled:validation_refusal"
evaluation = "bundled:evaluation_refusal"
```

## Keys
"""

PROMPTS = """\
## Prompt sets

Where a key takes a prompt set, it takes `bundled:NAME`, `hub:owner/name[:config][@split]`, or a file: `.txt` (one prompt a
line), `.jsonl`, `.json`, `.csv`, `.parquet`. A row is a chat where it has `messages`, else a string of its column
`prompt`, `text`, `question` or `instruction`. `id` and `label` are kept; every other column goes to the prompt's `meta`,
where graders find `gold` and training finds `response`.

| prompt set | used for | used by |
|---|---|---|
| `profile.prompts` | fitting converters | both models |
| `demonstrations` | training adapters | donor's adapter, native |
| `validation`, `validation_not` | every choice of the paste, the forecast's check | recipient |
| `evaluation`, `evaluation_not` | measuring; nothing is chosen by them | both models |
"""

RUN_FOLDER = """\
## The run folder

`out/name/` holds:

| file | what |
|---|---|
| `job.toml` | the job, every default filled in |
| `profiles/donor/`, `profiles/recipient/` | the two stores |
| `adapters/BEHAVIOUR/ARM/` | the adapters: donor, native, paste, pinv, mean_delta |
| `answers/BEHAVIOUR.jsonl` | every answer of every arm |
| `steps/STEP.json` | each step's result and the hash of its inputs |
| `metrics.json`, `report.html` | the result, as data and as a page |
| `environment.json`, `log.txt` | versions, device, date; the log |

A step whose inputs have not changed is kept from an earlier run; where its artefacts are gone it is done again. A step
that fails leaves those before it usable: mend what it says and run the same command.

`metrics.json`, for each behaviour under `behaviours.NAME`:

| key | what |
|---|---|
| `n`, `score_name` | evaluation prompts; what the score is called |
| `arms.ARM` | `rate`, `log_odds`; `n`, `draws`, `graded_draws`, `mcnemar_vs_base`; the delta's `sigma_length` and `norm` |
| `gain_share`, `control_share.ARM` | gain over `base` as a share of native's: `rate`, `log_odds` |
| `side_effects` | `kl_neutral_text`, `perplexity`, `over_trigger`, `log_odds_elsewhere`, by arm |
| `forecast` | `candidates`, forecast and measured; `trials`, with `gain` and `damage`; `chosen`, `spearman`, `sign_agreement` |
| `converters` | held-out quality of each map beside its baselines |
| `dose` | log-odds against strength |
| `cost` | seconds and FLOPs of native training and of the paste, and their ratios |
| `examples` | the first answers of the arms |

Arms: `donor_base`, `donor_adapter`, `base` (the plain recipient), `native`, `paste`, `pinv` (as published), and the
controls `random_converter`, `shuffled_pairs`, `mean_delta`.
"""


def reference() -> str:
    """The text of docs/jobs.md."""
    parts = [INTRO, _section("Top level", Job)]
    parts += [_section(f"`{title}`", table) for title, table in TABLES]
    return "\n".join([*parts, _graders(), PROMPTS, RUN_FOLDER])


def _section(title: str, table: type[BaseModel]) -> str:
    lines = [f"### {title}", "", (table.__doc__ or "").strip().splitlines()[0], "", "| key | type | default | meaning |",
             "|---|---|---|---|"]  # fmt: skip
    for name, field in table.model_fields.items():
        if _is_table(field.annotation):
            continue
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_kind(field)} | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _is_table(annotation: Any) -> bool:
    inner = get_args(annotation) or (annotation,)
    return any(isinstance(a, type) and issubclass(a, BaseModel) for a in inner)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    return "" if field.default is None else f"`{json.dumps(field.default)}`"


def _kind(field: FieldInfo) -> str:
    limits = []
    for item in field.metadata:
        signs = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        limits += [f"{sign} {getattr(item, key)}" for key, sign in signs if getattr(item, key, None) is not None]
        if getattr(item, "min_length", None):
            limits.append(f"at least {item.min_length}")
        if getattr(item, "pattern", None):
            limits.append(f"matches `{item.pattern}`")
    return ", ".join([_type(field.annotation), *limits])


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(a)}`" for a in args)
    if origin in (Union, UnionType):
        return " or ".join(_type(a) for a in args if a is not NoneType)
    if origin is list:
        return f"list of {_type(args[0])}s"
    if origin is dict:
        return "table"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}[annotation]


def _graders() -> str:
    """The graders that a behaviour may name, with their arguments."""
    from inspect import Parameter, signature

    from .evaluate.graders import GRADERS

    lines = ["## Graders", "", "| grader | arguments | passes when |", "|---|---|---|"]
    for name, fn in sorted(GRADERS.items()):
        known = list(signature(fn).parameters.values())[2:]
        args = ", ".join(f"`{p.name}`" + (" (required)" if p.default is Parameter.empty else "") for p in known)
        says = " ".join((fn.__doc__ or "").strip().split("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {args} | {says} |")
    return "\n".join(lines) + "\n"
