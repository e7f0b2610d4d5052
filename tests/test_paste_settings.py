"""Settings under which an adapter is tried, and the job that has them."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
import torch

from workbench.adapters.adapter import Adapter, LowRank, vector
from workbench.adapters.blend import Blend
from workbench.errors import UserError
from workbench.job_options import open_job
from workbench.job_start import write_job
from workbench.jobs import Job
from workbench.paste_settings import PasteSettings, job_of_settings
from workbench.sites import Site

METRICS = {"behaviours": {"style": {"forecast": {"chosen": {"strength": 1.5, "method": "ridge", "alpha": 0.03}}}}}


@pytest.fixture
def adapter() -> Adapter:
    part = LowRank(torch.ones(4, 1), torch.zeros(1), torch.ones(1, 4))
    return Adapter({Site(1): part, Site(2): part}, strength=2.0)


def test_settings_change_what_they_say_and_nothing_else(adapter):
    assert PasteSettings().of(adapter) is adapter
    assert PasteSettings(0.5).of(adapter) == adapter * 0.5
    assert PasteSettings(layers=(2,)).of(adapter) == adapter.only([2])
    assert PasteSettings(positions="all").of(adapter) == replace(adapter, positions="all")
    blend = PasteSettings(0.5, (1,), "generated", "linear:4").of(adapter)
    assert isinstance(blend, Blend)
    assert (blend.schedules, blend.adapters[0].strength, blend.sites) == (("linear:4",), 1.0, [Site(1)])


def test_settings_are_python_that_makes_them():
    for made in (PasteSettings(), PasteSettings(0.25, (1, 2), "all", "first:3")):
        assert eval(repr(made)) == made


def test_settings_that_cannot_be_are_refused(adapter):
    two = adapter + replace(adapter, positions="all", strength=1.0)
    for settings, given, message in (
        (PasteSettings(layers=(7,)), adapter, "edits layers"),
        (PasteSettings(positions="somewhere"), adapter, "unknown positions"),
        (PasteSettings(schedule="linear:4"), adapter, "hold none"),
        (PasteSettings(schedule="never"), adapter, "unknown schedule"),
        (PasteSettings(positions="prompt"), two, "acts differently at all and last"),
    ):
        with pytest.raises(UserError, match=message):
            settings.of(given)


def test_the_job_of_settings_is_the_finished_one_with_their_strength(tmp_path):
    job = open_job("bundled:demo")
    made = job_of_settings(job, METRICS, "style", PasteSettings(0.5), name="half", out=tmp_path, max_new_tokens=9)
    assert [b.name for b in made.behaviours] == ["style"]
    assert (made.paste.strength, made.paste.alphas, made.evaluate.max_new_tokens) == (0.75, [0.03], 9)
    assert made.folder == tmp_path / "half"
    assert made.donor == job.donor
    assert made.behaviours[0] == job.behaviours[2]
    path = write_job(made, tmp_path)
    assert path == tmp_path / "half.toml"
    assert Job.load(path) == made


def test_what_a_job_has_no_place_for_is_said():
    assert PasteSettings(0.5).not_in_a_job == []
    said = PasteSettings(1, (1,), "all", "first:3").not_in_a_job
    assert [line.split()[1].rstrip(":") for line in said] == ["layers", "positions", "schedule"]


def test_a_job_that_cannot_be_is_refused(tmp_path):
    job = open_job("bundled:demo")
    for behaviour, metrics, name, message in (
        ("other", METRICS, "a", "has no behaviour 'other'; it has reasoning"),
        ("style", {}, "a", "do not say which strength"),
        ("style", METRICS, "../a", "name: "),
        ("style", METRICS, "", "name: "),
        ("style", METRICS, "a/b", "name: "),
    ):
        with pytest.raises(UserError, match=message):
            job_of_settings(job, metrics, behaviour, PasteSettings(), name=name, out=tmp_path)


def test_converters_that_are_named_stay_named(tmp_path):
    job = open_job("bundled:demo")
    named = job.model_copy(update={"paste": job.paste.model_copy(update={"methods": ["pinv", "ridge:0.3"]})})
    made = job_of_settings(named, METRICS, "style", PasteSettings(), name="a", out=tmp_path)
    assert (made.paste.methods, made.paste.alphas) == (["pinv", "ridge:0.3"], job.paste.alphas)
    assert tomllib.loads(write_job(made, tmp_path).read_text())["paste"]["strength"] == 1.5


def test_a_vector_is_tried_as_any_adapter_is():
    a = vector(Site(0), torch.ones(3))
    assert PasteSettings(0).of(a).strength == 0
