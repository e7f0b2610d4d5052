"""Published pyreft folders (acceptance checks A1 to A3 of the Command-V spec) and the other interventions of pyreft.

pyreft itself is not needed: its forward passes are written out below as small torch modules.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from workbench.adapters.adapter import Adapter, LowRank
from workbench.adapters.pyreft import NODIREFT, read, write
from workbench.errors import UserError
from workbench.sites import Site

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "fixtures" / "command-v-published" / "reft-adapters"
WIDTH, RANK = 24, 4


@pytest.fixture(scope="module")
def published() -> Path:
    folders = sorted(PUBLISHED.glob("*/*/*/*/*/*/config.json"))
    if not folders:
        pytest.skip("the published Command-V adapters are not beside the project (../shared/fixtures)")
    return folders[0].parent


def on_disk(folder: Path, layer: int) -> dict[str, Tensor]:
    return torch.load(folder / f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin", weights_only=True)


class Rotate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, RANK))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight


class Reft(nn.Module):
    """The interventions of pyreft that have a learned source and either a projection or a rotation."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("Nodireft", "Noreft"):
            self.proj_layer = nn.Linear(WIDTH, RANK)
        else:
            self.rotate_layer = orthogonal(Rotate())
            with torch.no_grad():
                self.rotate_layer.weight = torch.linalg.qr(torch.randn(WIDTH, RANK)).Q
        if kind in ("Consreft", "Lobireft"):
            self.learned_source = nn.Parameter(torch.rand(RANK))
        else:
            self.learned_source = nn.Linear(WIDTH, RANK)

    def forward(self, h: Tensor) -> Tensor:
        match self.kind:
            case "Nodireft":
                return h + self.learned_source(h) @ self.proj_layer.weight
            case "Noreft":
                return h + (self.learned_source(h) - self.proj_layer(h)) @ self.proj_layer.weight
            case "Loreft":
                return h + (self.learned_source(h) - self.rotate_layer(h)) @ self.rotate_layer.weight.T
            case "Direft":
                return h + self.learned_source(h) @ self.rotate_layer.weight.T
            case "Consreft":
                return h + (self.learned_source - self.rotate_layer(h)) @ self.rotate_layer.weight.T
            case "Lobireft":
                return h + self.learned_source @ self.rotate_layer.weight.T
        raise AssertionError(self.kind)

    def saved(self) -> dict[str, Tensor]:
        if self.kind == "Loreft":  # pyreft overrides state_dict here
            return {**self.learned_source.state_dict(), "rotate_layer": self.rotate_layer.weight.data}
        sizes = {"embed_dim": torch.tensor(WIDTH), "interchange_dim": torch.tensor(WIDTH)}
        return {**sizes, **self.state_dict()}


def folder_of(kind: str, path: Path, key: str = "layer_2_comp_block_output_unit_pos_nunit_1#0") -> Reft:
    torch.manual_seed(0)
    module = Reft(kind)
    path.mkdir()
    config = {
        "sorted_keys": [key],
        "intervention_types": [f"<class 'pyreft.interventions.{kind}Intervention'>"],
        "representations": [[2, "block_output", "pos", 1, RANK, *[None] * 9]],
    }
    (path / "config.json").write_text(json.dumps(config))
    torch.save(module.saved(), path / f"intkey_{key}.bin")
    return module


