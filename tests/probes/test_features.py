"""Per-feature figures against the released formula, firing against counts by hand, planted verdicts, intervals."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from probes.dictionaries import Dictionary
from probes.features import MEASURES, feature_metrics, measure_features, row_batches, store_batches
from probes.verdicts import FeatureVerdicts, Thresholds, feature_verdicts, judge
from tests.conftest import make_model
from workbench.errors import UserError
from workbench.maps import Moments, leave_out_shards
from workbench.maps.fit import fit_ridge
from workbench.maps.linear_map import LinearMap

D, F = 10, 24


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(kind: str = "jumprelu", f: int = F, d: int = D) -> Dictionary:
    w = draw(f, d, seed=1)
    extra = {"threshold": torch.full((f,), 2.0, dtype=torch.float64)} if kind == "jumprelu" else {"k": 5}
    b_enc = draw(f, seed=2)
    b_enc[3] = -1000.0  # a feature that never fires
    return Dictionary(w.T.contiguous(), b_enc, 3 * w, draw(d, seed=3), kind, **extra)


def rows(n: int = 700, d: int = D) -> tuple[Tensor, Tensor, LinearMap]:
    x = draw(n, d, seed=4)
    y = x @ draw(d, d, seed=5) + 0.7 * draw(n, d, seed=6) + 0.3
    return x, y, fit_ridge(x, y, alpha=1e-3, dtype=torch.float64).map


def released(t: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """The formulas of the released evaluation over one feature's active tokens, in float64."""
    sst = ((t - t.mean()) ** 2).sum()
    return {
        "r2": 1 - ((t - p) ** 2).sum() / sst,
        "mse": ((t - p) ** 2).mean(),
        "pearson": np.corrcoef(t, p)[0, 1],
        "calibration": (t * p).sum() / math.sqrt((t * t).sum() * (p * p).sum()),
    }


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_the_figures_are_the_released_ones(kind):
    d, (x, y, operator) = planted(kind), rows()
    found = feature_metrics(operator, d, row_batches(x, y, size=97))
    u = (d.W_dec / d.W_dec.norm(dim=1, keepdim=True)).numpy()
    truth, predicted = y.numpy() @ u.T, operator(x).numpy() @ u.T
    active = (d.encode(y) > 1e-6).numpy()
    for f in range(F):
        on = active[:, f]
        assert found.count[f] == on.sum()
        if f == 3:
            continue
        for suffix, mask in (("", on), ("_all", np.ones_like(on))):
            for name, wanted in released(truth[mask, f], predicted[mask, f]).items():
                assert abs(float(getattr(found, name + suffix)[f]) - wanted) < 1e-7, (f, name, suffix)


def test_a_feature_that_never_fires_has_no_figure():
    d, (x, y, operator) = planted(), rows()
    found = feature_metrics(operator, d, row_batches(x, y))
    assert found.count[3] == 0
    for name in ("r2", "mse", "pearson", "calibration", "recall", "f1"):
        assert getattr(found, name)[3].isnan(), name
    assert not found.r2_all[3].isnan()
    assert found.frame().loc[3, "count"] == 0


def test_firing_is_counted():
    """A hand-built JumpReLU dictionary: what fires where is known by eye."""
    d = Dictionary(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), "jumprelu", threshold=torch.ones(2))
    y = torch.tensor([[2.0, 0.5], [2.0, 1.5], [0.9, 1.5], [0.0, 1.0], [3.0, 0.0]])
    x = torch.tensor([[2.0, 1.5], [0.5, 1.5], [1.1, 1.5], [1.2, 0.0], [3.0, 0.0]])
    found = feature_metrics(LinearMap.identity(2), d, row_batches(x, y))
    assert found.count.tolist() == [3, 2]
    assert found.predicted_count.tolist() == [4, 3]
    assert found.precision.tolist() == pytest.approx([2 / 4, 2 / 3])
    assert found.recall.tolist() == pytest.approx([2 / 3, 1.0])
    assert found.f1.tolist() == pytest.approx([4 / 7, 4 / 5])


