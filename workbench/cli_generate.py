"""`workbench generate` and `workbench chat`: what a model answers, with adapters and without."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .cli_engine import Address, CpusPerWorker, EngineName, GpusPerWorker, Workers, engine_of, load_for
from .cli_options import ADAPTER_HELP, MODEL_HELP, PROMPTS_HELP, Backend, Device, Dtype, Json, Mismatch
from .errors import UserError

if TYPE_CHECKING:
    from .adapters.blend import Blend
    from .conversation import Conversation

EACH = "one for all, or one for each --adapter"
COMMANDS = "/quit, /reset (forget what was said), /strength X (times the adapters' own)"
T = TypeVar("T")

Adapters = Annotated[list[str] | None, typer.Option(metavar="FOLDER", help=f"{ADAPTER_HELP}; may be repeated")]
Strengths = Annotated[list[float] | None, typer.Option(help=f"factor on the adapter's own, {EACH} [1]")]
Positions = Annotated[
    list[str] | None,
    typer.Option(help=f"last, prompt, generated, both, first:n, last:n; {EACH} [the adapter's own]"),
]
Schedules = Annotated[
    list[str] | None,
    typer.Option(help=f"strength over generated tokens: constant, linear:n (falls to 0), first:n; {EACH} [constant]"),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="length at which an answer is cut")]
Sample = Annotated[bool, typer.Option("--sample", help="draw tokens in place of taking the likeliest")]
Temperature = Annotated[float | None, typer.Option(help="draw tokens, at this temperature")]
TopP = Annotated[float | None, typer.Option(help="draw tokens, from the likeliest that hold this probability")]
TopK = Annotated[int | None, typer.Option(help="draw tokens, from so many of the likeliest")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of what is drawn")]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompt: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="user turns")] = None,
    prompts: Annotated[str | None, typer.Option(help=f"in place of PROMPT: {PROMPTS_HELP}")] = None,
    adapter: Adapters = None,
    strength: Strengths = None,
    positions: Positions = None,
    schedule: Schedules = None,
    max_new_tokens: MaxNewTokens = 64,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    beams: Annotated[int, typer.Option(min=1, help="search with so many beams")] = 1,
    seed: Seed = 0,
    stream: Annotated[bool, typer.Option("--stream", help="one prompt after another, each word as it comes")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="the first so many of --prompts only")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts at once")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "hooks",
    allow_mismatch: Mismatch = False,
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    as_json: Json = False,
) -> None:
    """Answers prompts, with adapters where they are given.

    Several adapters act on the same states, and what they add is summed. With --json: one object a line, which
    `workbench grade` reads.
    """
    if bool(prompt) == (prompts is not None):
        raise UserError("give either prompts on the line or --prompts with a prompt set" +
                        (", not both" if prompt else ""))  # fmt: skip
    if stream and engine != "local":
        raise UserError(f"--stream shows words as they come from the model at hand, and --engine {engine} runs replicas of it; "
                        "leave one of the two out")  # fmt: skip
    if stream and (as_json or beams > 1):
        raise UserError(f"--stream shows words as they come, and {'--json' if as_json else '--beams'} knows them at the end "
                        "only; leave one of the two out")  # fmt: skip
    used = blend_of(adapter, strength, positions, schedule, allow_mismatch)
    from .generation import Decoding
    from .models import load
    from .prompts import PromptSet
    from .replicas import spread_over

    decoding = Decoding(max_new_tokens, sample, temperature, top_p, top_k, beams, seed)
    read = PromptSet.load(prompts if prompts is not None else list(prompt or []), limit=limit)
    if stream:
        held = load(model, dtype=dtype, device=device, backend=backend)
        for one in read:
            typer.echo(f"> {one.user}")
            held.generate([one], adapter=used, on_text=_show, **decoding.options)
            typer.echo("\n")
        return
    with engine_of(engine, address, workers, gpus_per_worker, cpus_per_worker) as opened:
        held = load_for(opened, model, dtype=dtype, device=device, backend=backend)
        with spread_over(opened, held):
            answers = held.generate(read, batch_size=batch_size, adapter=used, **decoding.options)
    for one, answer in zip(read, answers, strict=True):
        if as_json:
            gold = {"gold": one.meta["gold"]} if "gold" in one.meta else {}
            typer.echo(json.dumps({"id": one.id, "prompt": one.user, "answer": answer, **gold}, ensure_ascii=False))
        else:
            typer.echo(f"> {one.user}\n{answer.strip()}\n")


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    adapter: Adapters = None,
    strength: Strengths = None,
    positions: Positions = None,
    schedule: Schedules = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="length at which an answer is cut [256, or half of the model's context]")
    ] = None,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "hooks",
    allow_mismatch: Mismatch = False,
) -> None:
    """Talks with a model, with adapters where they are given: a line is a turn, /quit ends.

    The conversation is kept where the model has a chat template. Ctrl-C breaks an answer off, and ends the chat where
    there is none. Lines may also come from a pipe; then the answers alone are printed.
    """
    used = blend_of(adapter, strength, positions, schedule, allow_mismatch)
    from dataclasses import replace

    from .conversation import Conversation, room_of
    from .generation import Decoding
    from .models import load

    decoding = Decoding(1, sample, temperature, top_p, top_k, 1, seed)
    held = load(model, dtype=dtype, device=device, backend=backend)
    decoding = replace(decoding, max_new_tokens=room_of(held) if max_new_tokens is None else max_new_tokens)
    talk = Conversation(held, used, system=system, decoding=decoding)
    if used is not None:
        for one in used.adapters:
            one.check(held, allow_mismatch)  # before the first line is typed
    if not talk.remembers:
        typer.echo(f"{model} has no chat template: each line is a prompt of its own", err=True)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        typer.echo(f"commands: {COMMANDS}", err=True)
    _talk(talk, _lines(at_terminal), at_terminal)


def _talk(talk: Conversation, lines: Iterator[str], at_terminal: bool) -> None:
    """Answers line after line; what is wrong with one ends the chat only where nobody sits before it."""
    adapter = talk.adapter
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "/quit":
            return
        forgotten = talk.forgotten
        try:
            if word == "/reset":
                talk.reset()
            elif word == "/strength":
                talk.adapter = _scaled(adapter, rest)
            elif word.startswith("/"):
                raise UserError(f"unknown command {word!r}; allowed: {COMMANDS}")
            else:
                answer = talk.say(line.strip(), on_text=_show if at_terminal else None)
                typer.echo("" if at_terminal else answer)
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            typer.echo("\n(broken off; this turn is forgotten)", err=True)
        except UserError as err:
            if not at_terminal:
                raise
            typer.echo(f"error: {err}", err=True)
        if talk.forgotten > forgotten:
            typer.echo("(no more room: the oldest turns are forgotten)", err=True)


def _lines(at_terminal: bool) -> Iterator[str]:
    """What is typed or piped, until its end; Ctrl-C before a line is an end too."""
    if not at_terminal:
        yield from sys.stdin
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- arrow keys and history for input()
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo("", err=True)
            return
        yield line


def _scaled(adapter: Any, text: str) -> Any:
    if adapter is None:
        raise UserError("there is no adapter whose strength could change; start the chat with --adapter")
    try:
        return adapter * float(text)
    except ValueError:
        raise UserError(f"the strength {text!r} is no number; write /strength 0.5, and 0 for the plain model") from None


def _show(text: str) -> None:
    typer.echo(text, nl=False)
    sys.stdout.flush()


def blend_of(
    adapters: Sequence[str] | None,
    strengths: Sequence[float] | None,
    positions: Sequence[str] | None,
    schedules: Sequence[str] | None,
    allow_mismatch: bool,
) -> Blend | None:
    """The adapters of the command line as one `Blend`; None where there are none.

    Raises UserError for options without an adapter, and for as many of an option as there are not adapters.
    """
    given = {"--strength": strengths, "--positions": positions, "--schedule": schedules}
    if not adapters:
        lonely = next((name for name, values in given.items() if values), None)
        if lonely is not None:
            raise UserError(f"{lonely} is of an adapter and there is none; give --adapter too")
        return None
    n = len(adapters)
    factors = _each("--strength", strengths, n, 1.0)
    where = _each("--positions", positions, n, None)
    over = _each("--schedule", schedules, n, "constant")
    from dataclasses import replace

    from .adapters.adapter import Adapter
    from .adapters.blend import Blend

    made = []
    for path, factor, policy in zip(adapters, factors, where, strict=True):
        one = Adapter.load(path) * factor
        changes: dict[str, Any] = {} if policy is None else {"positions": "all" if policy == "both" else policy}
        if allow_mismatch:
            changes["base"] = {}
        made.append(replace(one, **changes))
    return Blend(made, over)


def _each(name: str, values: Sequence[T] | None, n: int, default: T) -> list[T]:
    if not values:
        return [default] * n
    if len(values) not in (1, n):
        raise UserError(f"{name} was given {len(values)} times and --adapter {n} times; give {EACH}, in their order")
    return list(values) * (n if len(values) == 1 else 1)
