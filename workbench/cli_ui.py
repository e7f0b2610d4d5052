"""`workbench ui`: the explorer, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import MODEL_HELP
from .errors import UserError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def ui(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="folder of runs and stores [that of the demo's run]")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help=f"a model that pages may run, again for each: {MODEL_HELP}")
    ] = None,
    device: Annotated[str, typer.Option(help="of models and activations: auto, cpu, cuda, cuda:N")] = "auto",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8501,
    address: Annotated[
        str, typer.Option(help="where it listens; any but the loopback address needs --token")
    ] = LOOPBACK[0],
    token: Annotated[
        bool, typer.Option("--token", help="ask for a token at the door; it is made here and printed")
    ] = False,
) -> None:
    """Opens a folder of runs and stores in the browser. Without one, the demo's run, which is made first if it is not there.

    Only that folder, the bundled models and those named here can be reached. Ctrl-C ends it.
    """
    import os
    import secrets
    import subprocess

    from ui.server import command
    from ui.settings import Settings

    if address not in LOOPBACK and not token:
        raise UserError(f"--address {address} lets others in: give --token too, which is asked for at the door")
    opened = _demo() if folder is None else folder.expanduser()
    if not opened.is_dir():
        raise UserError(f"{opened}: no such folder; give the one that holds your runs and stores")
    _check_free(address, port)
    secret = secrets.token_urlsafe(24) if token else ""
    host = f"[{address}]" if ":" in address else address
    typer.echo(f"{opened} at http://{host}:{port}")
    if secret:
        typer.echo(f"token: {secret}")
    chosen = Settings(opened.resolve(), tuple(model or ()), secret, "" if device == "auto" else device)
    try:
        done = subprocess.run(command(address, port), env={**os.environ, **chosen.variable()}, check=False)
    except KeyboardInterrupt:
        return
    raise typer.Exit(done.returncode)


def _check_free(address: str, port: int) -> None:
    """Raises UserError where nothing can listen there."""
    import socket

    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as err:
        raise UserError(f"nothing can listen at {address} port {port}: {err.strerror}; give another --port") from err


def _demo() -> Path:
    """The folder of the demo's run, which is made where it is not there."""
    from .job_options import open_job
    from .jobs import run_job

    job = open_job("bundled:demo")
    if not (job.folder / "metrics.json").is_file():
        typer.echo("there is no run of the demo yet; it is made first, which takes some minutes", err=True)
        run_job(job)
    return job.folder
