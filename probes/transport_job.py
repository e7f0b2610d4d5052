"""What a transport run is asked for, and whether it can be had: checked before the work."""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from workbench.errors import UserError
from workbench.hashes import tensor_bytes
from workbench.maps.ridge import Choice
from workbench.sites import Site
from workbench.tokens import check_tokens
from workbench.transport.positions import check_positions
from workbench.transport.sums import Split

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.prompts import PromptSet

    from .dictionaries import Dictionary

log = logging.getLogger("workbench")
ALIASES = {"gpt2-small": "gpt2"}
"""names of TransformerLens for what Hugging Face calls otherwise"""


@dataclass(frozen=True)
class TransportJob:
    """What a run does: the command line and transport.toml."""

    model: str
    prompts: str
    sites: tuple[str, ...] = ()
    """every pair of these; none: of every resid_post"""
    tokens: str = "all"
    positions: str = "same"
    alpha: Choice = "cv"
    folds: int = 5
    shards: int = 10
    holdout: float = 0.25
    seed: int = 0
    dictionaries: tuple[str, ...] = ()
    """folders, files or bundled:NAME, or SITE=NAME; those that come with the model are read where these leave room"""
    text: str = ""
    """prompts of the causal figures, by name; empty: the held-out ones (of bundled:recipient: bundled:evaluation_text)"""
    pairs: tuple[str, ...] = ()
    """these pairs in place of all of some sites, such as 3:5"""
    causal: str = "auto"
    """pairs of the causal figures and the shortcuts: all, neighbours, none, or pairs such as 3:5,0:4; auto: all where
    they are few, else neighbours"""
    keep_maps: str = "needed"
    """which operators stay on disk: those that causal figures, shortcuts and features are made of, or all"""
    grid_only: bool = False
    """neither efficiency, features nor causal figures"""


def job_of(data: Mapping[str, Any]) -> TransportJob:
    """The job that a transport.toml holds; keys of other versions are left out. UserError where it lacks what is needed."""
    names = {field.name for field in fields(TransportJob)}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in names}
    if not {"model", "prompts"} <= set(given):
        raise UserError("this transport.toml names no model and no prompts; run the transport again")
    for field in fields(TransportJob):
        if field.name in given and not _fits(given[field.name], field.default):
            raise UserError(f"this transport.toml has {field.name} = {given[field.name]!r:.80}, which is of another kind; run "
                            "the transport again")  # fmt: skip
    return TransportJob(**given)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a default; that of `alpha` may be a number too."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if default == "cv":
        return isinstance(value, str | int | float)
    return isinstance(value, int | float if isinstance(default, float) else int if isinstance(default, int) else str)


FLAGS = {"sites": "--sites", "tokens": "--tokens", "positions": "--positions", "alpha": "--alpha", "folds": "--folds",
         "shards": "--shards", "holdout": "--holdout", "seed": "--seed", "dictionaries": "--dictionary", "text": "--text",
         "pairs": "--pairs", "causal": "--causal", "keep_maps": "--keep-maps"}  # fmt: skip


def command_of(job: TransportJob, out: str | Path) -> str:
    """The command that makes a run, for a shell: what is not the default, quoted where it must be.

    >>> print(command_of(TransportJob("gpt2", "my prompts.txt", causal="all", folds=4), "runs/t"))
    workbench transport gpt2 --prompts 'my prompts.txt' --out runs/t --folds 4 --causal all
    """
    words = ["workbench", "transport", job.model, "--prompts", job.prompts, "--out", str(out)]
    for field in fields(job):
        value = getattr(job, field.name)
        if field.name not in FLAGS or value == field.default:
            continue
        flag = FLAGS[field.name]
        if field.name == "dictionaries":
            words += [word for name in value for word in (flag, name)]
        else:
            words += [flag, ",".join(value) if isinstance(value, tuple | list) else str(value)]
    return shlex.join([*words, *(["--grid-only"] if job.grid_only else [])])


