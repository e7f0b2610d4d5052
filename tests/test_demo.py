"""The demo holds what it promises: its numbers are the project's own regression test."""

import pytest

from workbench.job_options import open_job
from workbench.jobs import run_job
from workbench.summary import load_metrics


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    return load_metrics(run_job(open_job("bundled:demo", out=tmp_path_factory.mktemp("runs"))).folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reasoning", "refusal", "style"])
def test_the_demo_shows_what_it_says(metrics, name):
    found = metrics["behaviours"][name]
    arms, shares = found["arms"], found["control_share"]
    assert found["n"] >= 300
    assert set(arms) == {"donor_base", "donor_adapter", "base", "native", "paste", "pinv", "mean_delta",
                         "random_converter", "shuffled_pairs"}  # fmt: skip
    if name != "style":
        assert found["gain_share"]["rate"]["value"] >= 0.8
    for control in ("random_converter", "shuffled_pairs"):
        assert shares[control]["log_odds"]["value"] <= 0.15
        assert arms[control]["sigma_length"] == pytest.approx(arms["paste"]["sigma_length"], rel=1e-3)
    over = found["side_effects"]["over_trigger"]
    assert over["paste"]["value"] <= over["base"]["value"] + 0.05
    assert found["cost"]["ratio_flops"] >= 50  # the ratio of seconds is in metrics.json; a timing is not asserted
    assert found["forecast"]["spearman"] > 0.9
