"""What every report is made of: sections of text, figures and tables, on one page that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .summary import plain

Cell = dict[str, Any]
LONG = 16
"""rows above which a table is closed until the reader opens it"""


def page(
    *, title: str, subtitle: str, headlines: list[list[str]], warnings: list[str], sections: list[dict[str, Any]],
    footer: str,
) -> str:  # fmt: skip
    """The page as HTML, plotly.js in it once; all text is escaped. Each headline is a sentence and what follows it."""
    from plotly.offline import get_plotlyjs

    source = resources.files("workbench").joinpath("report.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    return template.render(title=title, subtitle=subtitle, headlines=headlines, warnings=warnings, sections=sections,
                           plotly_js=Markup(get_plotlyjs()), footer=footer)  # fmt: skip


def section(title: str, *text: str, figure: go.Figure | None = None, tables: Iterable[dict[str, Any]] = (),
             examples: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:  # fmt: skip
    key = title.lower().replace(" ", "-")
    return {"id": key, "title": title, "text": list(text), "figure": _figure(figure, key) if figure else None,
            "tables": list(tables), "examples": list(examples)}  # fmt: skip


def _figure(figure: go.Figure, key: str) -> Markup:
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{key}", config=config))


def cell(parts: tuple[str, str] | str, first: bool = False) -> Cell:
    value, small = (parts, "") if isinstance(parts, str) else parts
    return {"value": value, "small": small, "first": first}


def table(columns: list[str], rows: list[dict[str, Any]], title: str = "", note: str = "") -> dict[str, Any]:
    heads = [{"title": c, "first": False} for c in columns]
    fold = f"{title or 'Table'}: {len(rows)} rows" if len(rows) > LONG else ""
    return {"title": "" if fold else title, "columns": heads, "rows": rows, "note": note, "groups": [], "facts": None,
            "wide": False, "fold": fold}  # fmt: skip


def facts(title: str, rows: Iterable[tuple[str, Any]], note: str = "") -> dict[str, Any]:
    return {"title": title, "facts": [(k, plain(v) if isinstance(v, float) else str(v)) for k, v in rows], "note": note}


def flat(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in (tree or {}).items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