def check_job(prompts: PromptSet, job: TransportJob) -> None:
    """Raises UserError for tokens, positions and parts that there are not; `PairChoice.of` does so for pairs."""
    from workbench.prompts import PromptSet

    check_tokens(job.tokens)
    check_positions(job.positions)
    if job.text and not job.grid_only:
        PromptSet.load(job.text)  # a wrong name is told before the work
    Split.of(len(prompts), folds=job.folds, shards=job.shards, holdout=job.holdout, seed=job.seed)


def dictionaries_of(model: Model, job: TransportJob, targets: Collection[Site]) -> list[Dictionary]:
    """Those that a job names and, where it names none at their site, those that come with its model; site by site.

    A name is a folder, a file or bundled:NAME, or SITE=NAME where the files do not say a site or say a wrong one.
    Raises UserError for one without a site, at a site that no pair leads to, of another width, or at the site of another.
    """
    if job.grid_only:
        if job.dictionaries:
            raise UserError("dictionaries were given, and grid_only measures no features; leave one of the two out")
        return []
    found: dict[Site, tuple[str, Dictionary]] = {}
    for name in dict.fromkeys(job.dictionaries):
        site, one = _placed(model, name, targets)
        if site in found:
            raise UserError(f"dictionaries {found[site][0]} and {name} both belong to {site}; give one for each site")
        found[site] = name, one
    if model.name == "bundled:recipient":
        for layer in (1, 2, 3):
            if Site(layer) in targets and Site(layer) not in found:
                name = f"bundled:recipient.resid_post.{layer}"
                found[Site(layer)] = name, _placed(model, name, targets)[1]
    for name, one in found.values():
        for note in foreign(model, one):
            log.warning("dictionary %s: %s", name, note)
    return [one for _, one in found.values()]


def _placed(model: Model, name: str, targets: Collection[Site]) -> tuple[Site, Dictionary]:
    """A dictionary with the site of the grid that it reads."""
    from .dictionaries import Dictionary

    said, path = split_site(name)
    one = Dictionary.load(path)
    if said is None and one.site is None:
        hook = one.meta.get("hook_name")
        where = f"belongs to {hook}, which is no site here" if hook else "does not say which site it belongs to"
        raise UserError(f"dictionary {path} {where}; give the site before it, as in --dictionary resid_post.5={path}")
    try:
        site = model.site(said or one.site or "")
    except UserError as err:
        raise UserError(f"dictionary {path} does not belong to {model.name}: {err}") from err
    here = [target for target in targets if _place(target) == _place(site)]
    if not here:
        raise UserError(f"dictionary {path} belongs to {site}, to which no pair leads; targets: "
                        f"{', '.join(map(str, sorted(targets)))}")  # fmt: skip
    if one.width != model.width_of(site):
        raise UserError(f"dictionary {path} reads width {one.width}; {site} of {model.name} has width "
                        f"{model.width_of(site)}: use one that was trained on this model")  # fmt: skip
    return here[0], replace(one, site=str(here[0]))


def _place(site: Site) -> Site:
    """The same name for the same place: what goes into a block is what comes out of the one before it."""
    return Site(site.layer - 1) if site.point == "resid_pre" and site.layer else site


def split_site(name: str) -> tuple[Site | None, str]:
    """What SITE=NAME, or NAME alone, says.

    >>> split_site("resid_post.5=saes/a"), split_site("runs/lr=3/a")
    ((Site(layer=5, point='resid_post'), 'saes/a'), (None, 'runs/lr=3/a'))
    """
    site, sign, path = name.partition("=")
    try:
        return (Site.parse(site), path) if sign and path else (None, name)
    except UserError:
        return None, name


def foreign(model: Model, dictionary: Dictionary) -> list[str]:
    """One line where a dictionary names another model: names differ from place to place, so it is no error."""
    names = [name.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1].lower() for name in (dictionary.model, model.name)]
    if not names[0] or ALIASES.get(names[0], names[0]) == ALIASES.get(names[1], names[1]):
        return []
    return [f"the dictionary at {dictionary.site} says that it was trained on {dictionary.model}, and this is {model.name}: "
            "where these are not the same model its features mean nothing here"]  # fmt: skip


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of some tensors by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        for part in tensor_bytes(tensors[name]):
            digest.update(part)
    return digest.hexdigest()
