"""Whether the backends agree with a model and with one another, layer by layer, and what each of them costs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import NAMES, open_backend
from .backends.torch_hooks import FLOW
from .errors import UserError
from .models import Model, load
from .rendering import pad
from .sites import Site, text_config

if TYPE_CHECKING:
    from .backends.torch_hooks import Where

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""the largest difference that is let pass, in units of the norm of the residual stream at the same token and layer"""
LENGTHS = (24, 17, 9, 2)
NEW_TOKENS = 8
MODEL, LOGITS, EDITED = "model", "logits", "edited "
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """How far a backend is from what it is compared with, at one site, or in the logits.

    against: `model` (Hugging Face's own hidden states and logits) or the name of the first backend. largest: the largest
    absolute difference of an element. relative: the largest norm of a token's difference, in units of the norm of the
    residual stream there (of the logits or the activations themselves at `logits` and `mlp_act`).
    """

    backend: str
    against: str
    what: str
    largest: float
    relative: float
    agrees: bool


@dataclass(frozen=True)
class Tried:
    """One backend: the points that it has at every layer, and on some layers alone; the time of a pass with every
    resid_post read, in units of a plain forward pass; why it was not tried, where it was not."""

    name: str
    points: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()
    cost: float | None = None
    same_tokens: bool | None = None
    refused: str = ""


@dataclass(frozen=True)
class Agreement:
    """What `verify_backends` found. `agrees` is False where any difference is beyond the tolerance of the dtype, and in
    float32 where other tokens are generated (in half precision two tokens are often equally likely)."""

    model: str
    family: str
    dtype: str
    tolerance: float
    norms: dict[int, float]
    backends: tuple[Tried, ...]
    differences: tuple[Difference, ...] = field(repr=False)

    @property
    def agrees(self) -> bool:
        same = self.dtype not in ("float32", "float64") or all(b.same_tokens is not False for b in self.backends)
        return same and all(d.agrees for d in self.differences)

    def worst(self, backend: str) -> Difference | None:
        """The largest difference of a backend; None where it was not tried."""
        found = [d for d in self.differences if d.backend == backend]
        return max(found, key=lambda d: d.relative, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {"agrees": self.agrees, **asdict(self)}


def verify_backends(
    source: str | Path | Any,
    *,
    tokenizer: Any = None,
    layers: Sequence[int] | None = None,
    backends: Sequence[str] = NAMES,
    dtype: str = "auto",
    device: str = "auto",
    repeats: int = 5,
) -> Agreement:
    """Compares backends with Hugging Face's own hidden states, and with the first of them where it gives none.

    Compared are the states at every point of `layers` (all), the logits, the states and logits under an edit, and the
    tokens of a greedy generation under it. The weights are held once: nnsight shares them, and TransformerLens, which
    changes the module that it wraps, comes last. source and the rest: as `load` takes them; of a loaded model a copy is
    made where TransformerLens is among the backends. repeats: passes of which the median time is taken.

    A backend that does not take the model says why in `refused`. Raises UserError for what `load` refuses, and for
    unknown backends and layers.
    """
    unknown = [name for name in backends if name not in NAMES]
    if unknown or not backends:
        raise UserError(f"unknown backend {', '.join(map(repr, unknown)) or '(none)'}; allowed: {', '.join(NAMES)}")
    if not isinstance(source, (str, Path)) and "transformer-lens" in backends:
        source = copy.deepcopy(source)
    plain = load(source, tokenizer=tokenizer, dtype=dtype, device=device, prove=False)
    chosen = sorted({plain.site(layer).layer for layer in (range(plain.n_layers) if layers is None else layers)})
    run = _Run(plain, chosen, repeats)
    ordered = sorted(dict.fromkeys(backends), key=("hooks", "nnsight", "transformer-lens").index)
    tried = [run.tried(name) for name in ordered]
    return Agreement(
        plain.name, plain.family, run.dtype, run.tolerance, run.norms, tuple(tried), tuple(run.differences)
    )


class _Run:
    """The batches, what the model itself gives for them, and what was found so far."""

    def __init__(self, model: Model, layers: list[int], repeats: int) -> None:
        self.model, self.layers, self.repeats = model, layers, repeats
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.tolerance = TOLERANCE.get(self.dtype, TOLERANCE["bfloat16"])
        generator = torch.Generator().manual_seed(0)
        rows = [
            torch.randint(text_config(model.module).vocab_size, (n,), generator=generator).tolist() for n in LENGTHS
        ]
        self.right, self.left = pad(rows, model.pad_id, "right"), pad(rows, model.pad_id, "left")
        self.differences: list[Difference] = []
        self.first: tuple[str, Found, Tensor] | None = None  # the first backend, what it found, and what it generated
        with torch.inference_mode():
            self.given = _given(model, layers, *self.right)
            self.plain_seconds = self._median(self._forward)
            with model.read([Site(layer) for layer in layers]) as seen:
                model.run(*self.right)
        self.norms_at = {l: _real(seen[Site(l)], self.right[1]).norm(dim=-1).clamp(min=1e-6) for l in layers}
        self.norms = {layer: float(norms.mean()) for layer, norms in self.norms_at.items()}

    def tried(self, name: str) -> Tried:
        plain = self.model
        try:
            backend = open_backend(name, plain.module, plain.tokenizer)
            model = Model(
                plain.module, plain.tokenizer, plain.name, plain.folder, plain.revision, plain.blocks_path, backend
            )
            model.prove()
        except UserError as err:
            return Tried(name, refused=str(err))
        found = self._states(model)
        self._compare(name, MODEL, found, self.given)
        tokens = self._generated(model)
        if self.first is None:
            self.first = name, found, tokens
        else:
            self._compare(name, self.first[0], found, {k: h for k, h in self.first[1].items() if k not in self.given})
        by_layer = [set(model.anatomy[layer].points) for layer in self.layers]
        every, some = set.intersection(*by_layer), set.union(*by_layer)
        return Tried(
            name,
            points=tuple(point for point in FLOW if point in every),
            partly=tuple(point for point in FLOW if point in some - every),
            cost=self._cost(model),
            same_tokens=torch.equal(tokens, self.first[2]),
        )

    def _states(self, model: Model) -> Found:
        """Every point of the layers and the logits, plain (right-padded) and under an edit (left-padded)."""
        sites = [Site(layer, point) for layer in self.layers for point in model.anatomy[layer].points]
        found: Found = {}
        with torch.inference_mode():
            with model.read(sites, take=self._take(self.right[1])) as seen:
                found[LOGITS] = _real(model.logits(*self.right), self.right[1])
            found |= {str(site): h for site, h in seen.items()}
            with self._edited(model), model.read([Site(l) for l in self.layers], take=self._take(self.left[1])) as seen:
                found[EDITED + LOGITS] = _real(model.logits(*self.left), self.left[1])
            found |= {EDITED + str(site): h for site, h in seen.items()}
        return found

    @staticmethod
    def _take(mask: Tensor) -> Callable[[Site, Tensor], Tensor]:
        return lambda site, h: _real(h, mask)

    def _edited(self, model: Model) -> AbstractContextManager[None]:
        """The model with a direction, as long as the states are, added to the last prompt token in the middle."""
        layer = self.layers[len(self.layers) // 2]
        direction = torch.linspace(-1, 1, model.width)
        direction *= self.norms[layer] / direction.norm()

        def edit(h: Tensor, where: Where) -> Tensor:
            return h + where.mask("last")[..., None] * direction.to(h.device, h.dtype)

        return model.edit({Site(layer): edit})

    def _compare(self, name: str, against: str, found: Found, wanted: Found) -> None:
        for what in sorted(found.keys() & wanted.keys(), key=list(found).index):
            a, b = found[what], wanted[what]
            site = None if LOGITS in what else Site.parse(what.removeprefix(EDITED))
            own = site is None or site.point == "mlp_act" or what.startswith(EDITED)
            size = b.norm(dim=-1).clamp(min=1e-6) if own or site is None else self.norms_at[site.layer]
            relative = float(((a - b).norm(dim=-1) / size).max())
            largest = float((a - b).abs().max())
            self.differences.append(Difference(name, against, what, largest, relative, relative <= self.tolerance))

    def _generated(self, model: Model) -> Tensor:
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=model.pad_id
        )
        ids, mask = (t.to(model.device) for t in self.left)
        options = {"input_ids": ids, "attention_mask": mask, "generation_config": config}
        with torch.inference_mode(), self._edited(model):
            return model.backend.call(model, "generate", options).cpu()

    def _forward(self) -> None:
        ids, mask = (t.to(self.model.device) for t in self.right)
        self.model.module(input_ids=ids, attention_mask=mask, use_cache=False)

    def _cost(self, model: Model) -> float:
        def reading() -> None:
            with model.read([Site(layer) for layer in range(model.n_layers)]):
                model.logits(*self.right)

        with torch.inference_mode():
            return self._median(reading) / self.plain_seconds

    def _median(self, call: Callable[[], None]) -> float:
        times = []
        for _ in range(self.repeats + 1):
            start = time.perf_counter()
            call()
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])  # the first warms up


