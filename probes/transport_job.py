"""What a transport run is asked for, and whether it can be had: checked before the work."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from workbench.errors import UserError
from workbench.hashes import tensor_bytes
from workbench.maps.ridge import Choice
from workbench.tokens import check_tokens
from workbench.transport.positions import check_positions
from workbench.transport.sums import Split

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.prompts import PromptSet

    from .dictionaries import Dictionary


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
    """folders, or bundled:NAME; those that come with the model are always read"""
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


def check_job(prompts: PromptSet, job: TransportJob) -> None:
    """Raises UserError for tokens, positions and parts that there are not; `PairChoice.of` does so for pairs."""
    check_tokens(job.tokens)
    check_positions(job.positions)
    Split.of(len(prompts), folds=job.folds, shards=job.shards, holdout=job.holdout, seed=job.seed)


def dictionaries_of(model: Model, job: TransportJob) -> list[Dictionary]:
    """Those that a job names and those that come with its model; UserError for one of another site or width."""
    from .dictionaries import Dictionary

    if job.grid_only:
        return []
    names = list(job.dictionaries)
    if model.name == "bundled:recipient":
        names += [f"bundled:recipient.resid_post.{layer}" for layer in (1, 2, 3)]
    found = [Dictionary.load(name) for name in dict.fromkeys(names)]
    for name, one in zip(dict.fromkeys(names), found, strict=True):
        if one.site is None:
            raise UserError(f"dictionary {name} does not say which site it belongs to; its cfg.json needs a hook_name")
        if one.width != model.width_of(model.site(one.site)):
            raise UserError(f"dictionary {name} reads width {one.width}; {one.site} of {model.name} has width "
                            f"{model.width_of(model.site(one.site))}")  # fmt: skip
    return found


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of some tensors by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        for part in tensor_bytes(tensors[name]):
            digest.update(part)
    return digest.hexdigest()
