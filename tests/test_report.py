"""The report is one file, says what the numbers say, and trusts no text."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from workbench.errors import UserError
from workbench.report import render, write_report
from workbench.summary import headline, load_metrics, missing, result_frame, result_table

from .metrics_example import EVIL, metrics


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if not self._open:
            self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return render(metrics())


def test_one_file_that_needs_no_network(page):
    tags = Page(page).tags
    assert not [t for t in tags if t[1].get("src") or t[0] in ("link", "img", "iframe")]
    assert not [t for t in tags if t[0] == "a" and not t[1]["href"].startswith("#")]
    assert page.count("plotly.js v") == 1
    assert "@import" not in page.split("</style>")[0]


def test_text_from_outside_is_escaped_everywhere(page):
    parsed = Page(page)
    assert EVIL not in page
    assert parsed.text.count(EVIL) > 10  # read as text, in prompts, answers, names, warnings and the job
    clean = json.loads(json.dumps(metrics()).replace(EVIL, "plain"))
    assert len([t for t in parsed.tags if t[0] == "script"]) == len(
        [t for t in Page(render(clean)).tags if t[0] == "script"]
    )


def test_the_same_metrics_give_the_same_bytes(page):
    assert render(metrics()) == page


def test_the_table_holds_the_numbers(page):
    text = re.sub(r"\s+", " ", Page(page).text)
    for wanted in (
        "80.0 %",
        "75.0 to 85.0",
        "p < 0.001",
        "+1.20",
        "3.1 σ long",
        "+2.0 points",
        "−0.12",
        "1/100",
        "2 more",
    ):
        assert wanted in text


def test_headline_says_success_and_failure_alike():
    good, bad = (headline(n, b) for n, b in metrics()["behaviours"].items())
    assert good.startswith("reasoning: the paste reached 86 % of native's gain in accuracy (95 % interval 81 to 91 %)")
    assert "Accuracy went from 20.0 % (recipient) to 80.0 % (paste), p < 0.001; native training gave 90.0 %." in good
    assert "The paste took 1/100 of the time of native training; with choosing it, 1/50 of that time" in good
    assert "random converter 3 %, shuffled pairs 3 %, mean delta 3 % of native's gain" in good
    assert "the paste went the wrong way: −25 % of native's gain" in bad


def test_headline_without_native_or_paste():
    b = metrics()["behaviours"]["reasoning"]
    del b["arms"]["native"], b["gain_share"], b["control_share"], b["cost"]
    assert headline("x", b).startswith("x: no native arm, so the paste cannot be given as a share")
    assert headline("x", {}) == "x: no paste was measured."
    b["arms"]["native"] = b["arms"]["base"]
    b["gain_share"] = {"rate": None, "log_odds": None}
    assert "gained nothing to share" in headline("x", b)


@pytest.mark.parametrize("key", [*metrics()["behaviours"]["reasoning"], *metrics()])
def test_any_key_may_be_absent(key):
    found = metrics()
    found.pop(key, None)
    for b in found.get("behaviours", {}).values():
        b.pop(key, None)
    assert "</html>" in render(found)
    result_table(found)


def test_what_is_missing_is_named_with_how_to_get_it():
    assert missing(metrics()) == []
    bare = {"behaviours": {"x": {"arms": {"base": {"rate": {"value": 0.5}}}}}}
    notes = " ".join(missing(bare))
    for wanted in ("native", "random-converter", "forecast", "dose-response", "neutral text"):
        assert wanted in notes
    assert "Not measured" in render(bare)


def test_terminal_table_fits_80_columns_and_has_the_same_numbers():
    found = json.loads(json.dumps(metrics()).replace(EVIL, "[red]"))
    console = Console(width=80, file=io.StringIO())
    console.print(result_table(found))
    text = console.file.getvalue()
    row = next(line for line in text.splitlines() if line.startswith("paste "))
    assert " ".join(row.split()) == "paste 80.0 [75.0, 85.0] +1.20 [+1.15, +1.25] 86 / 86 3.1 σ"
    assert "style [red]" in text  # names are not markup


def test_frame_has_a_row_per_behaviour_and_arm():
    frame = result_frame(metrics())
    assert len(frame) == 18
    row = frame[(frame.behaviour == "reasoning") & (frame.arm == "paste")].iloc[0]
    assert (row.rate, row.rate_low, row.share_rate) == pytest.approx((0.8, 0.75, 0.6 / 0.7))


def test_write_report_reads_a_run_folder(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert load_metrics(tmp_path / "metrics.json") == metrics()
    assert write_report(tmp_path, tmp_path / "other.html").read_text(encoding="utf-8") == render(metrics())


@pytest.mark.parametrize(
    ("content", "says"), [(None, "holds no metrics.json"), ("{", "not whole JSON"), ('{"schema": 9}', "schema 9; this")]
)
def test_bad_runs_are_named(tmp_path, content, says):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=says):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
