"""A run is judged again under other thresholds, and its command said again."""

from __future__ import annotations

import shlex
from dataclasses import asdict

import pandas as pd
import pytest
import torch

from probes.dictionaries import Dictionary
from probes.features import row_batches
from probes.transport_job import FLAGS, TransportJob, command_of, job_of
from probes.verdicts import FeatureVerdicts, Thresholds, feature_verdicts, judge, judge_frame
from workbench.cli_transport import transport
from workbench.errors import UserError
from workbench.maps.fit import fit_ridge


def some_verdicts(d: int = 12, n: int = 2000) -> FeatureVerdicts:
    """A feature a dimension: of y = x + noise that grows from feature to feature, half of them turned."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g)
    y = x.clone()
    y[:, : d // 2] = x[:, : d // 2] @ torch.linalg.qr(torch.randn(d // 2, d // 2, generator=g)).Q
    y += torch.linspace(0.02, 2, d) * torch.randn(n, d, generator=g)
    dictionary = Dictionary(torch.eye(d), torch.zeros(d), torch.eye(d), torch.zeros(d), "relu")
    operator, control = (fit_ridge(x, rows, alpha=0.01).map for rows in (y, y[torch.randperm(n, generator=g)]))
    return feature_verdicts(operator, dictionary, row_batches(x, y), control=control)


@pytest.mark.parametrize("limits", [Thresholds(), Thresholds(predicted=0.9), Thresholds(carried=0.9, count=990)])
def test_a_table_is_judged_as_the_figures_it_came_from(limits):
    found = some_verdicts()
    again = judge_frame(found.frame(), limits)
    assert tuple(again["verdict"]) == judge(found.operator, found.identity, found.control, limits).verdict
    assert again.attrs["thresholds"] == asdict(limits)
    assert len(set(again["verdict"])) > 1


def test_a_table_without_its_evidence_is_refused():
    with pytest.raises(UserError, match="no table of verdicts: it has no column control_r2, identity_carries, count"):
        judge_frame(pd.DataFrame({"r2": [0.5]}))


def test_the_command_of_a_job_has_every_option_that_is_not_the_default():
    job = TransportJob("my model", "p.txt", ("resid_post.0", "resid_post.1"), alpha=0.1, dictionaries=("a b", "x=y"),
                       pairs=("0:1",), causal="none", grid_only=True)  # fmt: skip
    words = shlex.split(command_of(job, "/out dir"))
    assert words[:7] == ["workbench", "transport", "my model", "--prompts", "p.txt", "--out", "/out dir"]
    assert words[7:] == ["--sites", "resid_post.0,resid_post.1", "--alpha", "0.1", "--dictionary", "a b", "--dictionary", "x=y",
                         "--pairs", "0:1", "--causal", "none", "--grid-only"]  # fmt: skip
    assert {flag.removeprefix("--").replace("-", "_") for flag in FLAGS.values()} < set(transport.__annotations__)


def test_a_job_is_read_back_from_its_toml():
    job = TransportJob("m", "p", ("resid_post.0",), folds=3)
    data = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(job).items()}
    assert job_of({**data, "of a later version": 1}) == job
    with pytest.raises(UserError, match="names no model and no prompts"):
        job_of({"model": "m"})
