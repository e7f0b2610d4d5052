"""Sources by attention: those of a model whose attention is known, those counted by hand from the maps, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from workbench.anatomy.attention import attention_modules, attention_weights, eager_attention
from workbench.errors import UserError
from workbench.models import load
from workbench.prompts import PromptSet, encode
from workbench.sites import Site, text_config
from workbench.transport import transport_grid
from workbench.transport.routing import Route, attention_between, routing_notes
from workbench.transport.rows import ModelRows, Rows

from ..conftest import FAMILIES, LAYERS, make_model, make_module, word_tokenizer
from .routed_model import previous_token_model, word_prompts
from .streams import stream, write_stream

QUICK: dict[str, Any] = {"folds": 2, "shards": 4, "baselines": (), "alpha": 1e-6}
PROMPTS = [" ".join(f"w{(7 * i + 11 * j + i * j) % 170}" for j in range(3 + 5 * i % 9)) for i in range(14)]


def read(model: Any, prompts: Any, spans: list[tuple[int, int]], **options: Any) -> list[Rows]:
    return list(ModelRows(model, prompts, **options).read([Site(0), Site(LAYERS - 1)], spans))


def hooks_of(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_where_each_token_attends_to_the_one_before_routes_are_that_policy():
    model, prompts = previous_token_model(), word_prompts(60, 12)
    (rows,) = read(model, prompts, [(1, 2)])
    same_prompt = rows.prompt[1:] == rows.prompt[:-1]
    before = np.r_[-1, np.where(same_prompt, np.arange(len(rows.prompt) - 1), -1)]
    route = rows.routes[1, 2]
    at_start = rows.position == 0
    assert (route.source[1] == np.where(at_start, np.arange(len(before)), before)).all()
    # the second token attends to position 0 alone, so that without it, it has no source
    assert (route.source[0][rows.position > 1] == before[rows.position > 1]).all()
    assert (route.source[0][rows.position == 1] == -1).all()
    assert np.allclose(route.weight[rows.position > 1], 1)
    options = dict(pairs=[(0, 2)], products=torch.float64, control=False, with_bos=False, **QUICK)
    routed, previous = (transport_grid(model, prompts, positions=p, **options) for p in ("attention", "previous"))
    for name in ("r2_uniform", "r2_weighted", "r2_uniform_se", "n_train", "n_held_out"):
        assert routed.cell(0, 2)[name] == pytest.approx(previous.cell(0, 2)[name], abs=1e-12), name


def test_what_the_routed_token_alone_decides_is_carried_from_it_and_not_from_the_same_token():
    """attn_out of the last layer is a permutation of the content of the token before; words are independent, but that the
    first stands behind the same token in every prompt."""
    model, prompts, pair = previous_token_model(), word_prompts(150, 20), ("resid_pre.0", "attn_out.2")
    grids = {p: transport_grid(model, prompts, positions=p, pairs=[pair], **QUICK) for p in ("attention", "same")}
    routed, same = (grids[p].cell(*pair)["r2_weighted"] for p in ("attention", "same"))
    assert routed > 0.999
    assert abs(same) < 0.1
    control = grids["attention"].cell(*pair, arm="shuffled")
    assert abs(control["r2_weighted"]) < 3 * control["r2_weighted_se"] + 0.05
    assert grids["attention"].cell(*pair, bos=True)["r2_weighted"] > 0.999
    assert grids["attention"].meta["routing"]["resid_pre.0>attn_out.2"] == pytest.approx(
        {"itself": 0, "previous": 1, "distance": 1, "weight": 1}
    )
    assert "routing" not in grids["same"].meta


def by_hand(model: Any, ids: list[int], kept: np.ndarray, first: int, last: int) -> np.ndarray:
    """[2, kept]: of the kept tokens, the one with most mean weight, without the first and with it, from the maps that
    transformers itself returns for this prompt alone."""
    with torch.inference_mode(), eager_attention(model):
        maps = model.module(torch.tensor([ids]), output_attentions=True).attentions
    mean = torch.stack(maps[first : last + 1]).mean((0, 2))[0].numpy()[np.ix_(kept, kept)]
    return np.array([[skip + row[skip:].argmax() for row in mean] for skip in (1, 0)])


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"falcon"}))
def test_routes_are_counted_by_hand_from_the_maps_of_transformers(family):
    model, prompts = make_model(family), PromptSet.load(PROMPTS[:4])
    spans = [(1, 1), (1, 2), (2, 2)]
    (rows,) = read(model, prompts, spans)
    for span in spans:
        for number, ids in enumerate(encode(prompts, model.tokenizer)):
            mine = np.flatnonzero(rows.prompt == number)
            assert rows.position[mine[0]] == 0
            expected = by_hand(model, ids, rows.position[mine], *span)
            found = rows.routes[span].source[:, mine] - mine[0]
            assert (found[1] == expected[1]).all()
            assert (found[0, 1:] == expected[0, 1:]).all()
            assert (found <= np.arange(len(mine))).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_routes_depend_neither_on_the_batch_nor_on_its_padding(family):
    model = make_model(family)
    together, alone = (read(model, PROMPTS, [(1, 2)], batch_tokens=n)[0].routes[1, 2] for n in (8192, 1))
    assert (together.source == alone.source).all()
    assert np.allclose(together.weight, alone.weight, atol=1e-5)
    reversed_ = read(model, PROMPTS[::-1], [(1, 2)], batch_tokens=40)[0]
    rows = read(model, PROMPTS, [(1, 2)])[0]
    for i in range(len(PROMPTS)):
        mine, other = (np.flatnonzero(r.prompt == n) for r, n in ((rows, i), (reversed_, len(PROMPTS) - 1 - i)))
        assert (together.source[:, mine] - mine[0] == reversed_.routes[1, 2].source[:, other] - other[0]).all()


def test_sources_are_of_the_kept_tokens_alone():
    model = make_model("llama")
    (rows,) = read(model, PROMPTS, [(1, 2)], tokens="last:2")
    route = rows.routes[1, 2].source
    assert (rows.prompt[route] == rows.prompt).all()
    assert (rows.position[route] <= rows.position).all()
    kept = Route(np.array([[0, 0, 1], [0, 1, 2]]), np.ones(3, dtype=np.float32)).kept(np.array([True, False, True]))
    assert kept.source.tolist() == [[0, -1], [0, 1]]


def test_the_attention_and_the_hooks_are_put_back_also_after_an_error():
    model = make_model("llama")
    before = text_config(model.module)._attn_implementation
    assert before != "eager"
    hooks = hooks_of(model.module)
    source = ModelRows(model, PROMPTS)
    for _ in source.read([Site(0), Site(2)], [(1, 2)]):
        assert text_config(model.module)._attn_implementation == before  # between blocks it is itself
    ids = torch.arange(5, 11)[None]

    def fail(layer: int, weights: torch.Tensor) -> None:
        assert text_config(model.module)._attn_implementation == "eager"
        raise ZeroDivisionError

    with (pytest.raises(ZeroDivisionError), torch.inference_mode(),
          attention_weights(model, attention_modules(model, [0]), fail)):  # fmt: skip
        model.run(ids, torch.ones_like(ids))
    assert hooks_of(model.module) == hooks
    assert text_config(model.module)._attn_implementation == before


def test_a_wrapper_keeps_the_attention_of_its_other_parts():
    model = make_model("gemma3_wrapped")
    vision = model.module.config.vision_config._attn_implementation
    (rows,) = read(model, PROMPTS[:3], [(1, 2)])
    assert (rows.routes[1, 2].source[1] >= 0).all()
    assert model.module.config.vision_config._attn_implementation == vision
    assert model.module.config.text_config._attn_implementation == "sdpa"


def test_memory_that_runs_out_changes_no_route(monkeypatch):
    model = make_model("llama")
    whole = read(model, PROMPTS, [(1, 2)])[0].routes[1, 2]
    run = type(model).run

    def full(self: Any, ids: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        run(self, ids, *args, **kwargs)
        if ids.numel() > 40:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(type(model), "run", full)
    assert (read(model, PROMPTS, [(1, 2)])[0].routes[1, 2].source == whole.source).all()


def test_the_pairs_of_several_passes_are_those_of_one():
    model = make_model("gpt2")
    prompts = word_prompts(60, 10)
    options = dict(positions="attention", products=torch.float64, control=False, **QUICK)
    whole = transport_grid(model, prompts, **options)
    parted = transport_grid(model, prompts, memory=2_000_000, **options)
    assert whole.meta["passes"] == 1 < parted.meta["passes"]
    for a, b in whole.pairs:
        for bos in (False, True):
            one, other = (g.cell(a, b, bos=bos) for g in (whole, parted))
            assert one["r2_uniform"] == pytest.approx(other["r2_uniform"], abs=1e-9)
        assert whole.cell(a, b, bos=True)["n_train"] > whole.cell(a, b)["n_train"]
    assert whole.meta["routing"] == parted.meta["routing"]
    assert whole.meta["n_first"] == 60


def test_layers_between_two_sites():
    inside = ((Site(1, "attn_out"), Site(2, "attn_out"), (2, 2)), (Site(2, "resid_pre"), Site(2), (2, 2)))
    for a, b, span in (*inside, (Site(2), Site(5), (3, 5)), (Site(0), Site(3, "resid_pre"), (1, 2))):
        assert attention_between(a, b) == span
    for a, b in ((Site(1, "resid_mid"), Site(1)), (Site(0), Site(1, "resid_pre"))):
        with pytest.raises(UserError, match=f"no attention lies between {a} and {b}"):
            attention_between(a, b)


def test_pairs_that_are_hardly_routed_are_told():
    mostly = {"itself": 0.97, "previous": 0.0, "distance": 0.1, "weight": 0.5}
    (note,) = routing_notes(
        {"resid_post.0>resid_post.1": mostly, "resid_post.0>resid_post.2": {**mostly, "itself": 0.5}}
    )
    assert note.startswith("resid_post.0 to resid_post.1: attention takes 97 % of the tokens from themselves")


def test_a_store_has_no_weights(tmp_path):
    store = write_stream(tmp_path / "s", stream(400, layers=2), 10)
    with pytest.raises(UserError, match="a store has none: give the model and its prompts"):
        transport_grid(store, positions="attention")


def test_attention_that_gives_no_weights_is_told():
    prompts = word_prompts(40, 8)
    with pytest.raises(UserError, match=r"\(falcon\) gives no attention weights at layer 1, 2: it has no softmax"):
        transport_grid(make_model("falcon"), prompts, positions="attention", sites=[0, 2], **QUICK)
    module = make_module("falcon")
    eager = type(module)._from_config(replace_attention(module.config))
    eager.load_state_dict(module.state_dict())
    loaded = load(eager, tokenizer=word_tokenizer())
    assert attention_modules(loaded, [1, 2]).keys() == {1, 2}


def replace_attention(config: Any) -> Any:
    config._attn_implementation = "eager"
    return config


def test_other_backends_are_told():
    model = make_model("llama")
    with pytest.raises(UserError, match="loaded with backend='other': load it with backend='hooks'"):
        attention_modules(WithBackend(model), [0])


class WithBackend:
    """A model that claims another backend."""

    def __init__(self, model: Any) -> None:
        self.backend = type("Backend", (), {"name": "other"})()
        self.module = model.module
