"""`workbench similarity`: how alike the layers of two models are, or of one, beside shuffled prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Json, Overwrite
from .cli_values import names_of, printed_json, printed_table, site_list

MEASURES_HELP = "cka, cka_debiased, svcca, pwcca, procrustes, rsa, knn; with commas [all that take minutes at most]"
SITES_HELP = "such as 0,4,8-12 or resid_mid.0,resid_post.4 [all of its store]"


def similarity(
    store_a: Annotated[Path, typer.Argument(metavar="STORE_A", help="profile that `workbench profile` made")],
    store_b: Annotated[
        Path | None,
        typer.Argument(metavar="[STORE_B]", help="profile of another model, same prompts [STORE_A's own layers]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="run folder to make [nothing is written]")] = None,
    measures: Annotated[str | None, typer.Option(help=MEASURES_HELP)] = None,
    sites_a: Annotated[str | None, typer.Option(help=f"layers of the first: {SITES_HELP}")] = None,
    sites_b: Annotated[str | None, typer.Option(help="layers of the second, likewise")] = None,
    pairing: Annotated[
        str, typer.Option(help="rows that answer one another: last, aligned (of all tokens), auto")
    ] = "auto",
    max_rows: Annotated[int, typer.Option(help="rows compared; of more, so many, spread over the prompts")] = 4096,
    sample: Annotated[int, typer.Option(help="of these, rows that rsa and knn look at")] = 768,
    k: Annotated[int, typer.Option(help="neighbours of knn")] = 10,
    permutations: Annotated[int, typer.Option(help="draws of shuffled prompts; 0: no null")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the shards, the sample and the draws")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compares the layers of two models, or of one.

    Seven measures of every pair of layers, with intervals over prompts, beside the same where prompts are shuffled; with --out
    a run folder with a table and a report.
    """
    from probes.similarity_run import SimilarityJob, run_similarity

    def sites(text: str | None) -> tuple[str, ...]:
        if text is None:
            return ()
        plain = text.replace(",", "").replace("-", "").replace(" ", "").isdigit()
        return tuple(map(str, site_list(*((None, text) if plain else (text, None))) or ()))

    job = SimilarityJob(
        str(store_a.expanduser().resolve()), str(store_b.expanduser().resolve()) if store_b else "",
        tuple(names_of(measures)) if measures else (), sites(sites_a), sites(sites_b), pairing, max_rows, sample, k,
        permutations, seed=seed, device="" if device == "auto" else device,
    )  # fmt: skip
    run = run_similarity(job, out, overwrite=overwrite)
    if as_json:
        return printed_json({**run.metrics, "pairs": _pairs(run.result)})
    printed_table(_table(run.metrics))
    for warning in run.metrics["warnings"]:
        typer.echo(f"note: {warning}", err=True)
    if run.folder is not None:
        typer.echo(f"report: {run.folder / 'report.html'}")


def _pairs(result: Any) -> list[dict[str, Any]]:
    table = result.frame().astype(object)
    return table.where(table.notna(), None).to_dict("records")


def _table(metrics: Mapping[str, Any]) -> Any:
    """Layers of the first model down; the best partner by each measure across."""
    from rich.table import Table
    from rich.text import Text

    found = [line["measure"] for line in metrics["summary"] if line["best"] is not None]
    title = (
        f"{metrics['a']}: the most similar layer of {metrics['b']}, with 95 % intervals; [shuffled prompts, at most]"
    )
    table = Table(title=Text(title), title_justify="left")
    for name in ("layer", *found):
        table.add_column(name, justify="left")
    best = {(line["a"], line["measure"]): line for line in metrics["best"]}
    for a in dict.fromkeys(line["a"] for line in metrics["best"]):
        table.add_row(a, *(Text(_cell(best.get((a, name)))) for name in found))
    return table


def _cell(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return ""
    text = f"{line['b']}: {line['value']:.3f}"
    if line["low"] is not None:
        text += f" ({line['low']:.3f} to {line['high']:.3f})"
    return text if line["null_high"] is None else f"{text} [{line['null_high']:.3f}]"