def test_batches_chosen_features_and_several_maps_change_nothing():
    d, (x, y, operator) = planted(), rows()
    groups = torch.arange(len(x)) // 7
    whole = feature_metrics(operator, d, row_batches(x, y, groups))
    arms = {"operator": operator, "identity": LinearMap.identity(D, torch.float64), "rank 2": operator.truncate(2)}
    some = measure_features(arms, d, row_batches(x, y, groups, size=13), features=[5, 2])
    for name in MEASURES:
        torch.testing.assert_close(
            getattr(some["operator"], name), getattr(whole, name)[[5, 2]], rtol=1e-9, atol=1e-12, equal_nan=True
        )
        torch.testing.assert_close(
            some["operator"].se[name], whole.se[name][[5, 2]], rtol=1e-6, atol=1e-9, equal_nan=True
        )
    assert some["operator"].features.tolist() == [5, 2]
    assert some["rank 2"].median("r2_all") < some["operator"].median("r2_all")
    exact = feature_metrics(LinearMap.identity(D, torch.float64), d, row_batches(y, y))
    fires = exact.count > 1
    torch.testing.assert_close(exact.r2[fires], torch.ones(int(fires.sum()), dtype=torch.float64))
    assert exact.f1[fires].eq(1).all()


def test_float32_rows_give_the_same_figures():
    d, (x, y, operator) = planted(), rows()
    exact = feature_metrics(operator, d, row_batches(x, y))
    single = feature_metrics(operator, d, row_batches(x.float(), y.float()))
    torch.testing.assert_close(single.r2_all, exact.r2_all, atol=1e-5, rtol=0)


def test_the_jackknife_is_that_of_whole_prompts():
    """Rows repeated within a prompt bring no precision; as rows of their own they would pretend to."""
    d, (x, y, operator) = planted(), rows(400)
    groups = torch.arange(400)
    once = feature_metrics(operator, d, row_batches(x, y, groups))
    often = [t.repeat_interleave(9, 0) for t in (x, y, groups)]
    same = feature_metrics(operator, d, row_batches(*often))
    pretended = feature_metrics(operator, d, row_batches(often[0], often[1]))
    torch.testing.assert_close(same.se["r2_all"], once.se["r2_all"], rtol=1e-6, atol=0)
    assert float((pretended.se["r2_all"] / once.se["r2_all"]).median()) < 0.6
    u = d.W_dec / d.W_dec.norm(dim=1, keepdim=True)
    squares = ((y - operator(x)) @ u.T).square()
    parts = [Moments().update({"e": squares[groups % 20 == shard]}) for shard in range(20)]
    torch.testing.assert_close(
        once.se["mse_all"], leave_out_shards(lambda m: m.mean("e"), parts).error, rtol=1e-6, atol=0
    )
    low, high = once.interval("r2_all")
    assert ((low < once.r2_all) & (once.r2_all < high)).all()
    assert feature_metrics(operator, d, row_batches(x, y, torch.zeros(400, dtype=torch.int64))).se["r2"].isnan().all()


def planted_features(n: int = 6000, each: int = 40) -> tuple[Tensor, Tensor, Dictionary, list[str]]:
    """Features on axes of their own: carried in place, carried from another axis, and an even function of the source."""
    x = draw(n, 3 * each, seed=7)
    noise = 0.3 * draw(n, 3 * each, seed=8)
    y = torch.empty_like(x)
    y[:, :each] = 1.5 * x[:, :each] + 0.5
    y[:, each : 2 * each] = x[:, :each].roll(1, 1) - x[:, 2 * each :].roll(3, 1)
    y[:, 2 * each :] = x[:, 2 * each :] ** 2 - 1
    turn = torch.linalg.qr(draw(3 * each, 3 * each, seed=9)).Q  # no axis of the residual stream is special
    x, y = x @ turn, (y + noise) @ turn
    # firing on both tails, so that the tokens where a feature fires are no narrow range of it
    d = Dictionary(torch.cat([turn.T, -turn.T], 1), torch.zeros(6 * each, dtype=torch.float64),
                   torch.cat([turn, -turn]), torch.zeros(3 * each, dtype=torch.float64), "relu")  # fmt: skip
    kinds = ["transported"] * each + ["rotated"] * each + ["synthesised"] * each
    return x, y, d, kinds * 2


def verdicts_of(thresholds: Thresholds | None = None) -> tuple[FeatureVerdicts, list[str]]:
    x, y, d, kinds = planted_features()
    train, test = slice(0, 4000), slice(4000, None)
    operator = fit_ridge(x[train], y[train], alpha=1e-3).map
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    control = fit_ridge(x[train], y[train][order], alpha=1e-3).map
    batches = row_batches(x[test], y[test])
    return feature_verdicts(operator, d, batches, control=control, thresholds=thresholds), kinds


