"""Profiles spread over workers: the bytes of the store are those of one process, however many there are and whoever dies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.engines import Engine, LocalEngine
from workbench.errors import UserError
from workbench.models import Model, load
from workbench.profile import pieces, profile_model, run_blocks
from workbench.profile import plan as plans
from workbench.profile.pieces import piece_of, plan_of, settings_of, write_piece
from workbench.profile.plan import make_plan
from workbench.profile.spread import profile_to_url, spread_part
from workbench.store import Store, parts
from workbench.store.remote import fetch_store
from workbench.store.writer import StoreWriter

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
        spread_part(broken, plan, tmp_path / "x", (0, 1), allow_nonfinite=False)


def test_a_store_at_a_url_is_fetched_with_the_bytes_of_one(saved_model: Model, whole: Path, tmp_path: Path):
    url = (tmp_path / "far").as_uri()
    with pytest.raises(UserError, match=r"far: has no manifest.json: it is no store, or its profile is not finished"):
        fetch_store(url, tmp_path / "near")
    (tmp_path / "far" / "shards").mkdir(parents=True)
    (tmp_path / "far" / "shards" / "99999.safetensors").touch()  # of a larger profile that was stopped
    profile_to_url(saved_model, PROMPTS, url, tokens="all")
    assert contents(tmp_path / "far") == contents(whole)
    store = fetch_store(url, tmp_path / "near")
    store.verify()
    assert contents(tmp_path / "near") == contents(whole)
    with pytest.raises(UserError, match=r"exists already; choose another URL or pass overwrite=True"):
        profile_to_url(saved_model, PROMPTS, url, tokens="all")
    with pytest.raises(UserError, match=r"is at a URL.*`workbench stores fetch file://"):
        Store.open(url)


def test_a_profile_to_a_url_goes_on_where_it_was_stopped(
    saved_model: Model, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    url, asked = "memory://bucket/store", []

    def stopped(model: Model, piece: pieces.Piece, **options: Any) -> Any:
        asked.append(piece.number)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return write_piece(model, piece, **options)

    monkeypatch.setattr(pieces, "write_piece", stopped)
    with pytest.raises(KeyboardInterrupt):
        profile_to_url(saved_model, PROMPTS, url, tokens="all")
    profile_to_url(saved_model, PROMPTS, url, tokens="all")
    assert asked[:3] == [0, 1, 2]
    assert asked[3:] == list(range(2, len(asked) - 1))
    assert contents(fetch_store(url, whole.parent / "back").path) == contents(whole)


def test_what_was_damaged_at_a_url_is_not_fetched(saved_model: Model, whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "far")
    shard = sorted((tmp_path / "far" / "shards").iterdir())[2]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"shards/00002.safetensors is not what its manifest says"):
        fetch_store((tmp_path / "far").as_uri(), tmp_path / "near")
    assert not (tmp_path / "near").exists()
    shutil.copy(whole / "shards" / shard.name, shard)
    assert contents(fetch_store((tmp_path / "far").as_uri(), tmp_path / "near").path) == contents(whole)
    with pytest.raises(UserError, match=r"cannot reach nosuch://bucket/x.*give s3://, gs:// or file://"):
        fetch_store("nosuch://bucket/x", tmp_path / "other")


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "SEEN_WITHIN", 0.1)
    with pytest.raises(UserError, match=r"a worker on .* does not see .*a folder that all machines share"):
        parts.FolderParts(tmp_path / ".x.partial", "0" * 64).check("mark")


def test_a_plan_for_other_devices_than_the_workers_have_is_refused(model_folder: Path, saved_model: Model):
    class Far(LocalEngine):
        name, device = "ray", "map"

    with pytest.raises(
        UserError, match=r"the workers compute on cuda and the model was loaded on cpu; load it with weights"
    ):
        profile_model(saved_model, PROMPTS, engine=Far())


@pytest.mark.xdist_group("ray")
class TestRay:
    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_bytes_are_those_of_one_process(self, two_workers: Engine, model_folder: Path, whole: Path, tmp_path: Path,
                                            workers: int, monkeypatch: pytest.MonkeyPatch):  # fmt: skip
        monkeypatch.setattr(two_workers, "workers", workers)
        skeleton = load(model_folder, weights=False)
        profile_model(skeleton, PROMPTS, tmp_path / "ray", tokens="all", engine=two_workers)
        assert contents(tmp_path / "ray") == contents(whole)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "ray"]

    def test_sites_within_blocks_are_planned_without_weights(
        self, two_workers: Engine, model_folder: Path, saved_model: Model, tmp_path: Path
    ):
        options: dict[str, Any] = {"sites": ["mlp_act.1", "attn_out.0"], "tokens": "last"}
        one = profile_model(saved_model, PROMPTS, tmp_path / "one", **options)
        skeleton = load(model_folder, weights=False)
        profile_model(skeleton, PROMPTS, tmp_path / "ray", engine=two_workers, **options)
        assert contents(tmp_path / "ray") == contents(one.path)

    def test_lost_workers_and_a_stopped_driver_cost_no_byte(
        self, two_workers: Engine, saved_model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        marks, adopt, before = tmp_path / "marks", StoreWriter.adopt, two_workers.redone
        marks.mkdir()

        def dying(self: Any, model: Any, task: str, pieces: Any, *, common: Any, stop: Any) -> Any:
            return spread(
                model, "tests.engines.tasks:write_or_die", pieces, common={**common, "folder": str(marks)}, stop=stop
            )

        def stopped(self: StoreWriter, *args: Any) -> None:
            if len(self.blocks) == 5:
                raise KeyboardInterrupt
            adopt(self, *args)

        spread = two_workers.spread
        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "adopt", stopped)
            patch.setattr(type(two_workers), "spread", dying)
            with pytest.raises(KeyboardInterrupt):
                profile_model(saved_model, PROMPTS, tmp_path / "ray", tokens="all", engine=two_workers)
        assert two_workers.redone - before == 2
        profile_model(saved_model, PROMPTS, tmp_path / "ray", tokens="all", engine=two_workers)
        assert contents(tmp_path / "ray") == contents(whole)

    def test_workers_write_to_a_url(self, two_workers: Engine, model_folder: Path, whole: Path, tmp_path: Path):
        skeleton = load(model_folder, weights=False)
        profile_to_url(skeleton, PROMPTS, (tmp_path / "far").as_uri(), tokens="all", engine=two_workers)
        assert contents(tmp_path / "far") == contents(whole)
