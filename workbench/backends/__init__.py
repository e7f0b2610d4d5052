"""Reading and editing activations: one contract, three implementations.

| name | what it is | on which models |
|---|---|---|
| `hooks` | plain torch hooks (`torch_hooks`); the default, and the fastest | every decoder whose blocks are found |
| `transformer-lens` | the hook points of a `TransformerBridge` | the families that TransformerLens has an adapter for |
| `nnsight` | a trace of a `TransformersModel`, here or on NDIF | every decoder that plain hooks can read |

A backend is a value without state of the caller's: `Model` keeps one and passes itself. What is read and what an edit
does mean the same on all of them, to 1e-5 in float32; `workbench verify MODEL` shows it for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from ..anatomy import Anatomy
    from ..models import Model
    from ..sites import Site

NAMES = ("hooks", "transformer-lens", "nnsight")
Method = Literal["decoder", "module", "generate"]
"""what of a model is called: its decoder (no LM head), the whole of it, or its `generate`"""


@runtime_checkable
class Backend(Protocol):
    """What a backend does for a `Model`.

    Attributes:
        name: one of `NAMES`.
    """

    name: str

    def anatomy(self, model: Model) -> list[Anatomy]:
        """What of each block it can reach, and why not the rest."""
        ...

    def read(
        self, model: Model, sites: Sequence[Site], take: Callable[[Site, Tensor], Tensor] | None = None
    ) -> AbstractContextManager[dict[Site, Tensor]]:
        """Captures the states at `sites` in every call of the model inside the block; the last pass wins.

        `take(site, h)` runs while the pass does, and what it returns is kept in place of h. Raises UserError for a site
        that the model does not have, or that this backend cannot reach.
        """
        ...

    def edit(
        self, model: Model, edits: Mapping[Site, Callable[..., Tensor]], prompt_lengths: Any = None
    ) -> AbstractContextManager[None]:
        """Replaces the states h at each site by `fn(h, where)` in every call of the model inside the block.

        Blocks nest: what is entered later sees what was written before. Nothing is left behind, an exception included.
        """
        ...

    def call(self, model: Model, method: Method, options: Mapping[str, Any], stop_after: int | None = None) -> Any:
        """Calls the model with the keyword arguments `options`, under every read and edit that is entered.

        With `stop_after`, the pass ends once that block has run, and None is returned.
        """
        ...


def open_backend(name: str, module: Any, tokenizer: Any) -> Backend:
    """A backend of `NAMES` for a Hugging Face model, which `transformer-lens` changes for good, and `nnsight` instruments.

    Raises UserError where TransformerLens cannot wrap the model.
    """
    if name == "transformer-lens":
        from .transformer_lens import TransformerLensBackend, bridge_of

        return TransformerLensBackend(bridge_of(module))
    if name == "nnsight":
        from .nnsight import NnsightBackend, adopted

        return NnsightBackend(adopted(module, tokenizer))
    from .hooks import HooksBackend

    return HooksBackend()


def held_by(source: Any) -> tuple[Any, Any, Backend] | None:
    """The Hugging Face model in a TransformerBridge or an nnsight model, its tokenizer, and the backend; else None."""
    kinds = {base.__module__.partition(".")[0] for base in type(source).__mro__}
    if "transformer_lens" in kinds:
        from . import transformer_lens

        return *transformer_lens.opened(source), transformer_lens.TransformerLensBackend(source)
    if "nnsight" in kinds:
        from . import nnsight

        return *nnsight.opened(source), nnsight.NnsightBackend(source)
    return None
