"""Reading a model that lies on NDIF, by nnsight: the weights stay there and the states come back.

Sites are the inputs and the outputs of blocks (resid_pre, resid_post): the places inside a block are found by watching
a pass on this machine. The states of a batch come back whole and `take` is applied here, unless it has an attribute
`remote`: a function of the states alone that needs nothing but torch, which is sent and applied there in its place.
Edits are functions of this machine and are refused: nnsight's own trace with `remote=True` is the place for them.

What nnsight sends and receives is pickled (by nnsight, between it and NDIF). A run on NDIF itself could not be tried
where this was written; what is tested is `remote="local"`, nnsight's own rehearsal, which sends the same request, opens
it with the modules of this machine hidden, and runs it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..anatomy import INNER, Anatomy, check
from ..checkpoints import quiet
from ..errors import UserError
from ..sites import Site
from . import Method, torch_hooks

if TYPE_CHECKING:
    from nnsight import TransformersModel

    from ..models import Model

Remote = Literal["ndif", "local"]
Places = list[tuple[int, bool, Callable[[Tensor], Tensor] | None]]
"""layers, whether their output is wanted or their input, and what is applied there"""


def remote_model(source: str, tokenizer: Any, revision: str | None, remote: bool | str) -> TransformersModel:
    """An nnsight model without weights, whose runs take place elsewhere.

    remote: True for NDIF, `"local"` for the rehearsal. Raises UserError where no key for NDIF is set, and for a model
    whose config and tokenizer cannot be had.
    """
    if remote not in (True, "local"):
        raise UserError(
            f"remote={remote!r} is not known; allowed: False, True (NDIF), 'local' (a rehearsal on this machine)"
        )
    from nnsight import CONFIG, TransformersModel

    if remote is True and not CONFIG.API.APIKEY:
        raise UserError("remote=True needs a key for NDIF and none is set: put it in NDIF_API_KEY (https://login.ndif.us), "
                        "or leave remote out and run on this machine")  # fmt: skip
    quiet()
    options: dict[str, Any] = {"task": "text-generation", "tokenizer": tokenizer}
    if revision:
        options["revision"] = revision
    try:
        return TransformersModel(source, **options)
    except Exception as err:  # transformers and the hub client have dozens of errors; each means the same to the user
        reason = " ".join(str(err).split())[:200]
        raise UserError(f"nnsight cannot open {source!r} ({type(err).__name__}: {reason}); remote runs need its config and "
                        "tokenizer from the hub") from err  # fmt: skip


class NdifBackend:
    """See `backends.Backend`; the model runs on NDIF, or is rehearsed here with `remote="local"`."""

    name = "nnsight"

    def __init__(self, source: TransformersModel, remote: bool | str) -> None:
        self.source, self.remote = source, remote
        self._reads: list[tuple[dict[Site, Tensor], list[Site], torch_hooks.Take | None]] = []

    def anatomy(self, model: Model) -> list[Anatomy]:
        return [Anatomy().without(INNER, "a remote model is read at resid_pre and resid_post")] * model.n_layers

    @contextmanager
    def read(
        self, model: Model, sites: Sequence[Site], take: torch_hooks.Take | None = None
    ) -> Iterator[dict[Site, Tensor]]:
        sites = [Site.parse(site, model.n_layers) for site in sites]
        check(model, sites)
        captured: dict[Site, Tensor] = {}
        entry = (captured, sites, take)
        self._reads.append(entry)
        try:
            yield captured
        finally:
            self._reads.remove(entry)

    def edit(
        self, model: Model, edits: Mapping[Site, torch_hooks.Edit], prompt_lengths: Any = None
    ) -> AbstractContextManager[None]:
        raise UserError("edits are not sent to a remote model; load it without remote, or write the edit in nnsight's own "
                        "trace(..., remote=True)")  # fmt: skip

    def call(self, model: Model, method: Method, options: Mapping[str, Any], stop_after: int | None = None) -> Any:
        if method == "generate":
            if self._reads:
                raise UserError("a remote model is not read while it generates; read the answers in a second call")
            return _generated(self.source, dict(options), self.remote)
        last = model.n_layers - 1 if stop_after is None else stop_after
        wanted = [
            (site, take, captured) for captured, sites, take in self._reads for site in sites if site.layer <= last
        ]
        wanted.sort(key=lambda one: (one[0].layer, one[0].point == "resid_post"))
        places = [(site.layer, site.point == "resid_post", getattr(take, "remote", None)) for site, take, _ in wanted]
        kept, out = _passed(self.source, dict(options), model.blocks_path, places, stop_after, self.remote)
        for (site, take, captured), (_, _, sent), h in zip(wanted, places, kept, strict=True):
            captured[site] = h if take is None or sent is not None else take(site, h)
        return out


def _passed(
    source: TransformersModel, inputs: dict[str, Any], path: str, places: Places, stop: int | None, remote: bool | str
) -> tuple[list[Tensor], Any]:
    """One forward pass: what is kept at each place, in their order, and the output unless it is stopped."""
    with source.trace(**inputs, remote=remote) as tracer:
        blocks = source
        for name in path.split("."):
            blocks = getattr(blocks, name)
        found = []
        for layer, after, take in places:
            h = blocks[layer].output if after else blocks[layer].input
            h = h[0] if isinstance(h, tuple) else h
            found.append(h.cpu() if take is None else take(h).cpu())
        kept = found.save()  # type: ignore[attr-defined]
        if stop is not None:
            blocks[stop].output  # noqa: B018 -- waits for it
            tracer.stop()
        out = source.output.save()
    return kept, None if stop is not None else out


def _generated(source: TransformersModel, options: dict[str, Any], remote: bool | str) -> Tensor:
    with source.generate(**options, remote=remote) as tracer:
        ids = tracer.result.save()
    return ids
