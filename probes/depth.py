"""What each layer of a model adds to its residual stream, over prompts: sizes, directions, and how near the end is.

A block reads h_l and writes a_l (attention) and m_l (MLP), h_{l+1} = h_l + a_l + m_l; where that holds (see
`DepthCurves.identity`), the curves over l are shares of one sum. One pass, a batch at a time; of a batch the stream is held
once and everything else is summed up where it comes about. Sources: arXiv:2505.13898 (writes, cosines, lens), 2502.02040
(velocity, cosine to the end), 2203.05962 (uniformity), 2103.11886 (attention similarity).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError
from workbench.evaluate.scoring import Sequences, ratio_interval
from workbench.evaluate.statistics import Interval
from workbench.models import Model
from workbench.progress import progress
from workbench.sites import Site

from .depth_sums import BLOCK_CURVES, CURVES, CurveSums
from .lens import site_word
from .lens_rows import BATCH_TOKENS, batches_of

if TYPE_CHECKING:
    import pandas as pd

STREAM_BYTES = 1 << 30
"""of the states of a batch at every layer, which are held until it has run"""


@dataclass(frozen=True, eq=False)
class DepthCurves:
    """Sums over the tokens of each of n prompts, by curve (`depth_sums.CURVES` says what each is) and layer.

    Position 0 of a prompt is left out: BOS, or the token that holds the massive activations in its place.
    """

    model: str
    n_layers: int
    sums: Mapping[str, Float[Tensor, "_l n"]] = field(repr=False)
    """curves of blocks have a line for each block, the others one more, the embeddings first"""
    counts: Mapping[str, Float[Tensor, " n"]] = field(repr=False)
    """tokens of each prompt, or, of what is one number for a prompt, 1"""
    means: Float[Tensor, "l d"] = field(repr=False)
    """the mean state after each block"""
    identity: float
    """largest ||(h_L - h_0) - sum of the writes|| / ||h_L - h_0|| of any token; NaN where writes cannot be read"""
    uniform_entropy: float
    """mean entropy (nats) of attention that is even over all tokens before: what attention_entropy is at most"""
    parallel: bool
    """whether attention and MLP read the same state: then mlp and mlp_cosine are of h_l, else of h_l + a_l"""
    notes: tuple[str, ...]
    """what could not be measured, and why"""

    def __repr__(self) -> str:
        size = next(iter(self.counts.values()))
        return f"DepthCurves({self.model}, {self.n_layers} layers, {len(size)} prompts, {', '.join(self.curves)})"

    @property
    def curves(self) -> list[str]:
        return [name for name in CURVES if name in self.sums]

    def mean(self, curve: str, layer: int) -> Interval:
        """Mean over tokens (over prompts, of uniformity), with Student's interval over prompts.

        layer: of a block; -1 is the embeddings, of curves that have them.
        """
        if curve not in self.sums:
            raise UserError(f"no curve {curve!r} of {self.model}; there are {', '.join(self.curves)}")
        first = 0 if curve in BLOCK_CURVES else -1
        if not first <= layer < self.n_layers:
            raise UserError(f"no layer {layer} in {curve}; it has {first} to {self.n_layers - 1}")
        counts, found = self.counts[curve], self.sums[curve][layer - first]
        kept = (counts > 0) & found.isfinite()
        if not bool(kept.any()):
            return Interval(float("nan"), float("nan"), float("nan"))
        return ratio_interval(found[kept], counts[kept])

    def frame(self) -> pd.DataFrame:
        """One line per curve and layer: curve, site, layer (a word), value, low, high, prompts."""
        import pandas as pd

        lines: list[dict[str, Any]] = []
        sites = [str(site) for site in self.sites]
        words = [site_word(site) for site in self.sites]
        for curve in self.curves:
            for layer in range(0 if curve in BLOCK_CURVES else -1, self.n_layers):
                found = self.mean(curve, layer)
                line = {"curve": curve, "site": sites[layer + 1], "layer": words[layer + 1], **found.as_dict()}
                lines.append(line | {"prompts": int((self.counts[curve] > 0).sum())})
        return pd.DataFrame(lines)

    @property
    def sites(self) -> list[Site]:
        """Where states are read: the embeddings and the output of every block."""
        return [Site(0, "resid_pre"), *(Site(layer) for layer in range(self.n_layers))]

    def _repr_html_(self) -> str:
        table = self.frame().pivot(index="curve", columns="layer", values="value")
        order = [site_word(site) for site in self.sites]
        return str(table.reindex(index=self.curves, columns=order).to_html(float_format="{:.4g}".format, na_rep=""))


def depth_curves(
    model: Model,
    prompts: Any,
    *,
    lens: bool = True,
    attention: bool = True,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> DepthCurves:
    """Every curve over the layers of a model, in one forward pass over the prompts.

    What a family does not have (parts of a block that add up, a head that can be told apart, attention weights) is left out,
    and the notes say why.

    Args:
        prompts: anything that `PromptSet.load` reads, or `Sequences`.
        lens: KL and top-5 overlap of the logit lens; its cost is that of the head at every layer.
        attention: entropy and similarity; the pass then runs eager attention, whose weights are held a layer at a time.
        batch_tokens: of a pass, padding included; fewer where the stream of a batch would not fit in 1 GiB.

    Raises UserError for prompts without a second token, and for states that are not finite.

    >>> depth_curves(load("bundled:donor"), "bundled:profile").mean("write", 0)     # doctest: +SKIP
    """
    sequences = prompts if isinstance(prompts, Sequences) else Sequences.of(model, prompts, max_length)
    each = (model.n_layers + 1) * model.width * model.dtype.itemsize
    batches = batches_of(sequences, range(len(sequences)), max(1, min(batch_tokens, STREAM_BYTES // each)))
    sums = CurveSums(model, len(sequences), lens=lens, attention=attention)
    with torch.inference_mode():
        for batch in progress(batches, desc="curves over depth", unit="batch"):
            sums.run([sequences.ids[i] for i in batch], batch)
    tokens = sums.counts["norm"]
    return DepthCurves(
        model.name, model.n_layers, sums.sums, sums.counts, sums.states / tokens.sum(), sums.identity,
        float(sums.even / tokens.sum()), sums.parallel, tuple(sums.notes),
    )  # fmt: skip
