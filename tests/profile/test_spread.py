"""Profiles spread over workers: the bytes of the store are those of one process, however many there are and whoever dies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workbench.engines import Engine
from workbench.errors import UserError
from workbench.models import Model, load
from workbench.profile import plan as plans
from workbench.profile import profile_model, run_blocks
from workbench.profile.pieces import piece_of, plan_of, settings_of
from workbench.profile.plan import make_plan
from workbench.profile.spread import spread_part

from ..conftest import make_model

PROMPTS = [" ".join(f"w{(7 * i + j) % 180}" for j in range(1 + i % 9)) for i in range(60)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of at most 30 rows, so that there are many."""
    monkeypatch.setattr(plans, "BLOCK_ROWS", 30)


@pytest.fixture
def whole(saved_model: Model, tmp_path: Path, small_blocks: None) -> Path:
    """What one process makes."""
    return profile_model(saved_model, PROMPTS, tmp_path / "one", tokens="all").path


@pytest.mark.parametrize(
    "options", [{"tokens": "all"}, {"tokens": "last:2"}, {"tokens": "all", "max_length": 6, "stride": 3}]
)
def test_a_block_alone_gives_the_rows_that_it_has_in_its_plan(options: dict, small_blocks: None):
    model = make_model("gpt2")
    plan = make_plan(model, PROMPTS, **options)
    assert len(plan.blocks) > 2
    for number, rows, _ in run_blocks(model, plan, range(len(plan.blocks))):
        alone = plan_of(piece_of(plan, number), settings_of(plan))
        _, again, _ = next(run_blocks(model, alone, [0]))
        assert rows.keys() == again.keys()
        assert all(torch.equal(rows[site], again[site]) for site in rows)


def test_a_model_without_weights_makes_the_same_plan(saved_model: Model, model_folder: Path):
    skeleton = load(model_folder, weights=False)
    assert skeleton.is_skeleton
    assert all(p.is_meta for p in skeleton.module.parameters())
    assert skeleton.fingerprint_id == saved_model.fingerprint_id
    assert make_plan(skeleton, PROMPTS, tokens="all").hash == make_plan(saved_model, PROMPTS, tokens="all").hash
    assert load(model_folder, weights=False, device="cuda").device.type == "cuda"


def test_parts_and_a_last_run_make_the_bytes_of_one(saved_model: Model, whole: Path, tmp_path: Path):
    out = tmp_path / "parts"
    plan = make_plan(saved_model, PROMPTS, tokens="all")
    assert spread_part(saved_model, plan, out, (0, 3), allow_nonfinite=False) >= 2
    assert spread_part(saved_model, plan, out, (2, 3), allow_nonfinite=False) >= 2
    assert not out.exists()
    profile_model(saved_model, PROMPTS, out, tokens="all")  # part 1 of 3 is computed here
    assert contents(out) == contents(whole)
    assert not (tmp_path / ".parts.partial").exists()


def test_a_value_that_is_not_finite_names_its_prompt(saved_model: Model, tmp_path: Path, small_blocks: None):
    broken = make_model("llama")
    with torch.no_grad():
        broken.module.get_input_embeddings().weight[20] = torch.inf
    plan = make_plan(broken, PROMPTS, tokens="all")
    with pytest.raises(UserError, match=r"resid_post\.0: .* NaN or infinite in float32, first in prompt '2'"):
        for part in range(2):
            spread_part(broken, plan, tmp_path / "x", (part, 2), allow_nonfinite=False)


@pytest.mark.xdist_group("ray")
class TestRay:
    def test_bytes_are_those_of_one_process(self, two_workers: Engine, model_folder: Path, whole: Path, tmp_path: Path):
        skeleton = load(model_folder, weights=False)
        profile_model(skeleton, PROMPTS, tmp_path / "ray", tokens="all", engine=two_workers)
        assert contents(tmp_path / "ray") == contents(whole)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "ray"]
