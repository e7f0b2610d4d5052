"""Figures of probes: every line is there, intervals are drawn, and no text of others is markup."""

from __future__ import annotations

import pandas as pd

from workbench.probe_plots import direction_table, probe_calibration, probe_layers, token_strip

EVIL = "<script>alert(1)</script> \u202eabc"


def lines(positions=("all",), score="accuracy"):
    found = []
    for at in positions:
        for layer in range(3):
            value = 0.5 + layer / 10
            line = {"site": f"resid_post.{layer}", "positions": at, "chance": 0.5, "words": 0.8}
            for name, shift in ((score, 0.2), ("control", 0.0), ("shuffled", 0.0)):
                line |= {name: value + shift, f"{name}_low": value + shift - 0.05, f"{name}_high": value + shift + 0.05}
            found.append(line)
    return pd.DataFrame(found)


def test_a_curve_stands_beside_its_controls():
    figure = probe_layers(lines())
    assert [t.name for t in figure.data] == [
        "probe",
        "control task",
        "shuffled labels",
        "words alone",
        "commonest class",
    ]
    assert [round(v, 9) for v in figure.data[0].error_y.array] == [0.05] * 3
    assert figure.layout.xaxis.title.text == "layer (resid_post)"
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2"]
    assert figure.layout.yaxis.title.text == "accuracy on held-out prompts"
    several = probe_layers(lines(positions=[f"first:{i + 1}" for i in range(8)]))
    assert "6 of 8 choices of positions are drawn" in [a.text for a in several.layout.annotations]
    assert [t.name for t in probe_layers(lines(score="r2")).data][-1] == "mean"


def test_what_is_not_there_is_said():
    assert "No probe was trained" in probe_layers(pd.DataFrame()).layout.annotations[0].text
    assert "have no auroc; they have accuracy" in probe_layers(lines(), "auroc").layout.annotations[0].text
    assert "A quantity has no classes" in probe_calibration([], float("nan")).layout.annotations[0].text
    assert "No token" in token_strip(pd.DataFrame()).layout.annotations[0].text
    assert "No direction" in direction_table(pd.DataFrame()).layout.annotations[0].text


def test_classes_and_tokens_of_others_are_text():
    figure = probe_calibration([[0.6, 0.5, 10], [0.9, 1.0, 30]], 0.1, [[8, 2], [1, 29]], [EVIL, EVIL + "x"])
    assert list(figure.data[2].z[0]) == [0.8, 0.2]
    strip = token_strip(pd.DataFrame({"position": [0, 1], "token": [EVIL, "x" * 10_000], "score": [1.0, -2.0],
                                      "probability": [0.7, 0.1]}), f"label: {EVIL}")  # fmt: skip
    table = direction_table(pd.DataFrame([{"site": "resid_post.0", "method": EVIL, "auroc": 0.5, "auroc_low": 0.4,
                                           "auroc_high": 0.6}]))  # fmt: skip
    for one in (figure, strip, table, probe_layers(lines(positions=[EVIL, "b"]))):
        text = one.to_json()
        assert "<script" not in text.replace("\\u003c", "<")
        assert len(text) < 60_000
    assert strip.layout.title.text.startswith("label: &lt;script&gt;")
    assert strip.data[0].zmin == -2.0 == -strip.data[0].zmax
    assert strip.data[0].text[0][1] == "xxxxxxx…"


def test_a_long_text_is_cut_and_says_so():
    table = pd.DataFrame({"position": range(1000), "token": ["t"] * 1000, "score": [0.5] * 1000})
    figure = token_strip(table, "position", "tokens", most=100)
    assert "the first 100 of 1,000 tokens" in figure.layout.title.text
    assert sum(len(row) for row in figure.data[0].z) == 112
