"""Adapters as values: algebra, saving, refusals, and what `on` does to a model."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.adapters import ACTS, Adapter, LowRank, vector
from workbench.errors import UserError
from workbench.models import Model
from workbench.sites import Site


def part(d: int = 6, r: int = 2, seed: int = 0, act: str = "linear") -> LowRank:
    g = torch.Generator().manual_seed(seed)
    v, b, u = torch.randn(d, r, generator=g), torch.randn(r, generator=g), torch.randn(r, d, generator=g)
    return LowRank(v, b, u, act)


def adapter(**options) -> Adapter:
    return Adapter({Site(3): part(seed=1), Site(1): part(r=3)}, name="test", base={"name": "org/tiny"}, **options)


@pytest.mark.parametrize("act", list(ACTS))
def test_delta_is_the_formula(act):
    p, h = part(act=act), torch.randn(5, 4, 6)
    torch.testing.assert_close(p.delta(h), ACTS[act](h @ p.V + p.b) @ p.U)
    assert p.delta(h.bfloat16()).dtype == torch.bfloat16


def test_parts_add_on_the_same_state():
    a, b, h = part(), part(r=3, seed=1), torch.randn(4, 6)
    torch.testing.assert_close((a + b).delta(h), a.delta(h) + b.delta(h))
    torch.testing.assert_close((a * -2).delta(h), -2 * a.delta(h))
    assert (a + b).rank == 5
    assert a * 1 is a
    with pytest.raises(UserError, match="act linear and width 6, act relu"):
        a + part(act="relu")


def test_shapes_acts_and_widths_are_checked():
    with pytest.raises(UserError, match=r"\[6, 2\], \[3\], \[2, 6\]"):
        LowRank(torch.zeros(6, 2), torch.zeros(3), torch.zeros(2, 6))
    with pytest.raises(UserError, match="unknown act 'softmax'"):
        part(act="softmax")
    with pytest.raises(UserError, match="width 6; the states have width 5"):
        part().delta(torch.zeros(5))
    with pytest.raises(UserError, match="at least one part"):
        Adapter({})
    with pytest.raises(UserError, match="unknown positions 'middle'"):
        adapter(positions="middle")


def test_what_an_adapter_tells_of_itself():
    a = adapter()
    assert (a.layers, a.width, a.rank) == ([1, 3], 6, 3)
    assert list(a.parts) == [Site(1), Site(3)]
    assert a.only([3]).layers == [3]
    with pytest.raises(UserError, match=r"edits layers \[1, 3\]; asked for \[2\]"):
        a.only([2])
    with pytest.raises(UserError, match="does not edit"):
        a.delta(Site(2), torch.zeros(6))


def test_algebra():
    a, h = adapter(), torch.randn(4, 6)
    b = Adapter({Site(3): part(seed=7), Site(4): part(seed=8)}, strength=0.5)
    for site in (Site(1), Site(3), Site(4)):
        expected = sum(x.delta(site, h) for x in (a * 2, b) if site in x.parts)
        torch.testing.assert_close((a * 2 + b).delta(site, h), expected)
    torch.testing.assert_close((a - a).delta(Site(3), h), torch.zeros(4, 6))
    torch.testing.assert_close((-a).delta(Site(1), h), -a.delta(Site(1), h))
    assert a * 2 == 2 * a != a
    assert (a + b).base == {"name": "org/tiny"}
    with pytest.raises(UserError, match="org/tiny and org/other"):
        a + Adapter({Site(1): part()}, base={"name": "org/other"})


def test_adapters_for_different_positions_add_to_one_of_two_terms():
    first, last = adapter(positions="first:2", strength=2.0), adapter()
    both = first + last
    assert [term.positions for term in both.split()] == ["first:2", "last"]
    assert both == last + first != both * 2
    assert both.hash == (last + first).hash != (both * 2).hash != last.hash
    assert (both.sites, both.layers, both.width, both.rank) == ([Site(1), Site(3)], [1, 3], 6, 3)
    assert [term.rank for term in (both + last).split()] == [3, 6]  # what is at the same positions is joined
    assert ((both * 0.5).split()[0].strength, both.only([3]).layers) == (0.5, [3])
    h = torch.randn(4, 6)
    torch.testing.assert_close(both.split()[0].delta(Site(1), h), 2 * last.delta(Site(1), h))
    assert both.to(torch.bfloat16).split()[1].parts[Site(1)].V.dtype == torch.bfloat16
    assert "positions 'first:2', and" in repr(both)


def test_an_adapter_of_two_terms_never_passes_for_one():
    both = adapter(positions="first:2") + adapter()
    for use in (lambda: both.parts[Site(1)], lambda: list(both.parts), lambda: dict(both.parts.items()),
                lambda: Site(1) in both.parts, lambda: both.delta(Site(1), torch.zeros(6))):  # fmt: skip
        with pytest.raises(UserError, match="acts differently at first:2 and last; take one"):
            use()


def test_an_adapter_of_two_terms_is_saved(tmp_path):
    both = (adapter(positions="first:2") + adapter(positions="last:3")) * 0.5
    both.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    assert loaded == both
    assert (loaded.hash, loaded.name, loaded.base) == (both.hash, both.name, both.base)
    file = tmp_path / "a" / "adapter.json"
    header = json.loads(file.read_text())
    for terms, said in (
        ([], "terms must be a list of two objects or more"),
        ([header["terms"][0], 5], "terms must be a list of two objects or more"),
        ([header["terms"][0]] * 2, "sites|positions|missing"),
        ([header["terms"][0], header["terms"][1] | {"positions": "middle"}], "unknown positions 'middle'"),
    ):
        file.write_text(json.dumps(header | {"terms": terms}))
        with pytest.raises(UserError, match=said):
            Adapter.load(tmp_path / "a")


def test_two_terms_act_where_each_says_on_the_same_state(tiny):
    first, last = adapter(positions="first:2"), adapter(positions="last", strength=3.0)
    first, last = (Adapter(a.only([1]).parts, a.positions, a.strength) for a in (first, last))
    ids = torch.arange(3, 9)[None]
    with tiny.read([Site(1)]) as plain:
        tiny.logits(ids, torch.ones_like(ids))
    with (first + last).on(tiny), tiny.read([Site(1)]) as edited:
        tiny.logits(ids, torch.ones_like(ids))
    h = plain[Site(1)][0]
    expected = h.clone()
    expected[:2] += first.delta(Site(1), h[:2])
    expected[-1] += last.delta(Site(1), h[-1])
    torch.testing.assert_close(edited[Site(1)][0], expected)


@pytest.mark.parametrize("act", list(ACTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_of_the_write_side_is_one_more_rank(act, dtype):
    p, c, h = part(act=act).to(dtype), torch.randn(6, dtype=dtype), torch.randn(5, 6, dtype=dtype)
    torch.testing.assert_close(p.plus(c).delta(h), p.delta(h) + c)
    assert p.plus(c).rank == p.rank + 1
    assert p.constant() is None
    nothing = LowRank(torch.zeros(6, 2), p.b.float(), p.U.float(), act)
    torch.testing.assert_close(nothing.constant(), nothing.delta(torch.randn(6)))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e300, 10**400])
def test_a_strength_that_no_tensor_can_have_is_refused(strength):
    with pytest.raises(UserError, match="not a finite number"):
        adapter(strength=strength)


def test_a_strength_of_more_digits_than_an_integer_of_a_tensor_is_a_float():
    huge = adapter(strength=10**30)
    site = huge.sites[0]
    assert huge.delta(site, torch.ones(1, huge.width)).isfinite().all()


def test_steering_vector():
    v = torch.randn(6)
    a = vector(Site(2), v, positions="all", strength=3.0)
    torch.testing.assert_close(a.delta(Site(2), torch.randn(2, 6)), (3 * v).expand(2, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_equal(tmp_path, dtype):
    a = adapter(positions="first:2", strength=0.25, meta={"seed": 1}).to(dtype)
    a.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    assert loaded == a
    assert (loaded.name, dict(loaded.meta)) == ("test", {"seed": 1})
    with pytest.raises(UserError, match="exists already"):
        a.save(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither adapter\.json, nor adapter_config\.json, nor a pyreft"):
        Adapter.load(tmp_path)
    (tmp_path / "a.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="was refused"):
        Adapter.load(tmp_path / "a.pt")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"is not an adapter: give a folder, or a file that ends in \.gguf"):
        Adapter.load(tmp_path / "a.txt")
    adapter().save(tmp_path / "a")
    with pytest.raises(UserError, match="give the folder"):
        Adapter.load(tmp_path / "a" / "adapter.safetensors")
    with pytest.raises(UserError, match="says itself where it acts"):
        Adapter.load(tmp_path / "a", site=3)
    assert Adapter.load(tmp_path / "a", positions="all").positions == "all"
    (tmp_path / "a" / "adapter.safetensors").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        Adapter.load(tmp_path / "a")
    (tmp_path / "a" / "adapter.safetensors").unlink()
    with pytest.raises(UserError, match="does not exist"):
        Adapter.load(tmp_path / "a")
    (tmp_path / "a" / "adapter.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Adapter.load(tmp_path / "a")


DAMAGE = [
    ({"strength": "2"}, "strength must be a finite number, got '2'"),
    ({"strength": True}, "strength must be a finite number, got True"),
    ({"strength": float("nan")}, "strength must be a finite number, got nan"),
    ({"strength": float("-inf")}, "strength must be a finite number, got -inf"),
    ({"strength": 10**400}, "strength must be a finite number"),
    ({"base": None}, "base must be an object of strings, got None"),
    ({"base": {"name": None}}, "base must be an object of strings"),
    ({"base": ["org/tiny"]}, "base must be an object of strings"),
    ({"positions": 5}, "positions must be a string, got 5"),
    ({"positions": "middle"}, "unknown positions 'middle'"),
    ({"sites": []}, "sites must be an object"),
    ({"sites": {"resid_post.1": None}}, "sites must be an object"),
    ({"sites": {"resid_post.1": {"act": 5}}}, "sites must be an object"),
    ({"sites": {"resid_post.1": {"act": "softmax"}}}, "unknown act 'softmax'"),
    ({"sites": {"resid_post.2": {"act": "linear"}}}, "V, b, U of resid_post.2 is missing"),
    ({"sites": {}}, "at least one part"),
    ({"meta": [1]}, "meta must be an object"),
    ({"name": 5}, "name must be a string, got 5"),
]


@pytest.mark.parametrize(("change", "said"), DAMAGE)
def test_a_damaged_header_is_named_in_one_line(tmp_path, change, said):
    adapter().save(tmp_path / "a")
    file = tmp_path / "a" / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as caught:
        Adapter.load(tmp_path / "a")
    assert "is damaged: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "positions", "strength", "base", "meta", "sites"])
def test_a_header_without_an_entry_is_damaged(tmp_path, key):
    adapter().save(tmp_path / "a")
    file = tmp_path / "a" / "adapter.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
    with pytest.raises(UserError, match=rf"adapter\.json is damaged: {key} is missing"):
        Adapter.load(tmp_path / "a")


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b'{"strength": ' + b"9" * 5000 + b"}"])
def test_a_header_that_is_not_json_is_damaged(tmp_path, content):
    adapter().save(tmp_path / "a")
    (tmp_path / "a" / "adapter.json").write_bytes(content)
    with pytest.raises(UserError, match="is damaged: it cannot be read as JSON"):
        Adapter.load(tmp_path / "a")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_with_nan_or_infinity_are_refused(tmp_path, value, dtype):
    bad = part()
    bad.U[0, 2] = value
    Adapter({Site(1): bad.to(dtype)}).save(tmp_path / "a")
    with pytest.raises(UserError, match=r"is damaged: U of resid_post\.1 holds NaN or infinity"):
        Adapter.load(tmp_path / "a")


def test_a_folder_that_is_not_there_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="does not exist; give an adapter folder"):
        Adapter.load(tmp_path / "none")


class Tiny(Model):
    """A random Llama that says the output of every block."""

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        sites = [Site(layer) for layer in range(self.n_layers)]
        with torch.no_grad(), self.read(sites) as states:
            self.module(ids, attention_mask=mask, use_cache=False)
        return [states[site] for site in sites]

    def hooks(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.module.modules())


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=6, num_hidden_layers=5, num_attention_heads=1, num_key_value_heads=1, intermediate_size=8,
        vocab_size=11,
    )  # fmt: skip
    model = Tiny(LlamaForCausalLM(config), None, "org/tiny")
    model.fingerprint = {"name": "org/tiny", "weights": "abc"}
    return model


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.mark.parametrize("strength", [0.0, 1.0, -2.0])
def test_on_edits_the_named_positions_only(tiny, strength):
    a = adapter(strength=strength).only([1])
    clean = tiny(IDS, MASK)
    before = tiny.hooks()
    with a.on(tiny):
        edited = tiny(IDS, MASK)
    assert tiny.hooks() == before
    if strength == 0:
        assert all(torch.equal(x, y) for x, y in zip(edited, clean, strict=True))
        return
    for row, last in ((0, 3), (1, 2)):
        h = clean[1][row]
        torch.testing.assert_close(edited[1][row, last], h[last] + a.delta(Site(1), h[last]), rtol=1e-5, atol=1e-6)
        assert torch.equal(edited[1][row, :last], h[:last])


def test_on_refuses_models_that_it_does_not_fit(tiny):
    wide = Adapter({Site(1): part(d=8)})
    with pytest.raises(UserError, match=r"width 8 at resid_post\.1 and org/tiny has width 6"), wide.on(tiny):
        pass
    with pytest.raises(UserError, match="out of range"), Adapter({Site(9): part()}).on(tiny):
        pass
    other = Adapter({Site(1): part()}, base={"name": "org/other", "weights": "xyz"})
    with pytest.raises(UserError, match="belongs to org/other, not to org/tiny: weights xyz and abc differ"):
        with other.on(tiny):
            pass
    donors = {"base": {"name": "org/donor", "weights": "xyz"}}
    for foreign in (Adapter({Site(9): part()}, **donors), Adapter({Site(9): part(d=8)}, **donors)):
        with pytest.raises(UserError, match="belongs to org/donor"), foreign.on(tiny):
            pass
    with pytest.raises(UserError, match="has width 8"), Adapter({Site(9): part(d=8)}).on(tiny):
        pass
    with other.on(tiny, allow_mismatch=True):
        pass
    moved = Adapter({Site(1): part()}, base={"name": "elsewhere/copy", "weights": "abc"})
    with moved.on(tiny):
        pass


def test_no_hook_is_left_after_an_exception(tiny):
    before = tiny.hooks()
    with pytest.raises(RuntimeError, match="inside"), adapter().on(tiny):
        raise RuntimeError("inside")
    assert tiny.hooks() == before