def test_a1_published_tensors_are_read_bit_for_bit(published):
    adapter = Adapter.load(published)
    assert adapter.layers == list(range(0, 36, 2))
    total = 0
    for site, part in adapter.parts.items():
        state = on_disk(published, site.layer)
        assert torch.equal(part.V.T, state["learned_source.weight"])
        assert torch.equal(part.b, state["learned_source.bias"])
        assert torch.equal(part.U, state["proj_layer.weight"])
        assert part.V.dtype == torch.bfloat16
        total += sum(t.numel() for key, t in state.items() if "." in key)
    assert total == 590_112
    assert (adapter.positions, adapter.rank, adapter.width) == ("last", 8, 2048)
    assert adapter.base == {"name": "Qwen/Qwen2.5-3B-Instruct"}
    first = (published / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin").read_bytes()
    assert hashlib.sha256(first).hexdigest().startswith("2a4533ef22fa9827")


def test_a1_folder_without_weights_says_so(published, tmp_path):
    for name in ("config.json", "training_metadata.json"):
        shutil.copy(published / name, tmp_path / name)
    with pytest.raises(UserError, match="weights missing"):
        Adapter.load(tmp_path)
    shutil.copy(next(published.glob("intkey_layer_4_*")), tmp_path)
    with pytest.raises(UserError, match=r"weights missing: .* has no intkey_layer_0_"):
        Adapter.load(tmp_path)


def test_a2_published_delta_is_the_reference_forward(published):
    torch.manual_seed(0)
    states = torch.randn(16, 2048) * 3
    for site, part in Adapter.load(published).parts.items():
        state = on_disk(published, site.layer)
        for dtype in (torch.bfloat16, torch.float32):
            h = states.to(dtype)
            source = nn.Linear(2048, 8, dtype=dtype)
            source.load_state_dict({k: state[f"learned_source.{k}"].to(dtype) for k in ("weight", "bias")})
            reference = h + torch.matmul(source(h), state["proj_layer.weight"].to(dtype))
            difference = float((h + part.delta(h) - reference).detach().abs().max())
            limit = 0.0 if dtype == torch.bfloat16 else 2e-7 * float(reference.detach().abs().max())
            assert difference <= limit, (site, dtype)


@pytest.mark.parametrize("kind", ["Nodireft", "Noreft", "Loreft", "Direft", "Consreft", "Lobireft"])
def test_a2_every_intervention_is_its_forward(kind, tmp_path):
    module = folder_of(kind, tmp_path / "x")
    part = Adapter.load(tmp_path / "x").parts[Site(2)]
    h = torch.randn(16, WIDTH)
    with torch.no_grad():
        reference = module(h)
    scale = max(1.0, float(reference.abs().max()), float((h @ part.V).abs().max()))
    assert float((h + part.delta(h) - reference).abs().max()) <= 5e-7 * scale
    exact = (h.double() + part.delta(h.double()) - module.double()(h.double())).detach().abs().max()
    assert float(exact) <= 2e-6 * scale


def test_a3_projection_bias_changes_nothing(published, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(published, copy)
    file = copy / "intkey_layer_8_comp_block_output_unit_pos_nunit_1#0.bin"
    state = torch.load(file, weights_only=True)
    state["proj_layer.bias"] = state["proj_layer.bias"] + 100
    copy.chmod(0o755)
    file.chmod(0o644)
    torch.save(state, file)
    assert Adapter.load(copy) == Adapter.load(published)


@pytest.mark.parametrize(("in_config", "in_file"), [("_", "."), (".", "_"), (".", ".")])
def test_a3_keys_with_dots_and_with_underscores(tmp_path, in_config, in_file):
    folder_of("Nodireft", tmp_path / "a")
    expected = Adapter.load(tmp_path / "a")
    key = "layer_2_comp_block!output_unit_pos_nunit_1#0"
    spelled = {sep: key.replace("_", sep).replace("!", "_") for sep in "_."}
    folder = tmp_path / "a"
    next(folder.glob("intkey_*")).rename(folder / f"intkey_{spelled[in_file]}.bin")
    config = json.loads((folder / "config.json").read_text()) | {"sorted_keys": [spelled[in_config]]}
    (folder / "config.json").write_text(json.dumps(config))
    assert Adapter.load(folder) == expected


def test_a3_what_is_written_has_the_published_form(published, tmp_path):
    adapter = read(published)
    write(adapter, tmp_path / "out")
    for name in ("config.json", "training_metadata.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((published / name).read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in published.iterdir()}
    for layer in adapter.layers:
        mine, theirs = on_disk(tmp_path / "out", layer), on_disk(published, layer)
        assert list(mine) == list(theirs)
        for key, tensor in theirs.items():
            assert (mine[key].shape, mine[key].dtype) == (tensor.shape, tensor.dtype)
            assert key == "proj_layer.bias" or torch.equal(mine[key], tensor)
    assert Adapter.load(tmp_path / "out") == adapter


def test_writing_takes_the_strength_along(tmp_path):
    part = LowRank(torch.randn(8, 2), torch.randn(2), torch.randn(2, 8))
    adapter = Adapter({Site(0): part, Site(3, "mlp_out"): part}, positions="first:3", strength=0.5)
    write(adapter, tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    assert loaded.positions == "first:3"
    assert loaded.strength == 1
    assert loaded.parts[Site(3, "mlp_out")] == part * 0.5
    assert json.loads((tmp_path / "a" / "config.json").read_text())["intervention_types"] == [NODIREFT] * 2


def test_what_pyreft_cannot_say_is_refused(tmp_path):
    part = LowRank(torch.randn(8, 2), torch.randn(2), torch.randn(2, 8))
    with pytest.raises(UserError, match="act relu"):
        write(Adapter({Site(0): LowRank(part.V, part.b, part.U, "relu")}), tmp_path / "a")
    with pytest.raises(UserError, match="cannot say positions 'all'"):
        write(Adapter({Site(0): part}, positions="all"), tmp_path / "a")
    with pytest.raises(UserError, match=r"resid_mid\.0"):
        write(Adapter({Site(0, "resid_mid"): part}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_files_that_are_not_plain_tensors_are_refused(tmp_path, capsys):
    folder_of("Nodireft", tmp_path / "a")
    file = next((tmp_path / "a").glob("intkey_*"))
    for data in (pickle.dumps(Evil(), protocol=2), b"", b"not an archive"):
        file.write_bytes(data)
        with pytest.raises(UserError, match="was refused"):
            Adapter.load(tmp_path / "a")
    torch.save({"x": Evil()}, file)
    with pytest.raises(UserError, match="was refused"):
        Adapter.load(tmp_path / "a")
    assert "ran" not in capsys.readouterr().out


def test_unknown_kinds_positions_and_second_edits_are_refused(tmp_path):
    folder_of("Nodireft", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    changes = {
        "adapters that are read": {"intervention_types": ["<class 'pyreft.interventions.OtherIntervention'>"]},
        "holds .* is missing": {"intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"]},
        "cannot read the pyreft key": {"sorted_keys": ["layer_2_comp_head_output_unit_pos_nunit_1#0"]},
        "is not a pyreft config": {"sorted_keys": []},
    }
    for message, change in changes.items():
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            Adapter.load(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    metadata = tmp_path / "a" / "training_metadata.json"
    for positions in ("x1", "f1l1", "l1+f1", "f0", "+", "", "f1+"):
        metadata.write_text(json.dumps({"positions": positions}))
        with pytest.raises(UserError, match="are not read; allowed: f1"):
            Adapter.load(tmp_path / "a")
    metadata.write_text('{"positions": "f1+l1"}')
    with pytest.raises(UserError, match="does not say whether first and last positions share them"):
        Adapter.load(tmp_path / "a")
    metadata.write_text('{"positions": "f1+l1", "share_weight": 1}')
    with pytest.raises(UserError, match="share_weight must be true or false, got 1"):
        Adapter.load(tmp_path / "a")
    metadata.write_text('{"positions": "f2+l1", "share_weight": true}')
    assert Adapter.load(tmp_path / "a").positions == "first:2+last"


def both_ends(seed: int = 0) -> Adapter:
    """Two sites, other parts at the first positions than at the last."""
    g = torch.Generator().manual_seed(seed)

    def parts() -> dict[Site, LowRank]:
        return {Site(l): LowRank(torch.randn(WIDTH, RANK, generator=g), torch.randn(RANK, generator=g),
                                 torch.randn(RANK, WIDTH, generator=g)) for l in (1, 3)}  # fmt: skip

    return Adapter(parts(), "first:3") + Adapter(parts(), "last:2")


def test_two_units_at_a_layer_are_two_terms(tmp_path):
    adapter = both_ends()
    write(adapter, tmp_path / "a")
    assert read(tmp_path / "a") == adapter
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    # pyreft gives the first half of the keys the first positions, in this order
    assert [key[-2:] for key in config["sorted_keys"]] == ["#0", "#0", "#1", "#1"]
    training = json.loads((tmp_path / "a" / "training_metadata.json").read_text())
    assert (training["positions"], training["share_weight"]) == ("f3+l2", False)
    write(adapter.split()[0] * 2, tmp_path / "b")
    assert read(tmp_path / "b").positions == "first:3"
    shared = Adapter(adapter.split()[0].parts, "first:1+last")
    write(shared, tmp_path / "c")
    assert read(tmp_path / "c") == shared
    with pytest.raises(UserError, match="half of its interventions"):
        write(adapter.split()[0] + adapter.split()[1].only([3]), tmp_path / "d")


def test_kinds_belong_to_units(tmp_path):
    module = folder_of("Loreft", tmp_path / "a")
    folder = tmp_path / "a"
    other = folder_of("Direft", tmp_path / "b")
    key = "layer_2_comp_block_output_unit_pos_nunit_1#"
    torch.save(other.saved(), folder / f"intkey_{key}1.bin")
    config = json.loads((folder / "config.json").read_text())
    config["sorted_keys"] = [key + "0", key + "1"]
    config["intervention_types"] += [f"<class 'pyreft.interventions.{other.kind}Intervention'>"]
    config["representations"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "training_metadata.json").write_text('{"positions": "f1+l1"}')
    h = torch.randn(5, WIDTH)
    for term, intervention in zip(Adapter.load(folder).split(), (module, other), strict=True):
        torch.testing.assert_close(h + term.delta(Site(2), h), intervention(h).detach(), atol=1e-4, rtol=1e-4)
    (folder / "training_metadata.json").write_text('{"positions": "l1"}')
    with pytest.raises(UserError, match="twice at positions last, the second on what the first made"):
        Adapter.load(folder)


KINDS = ["Nodireft", "Noreft", "Loreft", "Direft", "Consreft", "Lobireft"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_pyreft_itself_saves_is_what_it_computes(kind, tmp_path):
    pyreft = pytest.importorskip("pyreft", reason="pyreft is not installed; the formulas are written out above")
    torch.manual_seed(0)
    # LoReFT saves no more than its rotation, DiReFT and its kin a parametrization: both are read
    made = getattr(pyreft.interventions, f"{kind}Intervention")(
        embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float32, add_bias=True)  # fmt: skip
    made.eval()
    folder_of("Nodireft", tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace("NodireftIntervention", f"{kind}Intervention"))
    torch.save(made.state_dict(), next((tmp_path / "a").glob("intkey_*")))
    part, h = Adapter.load(tmp_path / "a").parts[Site(2)], torch.randn(16, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(h + part.delta(h), made(h), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("at", ["l1", "f1+l1"])
def test_a3_pyreft_opens_what_is_written_and_gives_the_same_outputs(at, tmp_path, monkeypatch):
    pyreft = pytest.importorskip("pyreft", reason="pyreft is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    from workbench.models import Model

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    whole = both_ends() * 0.3
    adapter = whole if at == "f1+l1" else Adapter(whole.split()[0].parts, "last", 0.3)
    write(adapter, tmp_path / "a")
    intervention = pyreft.interventions.NodireftIntervention

    class Told(intervention):  # pyreft takes these two from its training script, and saves neither
        def __init__(self, **kwargs):
            super().__init__(**{**kwargs, "add_bias": True, "dtype": torch.float32})

    monkeypatch.setattr(pyreft.interventions, "NodireftIntervention", Told)
    opened = pyreft.ReftModel.load(str(tmp_path / "a"), module)
    ids = torch.arange(3, 13)[None]
    n = len(opened.interventions)
    places = [[0, 1, 2], [8, 9]] if at == "f1+l1" else [[9]]
    # pyreft wants lists of one length: it fills the shorter with a place behind the prompt, a pad token
    if at == "f1+l1":
        padded = torch.cat([ids, torch.zeros(1, 1, dtype=ids.dtype)], 1)
        rows = [places[0]] * (n // 2) + [[*places[1], 10]] * (n // 2)
    else:
        padded, rows = ids, [places[0]] * n
    _, theirs = opened({"input_ids": padded}, unit_locations={"sources->base": (None, [[row] for row in rows])})
    model = Model(LlamaForCausalLM(config).eval(), None, "tiny")
    model.module.load_state_dict(module.state_dict())
    with adapter.on(model):
        ours = model.logits(ids, torch.ones_like(ids))
    torch.testing.assert_close(ours, theirs.logits[:, :10], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"sorted_keys": 5}, "sorted_keys must be a list of strings, got 5"),
        ("config.json", {"sorted_keys": [5]}, "sorted_keys must be a list of strings"),
        ("config.json", {"intervention_types": [5]}, "intervention_types must be a list of strings"),
        ("config.json", {"intervention_types": "x"}, "intervention_types must be a list of strings"),
        ("config.json", {"intervention_types": {}}, "is not a pyreft config"),
        ("config.json", {"representations": 5}, "one list in representations for each"),
        ("config.json", {"representations": [[[2], "block_output"]]}, "one list in representations for each"),
        ("config.json", {"representations": [[2, {}]]}, "one list in representations for each"),
        ("training_metadata.json", {"positions": 5}, "positions must be a string, got 5"),
        ("training_metadata.json", {"positions": None}, "positions must be a string, got None"),
        ("training_metadata.json", {"model_name": ["x"]}, "model_name must be a string"),
        ("training_metadata.json", {"dataset_name": 5}, "dataset_name must be a string"),
    ],
)
def test_entries_of_another_type_are_named_in_one_line(tmp_path, file, change, said):
    folder_of("Nodireft", tmp_path / "a")
    path = tmp_path / "a" / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    with pytest.raises(UserError) as caught:
        Adapter.load(tmp_path / "a")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "training_metadata.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe{}", "damaged: it cannot be read as JSON"), (b"[1]", "not a JSON object"),
     (b"[" * 100_000, "damaged: it cannot be read as JSON")],
)  # fmt: skip
def test_files_that_are_not_json_objects_are_refused(tmp_path, name, content, said):
    folder_of("Nodireft", tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        Adapter.load(tmp_path / "a")


def test_damaged_tensors_are_refused(tmp_path):
    folder_of("Nodireft", tmp_path / "a")
    file = next((tmp_path / "a").glob("intkey_*"))
    state = torch.load(file, weights_only=True)
    torch.save({**state, "learned_source.bias": state["learned_source.bias"] * float("nan")}, file)
    with pytest.raises(UserError, match=r"is damaged: b of layer_2_.* holds NaN"):
        Adapter.load(tmp_path / "a")
    torch.save({**state, "proj_layer.weight": torch.zeros(RANK + 1, WIDTH)}, file)
    with pytest.raises(UserError, match="its tensors do not fit together"):
        Adapter.load(tmp_path / "a")
    torch.save(state, file)
    with pytest.raises(UserError, match="unknown act 'softmax'"):
        read(tmp_path / "a", act="softmax")
