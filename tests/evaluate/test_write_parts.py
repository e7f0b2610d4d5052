"""Writes taken apart and blocks run together, on every family: what must be exact is, and every hook goes away."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_model
from workbench.errors import UserError
from workbench.evaluate.block_runs import KINDS, blocks_run
from workbench.evaluate.scoring import Sequences
from workbench.evaluate.write_parts import PARTS, WRITES, check_writes, split_write, without_part, write_sizes
from workbench.sites import Site

IDS = torch.arange(3, 23).view(2, 10)
MASK = torch.ones_like(IDS)
EVERY = MASK.bool()
PARALLEL = ("falcon", "gpt_neox")


def logits(model):
    with torch.inference_mode():
        return model.logits(IDS, MASK)


def seen(model, *sites):
    with torch.inference_mode(), model.read(list(sites)) as found:
        model.logits(IDS, MASK)
    return found


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def test_the_parts_add_up_and_are_orthogonal():
    g = torch.Generator().manual_seed(0)
    f, x = (torch.randn(50, 16, generator=g, dtype=torch.float64) for _ in range(2))
    along, rest = split_write(f, x)
    torch.testing.assert_close(along + rest, f, atol=1e-15, rtol=0)
    assert float((rest * x).sum(-1).abs().max()) < 1e-13
    torch.testing.assert_close(along, ((f * x).sum(-1) / x.square().sum(-1))[:, None] * x)
    nothing, whole = split_write(f, torch.zeros_like(x))
    assert not nothing.any()
    assert torch.equal(whole, f)
    assert split_write(f.half(), 300 * x.half())[0].dtype == torch.float32
    assert split_write(f.half(), 3000 * x.half())[0].isfinite().all()


def test_what_is_taken_away_is_that_part(family_model):
    """On every family: of the first write the part along the state, or all but that, and the block's output follows."""
    model, layer = family_model, 1
    points = [Site(layer, p) for p in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    pre, attn, mlp, post = (seen(model, *points)[site] for site in points)
    before = hooks(model)
    for part in PARTS[:2]:
        with without_part(model, layer, "attn", part, EVERY):
            found = seen(model, *points)
        along, rest = split_write(attn, pre)
        torch.testing.assert_close(found[points[1]], along if part == "orthogonal" else rest, atol=1e-4, rtol=1e-4)
        with without_part(model, layer, "mlp", part, EVERY):
            found = seen(model, *points)
        assert torch.equal(found[points[1]], attn)
        along, rest = split_write(mlp, pre if model.family in PARALLEL else pre + attn)
        torch.testing.assert_close(found[points[2]], along if part == "orthogonal" else rest, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[points[3]], pre + attn + found[points[2]], atol=1e-4, rtol=1e-4)
    assert hooks(model) == before
    assert torch.equal(seen(model, points[3])[points[3]], post)


def test_positions_that_are_not_kept_are_left_alone(small_model):
    keep = EVERY.clone()
    keep[:, 4:] = False
    keep[0] = False
    site = Site(1, "attn_out")
    plain = seen(small_model, site)[site]
    with without_part(small_model, 1, "attn", "orthogonal", keep):
        found = seen(small_model, site)[site]
    assert torch.equal(found[~keep], plain[~keep])
    assert not torch.allclose(found[keep], plain[keep])


def test_the_control_is_as_long_as_the_parallel_part(llama):
    points = [Site(1, p) for p in ("resid_pre", "attn_out")]
    x, f = (seen(llama, *points)[site] for site in points)
    with without_part(llama, 1, "attn", "control", EVERY, seed=3):
        found = seen(llama, points[1])[points[1]]
    along, _ = split_write(f, x)
    torch.testing.assert_close((f - found).norm(dim=-1), along.norm(dim=-1), atol=1e-4, rtol=1e-4)
    unit = torch.nn.functional.normalize(f - found, dim=-1).flatten(0, 1)
    torch.testing.assert_close(unit, unit[:1].expand_as(unit), atol=1e-3, rtol=0)


def test_a_run_of_one_block_is_exact(family_model):
    plain, before = logits(family_model), hooks(family_model)
    for start in range(family_model.n_layers):
        for kind in ("parallel", "stale"):
            with blocks_run(family_model, start, 1, kind):
                assert torch.equal(logits(family_model), plain)
    assert hooks(family_model) == before


def test_runs_are_what_their_formulas_say(family_model):
    """Against blocks that are called by hand: a state is written to a block's input, and what it makes of it is read."""
    model = family_model

    def writes(layer, x):
        with torch.inference_mode(), model.edit({Site(layer, "resid_pre"): lambda *_: x}), model.read(layer) as found:
            model.logits(IDS, MASK)
        return found[Site(layer)] - x

    x = seen(model, Site(0, "resid_pre"))[Site(0, "resid_pre")]
    first = x + writes(0, x)
    wanted = {"parallel": x + sum(writes(i, x) for i in range(3)), "skipped": x,
              "stale": first + writes(1, x) + writes(2, first)}  # fmt: skip
    for kind in KINDS:
        with blocks_run(model, 0, 3, kind):
            found = seen(model, Site(2))[Site(2)]
        torch.testing.assert_close(found, wanted[kind], atol=1e-3, rtol=1e-3)
    with blocks_run(model, 1, 2, "parallel"):
        parallel = logits(model)
    with blocks_run(model, 1, 2, "stale"):
        assert torch.equal(logits(model), parallel)


def test_all_is_as_it_was_after_an_error(llama):
    before, plain = hooks(llama), logits(llama)
    for context in (without_part(llama, 0, "block", "parallel", EVERY), blocks_run(llama, 0, 2, "stale")):
        with pytest.raises(RuntimeError, match="stop"), context:
            raise RuntimeError("stop")
    assert hooks(llama) == before
    assert torch.equal(logits(llama), plain)


def test_sizes_are_those_of_a_loop(small_model):
    sequences = Sequences.of(small_model, ["w1 w2 w3 w4", "w5 w6"])
    found = write_sizes(small_model, sequences, batch_size=2)
    for i, row in enumerate(sequences.ids):
        ids = torch.tensor([row])
        points = [Site(1, p) for p in ("resid_pre", "attn_out", "mlp_out")]
        with torch.inference_mode(), small_model.read(points) as states:
            small_model.logits(ids, torch.ones_like(ids))
        pre, attn, mlp = (states[site][0, 1:].double() for site in points)
        for write, f, x in (("attn", attn, pre), ("mlp", mlp, pre + attn)):
            cosine = (f * x).sum(1) / f.norm(dim=1) / x.norm(dim=1)
            wanted = {"size": f.norm(dim=1) / x.norm(dim=1), "cosine": cosine, "share": cosine.square()}
            for key, value in wanted.items():
                assert float(found[1, write, key][i]) == pytest.approx(float(value.sum()), rel=1e-4)
            along, _ = split_write(f, x)
            share = along.square().sum(1) / f.square().sum(1)
            torch.testing.assert_close(share, wanted["share"])


def test_what_has_no_meaning_is_refused(llama):
    with pytest.raises(UserError, match=r"block 0: .*post-norm.*add them to a residual stream"):
        check_writes(make_model("opt_post_norm"))
    llama.anatomy[1] = llama.anatomy[1].without(["attn_out"], "it was taken away")
    with pytest.raises(UserError, match="block 1: it was taken away; the geometry of writes"):
        check_writes(llama)


def test_refusals(gpt2):
    for context, message in (
        (without_part(gpt2, 0, "all", "parallel", EVERY), "no part 'parallel' of write 'all'; allowed: parallel, orthogonal"),
        (without_part(gpt2, 0, "attn", "rest", EVERY), "no part 'rest' of write 'attn'"),
        (blocks_run(gpt2, 2, 2, "stale"), "a run of 2 blocks from block 2 does not lie within blocks 0 to 2"),
        (blocks_run(gpt2, 0, 1, "fast"), "unknown kind of run 'fast'; allowed: parallel, stale, skipped"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message), context:
            pass
    assert WRITES == ("attn", "mlp", "block")
