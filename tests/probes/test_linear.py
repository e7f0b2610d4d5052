"""Probes find what was planted, stay at chance where nothing was, and refuse what cannot be learned in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from probes.held_out_scores import class_scores
from probes.labels import label_columns, labels_of
from probes.linear import train_probes
from probes.probe import Probe
from probes.probe_transfer import probe_score, transfer_probe
from probes.solvers import KINDS, OF_QUANTITIES, Solver
from probes.splits import held_out, rows_at
from workbench.errors import UserError
from workbench.maps.linear_map import LinearMap
from workbench.sites import Site

from .labelled import planted, write_labelled


def two(tmp_path, n=400, d=12, **options):
    """A store whose label moves the rows of its second class along a direction, at layer 1 only."""
    x, y, directions = planted(n, d, **options)
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(99))
    return write_labelled(
        tmp_path / "s", {Site(0): noise, Site(1): x}, label=[("no", "yes")[i] for i in y]
    ), directions[1]


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_planted_direction_is_found_and_noise_is_not(kind, tmp_path):
    store, direction = two(tmp_path, n=3000, d=8, gap=3.0)
    curve = train_probes(store, "label", kind=kind)
    noise, found = curve.lines
    assert cosine(found.probe.direction("yes"), direction) > 0.99
    assert found.probe.direction("no").tolist() == (-found.probe.direction("yes")).tolist()
    # two Gaussians 3 apart: the best rule is right in 93.3 %
    assert abs(found.score.accuracy.value - 0.933) < 0.03
    assert found.score.ece < 0.05
    assert abs(noise.score.auroc.value - 0.5) < 0.06
    assert abs(found.control.accuracy.value - 0.5) < 0.06
    assert found.shuffled.accuracy.value < 0.65
    assert found.selectivity.low > 0.3
    assert curve.best is found
    assert abs(found.probe.gap("yes") - 3.0) < 0.3


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_several_classes_are_told_apart(kind, tmp_path):
    x, y, directions = planted(2000, 10, gap=4.0, classes=4)
    store = write_labelled(tmp_path / "s", {Site(0): x}, label=[f"c{i}" for i in y])
    (line,) = train_probes(store, "label", kind=kind, controls=()).lines
    assert line.score.accuracy.value > 0.95
    assert line.score.auroc.value > 0.99
    assert line.score.confusion.sum() == line.score.n == sum(count for _, _, count in line.score.reliability)
    for i in range(4):
        other = directions[[j for j in range(4) if j != i]].mean(0)
        assert cosine(line.probe.direction(f"c{i}"), directions[i] - other) > (0.95 if kind == "sparse" else 0.98)


@pytest.mark.parametrize("kind", OF_QUANTITIES)
def test_a_quantity_is_predicted(kind, tmp_path):
    x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([1.0, -2.0, 0.0, 0.0, 0.5, 0.0])
    truth = x @ w + 0.5 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    store = write_labelled(tmp_path / "s", {Site(0): x})
    curve = train_probes(store, truth, kind=kind, penalty=1e-3)
    (line,) = curve.lines
    assert curve.classes == ()
    assert cosine(line.probe.direction(), w) > 0.99
    assert line.score.r2.low < 5.25 / 5.5 < line.score.r2.high
    assert line.control.r2.high < 0.1
    with pytest.raises(UserError, match="gives no probabilities; use score"):
        line.probe.probabilities(x)


def test_a_prompt_on_both_sides_gives_a_false_score_that_the_split_avoids(tmp_path):
    g = torch.Generator().manual_seed(0)
    n_prompts, each, d = 60, 10, 40
    prompt = [i // each for i in range(n_prompts * each)]
    own = torch.randn(n_prompts, d, generator=g)  # what marks a prompt, and says nothing of its label
    x = own[prompt] + 0.1 * torch.randn(len(prompt), d, generator=g)
    label = [("a", "b")[int(i)] for i in torch.randint(0, 2, (n_prompts,), generator=g)]
    store = write_labelled(tmp_path / "s", {Site(0): x}, prompt=prompt, label=label)
    honest = train_probes(store, "label").lines[0].score
    leaking = train_probes(store, "label", groups=np.arange(len(prompt))).lines[0].score
    assert honest.auroc.low < 0.5 < honest.auroc.high
    assert leaking.accuracy.low > 0.8
    # the same text twice is one prompt, whatever its number
    twice = write_labelled(tmp_path / "t", {Site(0): x}, prompt=prompt, label=label,
                           contents=[f"text {i // 2}" for i in range(n_prompts)])  # fmt: skip
    known = labels_of(twice, "label")
    test = held_out(known)
    assert not set(known.groups[test]) & set(known.groups[~test])
    assert len(np.unique(known.groups)) == n_prompts // 2


def test_a_label_of_tokens_stands_beside_a_control_of_token_types(tmp_path):
    g = torch.Generator().manual_seed(0)
    n, types, d = 2000, 20, 32
    token = torch.randint(0, types, (n,), generator=g)
    x = torch.randn(types, d, generator=g)[token] * 2 + torch.randn(n, d, generator=g)
    prompt = [i // 10 for i in range(n)]
    store = write_labelled(tmp_path / "s", {Site(0): x}, prompt=prompt, tokens=token.tolist())
    curve = train_probes(store, (token % 2).numpy())
    (line,) = curve.lines
    # rows that hold the token hold any label of tokens: the probe is right and selects nothing
    assert curve.control_of == "token"
    assert line.score.accuracy.value > 0.95
    assert line.control.accuracy.value > 0.9
    assert abs(line.selectivity.value) < 0.08
    assert line.shuffled.accuracy.value < 0.65
    assert curve.words["all"].accuracy.value == 1.0


def test_words_of_the_prompt_are_the_baseline_of_a_prompts_label(tmp_path):
    g = torch.Generator().manual_seed(0)
    label = [("x", "y")[i % 2] for i in range(200)]
    contents = [f"number {i} is {('even', 'odd')[i % 2]}" for i in range(200)]
    store = write_labelled(tmp_path / "s", {Site(0): torch.randn(200, 4, generator=g)}, label=label, contents=contents)
    curve = train_probes(store, "label")
    assert curve.control_of == "prompt"
    assert curve.words["all"].accuracy.value == 1.0
    assert curve.lines[0].score.accuracy.value < 0.7


def test_positions_and_layers_in_one_call(tmp_path):
    x, y, _ = planted(600, 6, gap=5.0)
    late = torch.where(
        torch.arange(600)[:, None] % 3 == 2, x, torch.randn(600, 6, generator=torch.Generator().manual_seed(5))
    )
    y = y.clone().reshape(-1, 3)[:, 2]
    values = {Site(0): late, Site(1): late * 2}
    store = write_labelled(tmp_path / "s", values, prompt=[i // 3 for i in range(600)], label=[str(int(i)) for i in y])
    curve = train_probes(store, "label", positions=["first", "last", "1", "-1"], controls=(), words=False)
    found = {(line.positions, line.site.layer): line.score.accuracy.value for line in curve.lines}
    assert len(found) == 8
    assert found["last", 0] > 0.95 > 0.7 > found["first", 1]
    assert found["-1", 1] == found["last", 1]
    assert list(curve.frame()["site"]) == ["resid_post.0", "resid_post.1"] * 4
    assert curve.at(1, "last").score.accuracy.value == found["last", 1]
    assert "<table" in curve._repr_html_()


def test_rows_are_drawn_where_there_are_more_and_the_result_says_so(tmp_path):
    store, _ = two(tmp_path)
    curve = train_probes(store, "label", max_rows=100)
    assert "100 of 400 rows, drawn at random (seed 0)" in curve.notes
    assert curve.lines[0].n_train + curve.lines[0].score.n == 100


def test_two_runs_are_equal_and_the_split_hangs_on_the_prompts_alone(tmp_path):
    store, _ = two(tmp_path)
    first, second = (train_probes(store, "label", words=False) for _ in range(2))
    assert [line.probe for line in first.lines] == [line.probe for line in second.lines]
    known = labels_of(store, "label")
    order = np.random.default_rng(0).permutation(len(known))
    shuffled = known.take(order)
    assert (held_out(known)[order] == held_out(shuffled)).all()
    assert (held_out(known, seed=1) != held_out(known)).any()
    share = held_out(known, 0.2).mean()
    assert abs(share - 0.2) < 0.01


def test_few_rows_for_the_width_are_told(tmp_path):
    store, _ = two(tmp_path, n=60, d=100, gap=8.0)
    curve = train_probes(store, "label")
    assert any(note.startswith("rows are few for the width (44 for 100)") for note in curve.notes)
    assert any("prompts are held out: the intervals over them are rough" in note for note in curve.notes)
    assert curve.lines[1].score.accuracy.value > 0.9


def test_rows_that_are_not_finite_are_left_out(tmp_path):
    x, y, _ = planted(400, 6, gap=5.0)
    bad = x.clone()
    bad[::40, 2] = float("nan")
    label = [("no", "yes")[i] for i in y]
    store = write_labelled(tmp_path / "s", {Site(0): bad, Site(1): x}, label=label)
    curve = train_probes(store, "label")
    assert "resid_post.0: 10 of 400 rows are not finite and were left out" in curve.notes
    assert curve.lines[0].n_train + curve.lines[0].score.n == 390
    assert all(line.score.accuracy.value > 0.95 for line in curve.lines)
    none = write_labelled(tmp_path / "n", {Site(0): x * float("nan")}, label=label)
    with pytest.raises(UserError, match=r"resid_post\.0: too few of its rows are finite .* .0 of 400."):
        train_probes(none, "label")


def test_what_cannot_be_probed_is_refused_in_one_line(tmp_path):
    n = 60
    g = torch.Generator().manual_seed(0)
    meta = [{"many": f"m{i}", "list": [1], "half": "x" if i % 2 else None, "pair": i % 2} for i in range(n)]
    store = write_labelled(tmp_path / "s", {Site(0): torch.randn(n, 4, generator=g)}, label=["a"] * n, meta=meta)

    def refuses(words: str, label="pair", **options):
        with pytest.raises(UserError) as err:
            train_probes(store, label, **options)
        assert words in str(err.value)
        assert "\n" not in str(err.value)

    refuses("label 'label' is 'a' in every row; a probe needs two classes", "label")
    refuses("label 'values' is 3 in every row; a probe needs values that differ", [3.0] * n, quantity=True)
    refuses("none of the 60 rows", [None] * n)
    refuses("only 0 of its 60 classes is in 4 prompts or more", "many")
    refuses("must have one value for each of the 60 rows", [1, 2, 3])
    refuses(
        "has no column 'nonsense' to take as label; it has label, half, many, pair, position, token_id, text",
        "nonsense",
    )
    refuses("has no class 'zebra'; it has 0, 1", classes=["zebra"])
    refuses("unknown kind of probe 'svm'; allowed: logistic, ridge", kind="svm")
    refuses("unknown positions 'middle'; allowed: all, last", positions="middle")
    refuses("has no attn_out.0; it has resid_post.0", sites=["attn_out.0"])
    refuses("tells classes apart and the label is a quantity; take ridge or sparse", list(range(n)), quantity=True)
    refuses("holdout is the share of the prompts that no probe sees", holdout=1.5)
    refuses("unknown controls nonsense; allowed: control, shuffled", controls=["nonsense"])
    refuses("a sparse probe needs a penalty above 0", kind="sparse", penalty=0)
    refuses("is no quantity: it holds 'm0'", "many", quantity=True)
    refuses("names no token; write such as text:plus,minus", "text:")
    refuses("only 0 of its 2 classes is in 4 prompts or more", groups=["same"] * n)
    refuses("all rows are of one prompt (or group)", list(range(n)), quantity=True, kind="ridge", groups=["same"] * n)


def test_a_thousand_classes_are_refused(tmp_path):
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    store = write_labelled(tmp_path / "s", {Site(0): x}, label=[f"c{i % 1000}" for i in range(4000)])
    with pytest.raises(UserError, match="has 1,000 classes and a probe takes at most 100; name those that matter"):
        train_probes(store, "label")
    (line,) = train_probes(store, "label", classes=["c7", "c9"]).lines
    assert line.probe.classes == ("c7", "c9")


def test_one_class_for_each_group_cannot_be_split(tmp_path):
    store, _ = two(tmp_path)
    with pytest.raises(UserError, match="only 0 of its 2 classes is in 4 prompts or more"):
        train_probes(store, "label", groups="label")


def test_classes_of_few_prompts_are_left_out_and_told(tmp_path):
    label = ["rare" if i < 3 else ("a", "b")[i % 2] for i in range(80)]
    store = write_labelled(
        tmp_path / "s", {Site(0): torch.randn(80, 3, generator=torch.Generator().manual_seed(0))}, label=label
    )
    curve = train_probes(store, "label")
    assert curve.classes == ("a", "b")
    assert "1 of 3 classes (rare) are in fewer than 4 prompts: their 3 rows were left out" in curve.notes
    one = train_probes(store, "label", classes=["a"])
    assert one.classes == ("other", "a")
    assert one.lines[0].score.n + one.lines[0].n_train == 80


def test_columns_and_tokens_are_labels(tmp_path):
    texts = [(" plus", "w", " minus ")[i % 3] for i in range(90)]
    meta = [{"gold": i % 2, "skip": None, "deep": {"a": 1}} for i in range(30)]
    store = write_labelled(tmp_path / "s", {Site(0): torch.randn(90, 3, generator=torch.Generator().manual_seed(0))},
                           prompt=[i // 3 for i in range(90)], meta=meta, texts=texts)  # fmt: skip
    assert label_columns(store) == ["gold", "position", "token_id", "text"]
    known = labels_of(store, "text:plus,minus")
    assert known.classes == ("no", "yes")
    assert known.values.tolist() == [1, 0, 1] * 30
    assert not known.per_group
    assert labels_of(store, "gold").per_group
    assert labels_of(store, "position", quantity=True).values.tolist()[:3] == [0.0, 1.0, 2.0]


def test_which_rows_a_policy_names():
    prompts = np.array([0, 0, 0, 0, 1, 2, 2])
    named = {p: np.flatnonzero(rows_at(p, prompts)).tolist()
             for p in ("first", "last", "first:2", "last:2", "every:2", "1", "-2")}  # fmt: skip
    assert named == {"first": [0, 4, 5], "last": [3, 4, 6], "first:2": [0, 1, 4, 5, 6], "last:2": [2, 3, 4, 5, 6],
                     "every:2": [0, 2, 4, 5], "1": [1, 6], "-2": [2, 5]}  # fmt: skip


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
@pytest.mark.parametrize("kind", ["logistic", "ridge"])
@pytest.mark.parametrize("n", [600, 18])
def test_what_runs_on_a_gpu_agrees_with_scikit_learn(kind, classes, penalty, n):
    x, y, _ = planted(n, 20, gap=2.0, classes=classes)
    x = 3 * x + 1
    made = {}
    for library in ("torch", "scikit-learn"):
        solver = Solver(kind, classes, penalty, torch.device("cpu"), library)
        solver.fit(x.flip(0), y.flip(0).numpy())  # the second fit begins where the first ended
        made[library] = solver.fit(x, y.numpy())
        assert made[library].converged
    mine, theirs = (x.double() @ torch.from_numpy(f.weight) + torch.from_numpy(f.bias) for f in made.values())
    p, q = (s.sigmoid() if classes == 2 else s.softmax(1) for s in (mine, theirs))
    assert float((p - q).abs().max()) < 0.005
    a, b = (torch.from_numpy(f.weight) for f in made.values())
    if classes > 2:  # of several classes only differences of weights count
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    for u, v in zip(a.T, b.T, strict=True):
        assert cosine(u, v) > 0.999


def test_mass_mean_with_the_covariance_is_lda():
    x, y, _ = planted(500, 6, gap=1.5)
    x = x @ torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    made = Solver("mass_mean_cov", 2, 0.2, torch.device("cpu")).fit(x, y.numpy())
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(x.double().numpy(), y.numpy())
    mine, other = torch.from_numpy(made.weight[:, 0]), torch.from_numpy(theirs.coef_[0])
    # sklearn scales each column by its own deviation before it shrinks; without shrinkage the two are one formula
    plain = Solver("mass_mean_cov", 2, 0.0, torch.device("cpu")).fit(x, y.numpy())
    exact = LinearDiscriminantAnalysis(solver="lsqr").fit(x.double().numpy(), y.numpy())
    assert cosine(torch.from_numpy(plain.weight[:, 0]), torch.from_numpy(exact.coef_[0])) > 1 - 1e-6
    assert cosine(mine, other) > 0.9


def test_a_probe_is_saved_and_read_again_and_refuses_what_is_damaged(tmp_path):
    store, _ = two(tmp_path)
    probe = train_probes(store, "label").lines[1].probe
    probe.save(tmp_path / "p")
    again = Probe.load(tmp_path / "p")
    assert again == probe
    assert again.meta["held_out"]["n"] == 100
    rows = store.read(1)
    assert torch.equal(again.score(rows), probe.score(rows))
    with pytest.raises(UserError, match="exists already"):
        probe.save(tmp_path / "p")
    with pytest.raises(UserError, match=r"it has no probe.json"):
        Probe.load(tmp_path)
    (tmp_path / "p" / "probe.json").write_text("{}")
    with pytest.raises(UserError, match="is not a saved probe: its header does not say format"):
        Probe.load(tmp_path / "p")
    with pytest.raises(UserError, match=r"reads rows of width 12 at resid_post.1; got width 3"):
        probe.score(torch.zeros(2, 3))
    with pytest.raises(UserError, match="has no class 'maybe'; it has no, yes"):
        probe.direction("maybe")


def test_a_probe_steers_by_the_gap_between_the_classes(tmp_path):
    store, direction = two(tmp_path, n=2000, d=6, gap=4.0)
    probe = train_probes(store, "label", kind="mass_mean").lines[1].probe
    adapter = probe.steering("yes")
    delta = adapter.delta(Site(1), torch.zeros(6))
    assert abs(float(delta.norm()) - 4.0) < 0.2
    assert cosine(delta, direction) > 0.99
    assert adapter.base == {"name": "m", "weights": "w"}
    assert torch.allclose(probe.steering("no").delta(Site(1), torch.zeros(6)), -delta)


def test_a_probe_moves_through_a_map_and_says_what_was_lost(tmp_path):
    x, y, _ = planted(1200, 8, gap=4.0)
    g = torch.Generator().manual_seed(7)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    label = [("no", "yes")[i] for i in y]
    home = write_labelled(tmp_path / "a", {Site(2): x}, label=label)
    there = write_labelled(tmp_path / "b", {Site(0): x @ turn}, label=label, weights="other")
    (line,) = train_probes(home, "label").lines
    exact = LinearMap(turn.T.contiguous(), torch.zeros(8))
    found = transfer_probe(line.probe, there, None, exact, site=0)
    assert found.lost.low <= 0 <= found.lost.high
    assert found.home.value == line.score.accuracy.value
    assert found.moved.accuracy.value == pytest.approx(line.score.accuracy.value)  # the same prompts are held out
    assert found.unmapped.accuracy.value < found.moved.accuracy.value - 0.1
    assert list(found.frame().index) == ["home", "moved", "unmapped", "native"]
    broken = transfer_probe(line.probe, there, None, LinearMap(turn.contiguous(), torch.zeros(8)), site=0)
    assert broken.lost.low > 0.1
    with pytest.raises(UserError, match="belongs to m, not to m: weights w and other differ; give a map"):
        transfer_probe(line.probe, there, None, site=0)
    with pytest.raises(UserError, match=r"the map gives width 3 and the probe reads width 8"):
        transfer_probe(line.probe, there, None, LinearMap(torch.zeros(8, 3), torch.zeros(3)), site=0)
    with pytest.raises(UserError, match=r"has no means of classes .it was moved by a map."):
        found.probe.steering("yes")


def test_a_probe_is_scored_on_prompts_that_it_has_not_seen(tmp_path):
    x, y, _ = planted(800, 6, gap=3.0)
    label = [("no", "yes")[i] for i in y]
    first = write_labelled(tmp_path / "a", {Site(0): x[:400]}, label=label[:400])
    both = write_labelled(tmp_path / "b", {Site(0): x}, label=label)
    (line,) = train_probes(first, "label").lines
    found = probe_score(line.probe, both)
    assert found.n == 800 - line.n_train
    assert found.accuracy.low < 0.933 < found.accuracy.high
    seen = write_labelled(tmp_path / "c", {Site(0): x[:40]}, label=label[:40],
                          contents=[f"prompt {i}" for i in range(400) if _seen(line.probe, i)][:40])  # fmt: skip
    with pytest.raises(UserError, match="was trained on every prompt of store"):
        probe_score(line.probe, seen)


def _seen(probe, number):
    from probes.labels import _hash

    return _hash(f'"prompt {number}"') in probe.seen.tolist()


def test_intervals_hold_what_they_should():
    """Of many samples of independent rows, about 95 % of the intervals hold the truth; within prompts rows hang together."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(60):
        right = np.repeat(rng.random(80) < 0.8, 5)  # five rows of a prompt are right or wrong together
        p = np.where(right, 0.9, 0.1)
        found = class_scores(
            np.stack([1 - p, p], 1), np.ones(400, dtype=np.int64), np.repeat(np.arange(80), 5), seed=seed
        )
        held += found.accuracy.low <= 0.8 <= found.accuracy.high
        assert found.accuracy.high - found.accuracy.low > 0.1  # 400 rows alone would say 0.08
    assert held >= 51