@pytest.mark.parametrize("tokens", ["active", "all"])
def test_planted_features_are_told_apart(tokens):
    found, kinds = verdicts_of(Thresholds(tokens=tokens))
    right = [a == b for a, b in zip(found.verdict, kinds, strict=True)]
    assert np.mean(right) > 0.99
    frame = found.frame()
    assert set(frame.columns) >= {"verdict", "r2", "identity_carries", "identity_r2", "control_r2", "f1"}
    assert frame.attrs["thresholds"]["predicted"] == 0.5
    assert found.control is not None
    assert found.control.median("r2_all") < 0.05


def test_thresholds_are_arguments():
    found, kinds = verdicts_of()
    assert sum(found.counts.values()) == len(kinds)
    strict = judge(found.operator, found.identity, found.control, Thresholds(predicted=0.9999, unpredicted=0.05))
    assert strict.counts["transported"] == 0
    assert strict.counts["mixed"] > 0
    assert judge(found.operator, found.identity, None, Thresholds(count=10**6)).counts["rare"] == len(kinds)
    # what the control predicts as well is no evidence
    blind = judge(found.operator, found.identity, found.operator)
    assert blind.counts["synthesised"] == len(kinds)
    with pytest.raises(UserError, match="must not exceed predicted"):
        Thresholds(predicted=0.2, unpredicted=0.5)
    with pytest.raises(UserError, match="'active' or 'all'"):
        Thresholds(tokens="some")


def test_what_does_not_fit_is_told():
    d, (x, y, operator) = planted(), rows()
    with pytest.raises(UserError, match="maps to width 7, the dictionary reads width 10"):
        feature_metrics(LinearMap.zeros(D, 7), d, row_batches(x, y))
    with pytest.raises(UserError, match="features 0 to 23"):
        feature_metrics(operator, d, row_batches(x, y), features=[F])
    with pytest.raises(UserError, match="700 rows of x and 699 rows of y"):
        row_batches(x, y[1:])
    with pytest.raises(UserError, match="got 3 for 700 rows"):
        row_batches(x, y, [1, 2, 3])
    with pytest.raises(UserError, match="no rows"):
        feature_metrics(operator, d, iter([]))
    with pytest.raises(UserError, match="no operators"):
        measure_features({}, d, row_batches(x, y))
    with pytest.raises(UserError, match="widths must be equal; got 7 -> 10"):
        feature_verdicts(LinearMap.zeros(7, D), d, row_batches(x, y))
    with pytest.raises(UserError, match="shards must be at least 1"):
        feature_metrics(operator, d, row_batches(x, y), shards=0)


def test_rows_of_a_store(tmp_path):
    from workbench.profile import profile_model

    model = make_model("llama")
    store = profile_model(model, [f"w{i} w{i + 1} w{i + 2}" for i in range(12)], tmp_path / "s", tokens="all")
    x, y = store.read(0), store.read(1)
    d = planted("topk", d=model.width).to(torch.float32)
    operator = fit_ridge(x, y, alpha=0.1).map
    a = feature_metrics(operator, d, store_batches(store, 0, 1, size=7))
    b = feature_metrics(operator, d, row_batches(x, y, store.prompt_index))
    torch.testing.assert_close(a.r2_all, b.r2_all, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.se["r2_all"], b.se["r2_all"], atol=1e-5, rtol=1e-3)
    assert a.tokens == store.n_rows


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_refused(value):
    x, y, operator = rows(200)
    y[3, 4] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        feature_metrics(operator, planted(), row_batches(x, y))


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once, of each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.seen:
                self.seen[key] = tensor.untyped_storage().nbytes()
                self.now += self.seen[key]
                weakref.finalize(tensor.untyped_storage(), self.drop, key)
        self.most = max(self.most, self.now)
        return found

    def drop(self, key: int) -> None:
        self.now -= self.seen.pop(key)


def test_no_more_is_held_than_a_batch_needs(monkeypatch):
    """Bytes counted tensor by tensor: as many for 4,000 rows as for 1,000, and far from rows x features."""
    monkeypatch.setattr("probes.features.CELLS", 1 << 15)
    x, y, operator = rows(4000)
    most = []
    for n in (1000, 4000):
        batches = row_batches(x[:n], y[:n], torch.arange(n) // 7, size=500)
        with Held() as held:
            feature_metrics(operator, planted(f=512), batches, shards=3)
        most.append(held.most)
    assert most[1] < 1.1 * most[0] + 4000 * 8  # and the number of each row's prompt
    assert most[1] < 8 * 4000 * 512 / 5
