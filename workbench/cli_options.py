"""Options that several verbs have: one name, one type, one line of help each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ADAPTER_HELP = "adapter folder or file, of any format that is read, or bundled:NAME"
MODEL_HELP = "hub id, local folder, or bundled:donor, bundled:recipient, bundled:outsider"
PROMPTS_HELP = "bundled:NAME, hub:owner/name, or a .txt, .jsonl, .csv, .parquet file"

Json = Annotated[bool, typer.Option("--json", help="the result as JSON on stdout")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace --out where it exists")]
Out = Annotated[Path, typer.Option(help="folder to make")]
Dtype = Annotated[str, typer.Option(help="to run in: auto, float32, float16, bfloat16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, or map to spread over all GPUs")]
Backend = Annotated[str, typer.Option(help="how it is read and edited: hooks, transformer-lens, nnsight")]
Mismatch = Annotated[bool, typer.Option("--allow-mismatch", help="take an adapter that belongs to another model")]
Plugin = Annotated[str | None, typer.Option(help="a .py file, or a module, that registers graders; it is run")]