def _real(states: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens, [n, width], in float64 on the CPU (what stands at padding means nothing)."""
    return states[mask.bool().to(states.device)].double().cpu()


def _given(model: Model, layers: list[int], ids: Tensor, mask: Tensor) -> Found:
    """What Hugging Face itself gives for resid_post, and the logits.

    Its last hidden state is after the final norm; a family on which that cannot be turned off has none for the last layer.
    """
    options = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
    with _untied(model):
        out = model.module(**options, output_hidden_states=True)
    normed = model.decoder(**options).last_hidden_state
    states = out.hidden_states
    found = {str(Site(l)): _real(states[l + 1], mask) for l in layers
             if l + 1 < model.n_layers or not torch.equal(states[-1], normed)}  # fmt: skip
    return {**found, LOGITS: _real(out.logits, mask)}


@contextmanager
def _untied(model: Model) -> Iterator[None]:
    """Inside the block, Hugging Face's last hidden state is that of the last block, before the final norm."""
    configs: list[Any] = [model.module.config, text_config(model.module), model.decoder.config]
    was = [(config, vars(config).get("tie_last_hidden_states")) for config in {id(c): c for c in configs}.values()]
    try:
        for config, _ in was:
            config.tie_last_hidden_states = False
        yield
    finally:
        for config, value in was:
            del config.tie_last_hidden_states
            if value is not None:
                config.tie_last_hidden_states = value
