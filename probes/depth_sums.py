"""The curves over depth as sums over tokens, made in the hooks of one forward pass; see `depth.depth_curves`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.anatomy.attention import attention_modules, attention_weights
from workbench.errors import UserError
from workbench.models import Model
from workbench.rendering import pad
from workbench.sites import Site

from .lens_scores import divergence
from .unembedding import Unembedding

TOP = 5
BLOCK_CURVES = {
    "write": "||a + m|| / ||h||: what a block writes beside what it reads",
    "attention": "||a|| / ||h||",
    "mlp": "||m|| / ||h + a|| (of parallel blocks ||m|| / ||h||)",
    "write_cosine": "cosine of a + m with h: below 0 it erases, at 0 it adds something new, above 0 it strengthens",
    "attention_cosine": "cosine of a with h",
    "mlp_cosine": "cosine of m with the state that the MLP is added to",
    "velocity": "||h' - h|| / ||h||, h' the output of the block: the write, also where parts do not add up",
    "attention_entropy": "entropy of a token's attention over those before it (nats), mean over heads",
    "attention_similarity": "cosine of a token's attention, mean over heads, with that of the layer before",
}
STATE_CURVES = {
    "norm": "||h||",
    "final_cosine": "cosine of the state with that after the last block",
    "kl": "KL(final || logit lens), nats per token",
    "overlap": f"share of the {TOP} likeliest next tokens that the logit lens has too",
    "pair_cosine": "mean cosine of the states of two tokens of a prompt",
    "constant_share": "share of a prompt's energy in the mean of its tokens: n ||mean h||^2 / sum ||h||^2",
}
CURVES = {**BLOCK_CURVES, **STATE_CURVES}
PARTS = ("write", "attention", "mlp", "write_cosine", "attention_cosine", "mlp_cosine")
BY_PROMPT = ("pair_cosine", "constant_share")


class CurveSums:
    """Sums of every curve over the tokens of each of n prompts; `run` adds those of a batch.

    Attributes: `sums` {curve: [layers, n]}, `counts` {curve: [n]}, `states` (the sum of the states after each block),
    `even`, `identity`, `parallel`, `notes`; see `depth.DepthCurves`.
    """

    def __init__(self, model: Model, n: int, *, lens: bool, attention: bool) -> None:
        self.model, self.notes = model, list[str]()
        layers = range(model.n_layers)
        missing = {
            p: why for l in layers for p, why in model.anatomy[l].missing.items() if p in ("attn_out", "mlp_out")
        }
        self.adds = not missing
        self.parallel = any(model.anatomy[l].parallel for l in layers)
        if missing:
            self.notes.append(f"no {' and '.join(missing)}: {next(iter(missing.values()))}")
        self.unembed = self._optional(lambda: Unembedding.of(model)) if lens else None
        self.modules = self._optional(lambda: attention_modules(model, layers)) if attention else None
        left_out = {*(() if self.adds else PARTS), *(() if self.unembed else ("kl", "overlap")),
                    *(() if self.modules else ("attention_entropy", "attention_similarity"))}  # fmt: skip
        lines = {**dict.fromkeys(BLOCK_CURVES, model.n_layers), **dict.fromkeys(STATE_CURVES, model.n_layers + 1)}
        self.sums = {name: torch.zeros(lines[name], n, dtype=torch.float64) for name in CURVES if name not in left_out}
        self.counts = {name: torch.zeros(n, dtype=torch.float64) for name in self.sums}
        self.states = torch.zeros(model.n_layers, model.width, dtype=torch.float64)
        self.even, self.identity = 0.0, 0.0 if self.adds else float("nan")

    def _optional(self, find: Any) -> Any:
        try:
            return find()
        except UserError as err:
            self.notes.append(str(err))
            return None

    def run(self, rows: Sequence[Sequence[int]], index: Sequence[int]) -> None:
        """Runs a batch of encoded prompts and adds what it finds to the prompts of these numbers."""
        ids, mask = pad([list(row) for row in rows], self.model.pad_id, "right")
        self._kept = mask.bool()
        self._kept[:, 0] = False
        self._row, self._index = self._kept.nonzero()[:, 0], torch.tensor(list(index))
        self._stream: list[Tensor] = []
        self._parts: dict[str, Tensor] = {}
        self._written: Tensor | None = None
        self._before: tuple[int, Tensor] | None = None
        points = [Site(0, "resid_pre"), *(Site(l) for l in range(self.model.n_layers))]
        if self.adds:
            points += [Site(l, p) for l in range(self.model.n_layers) for p in ("attn_out", "mlp_out")]
        listening: AbstractContextManager[Any] = nullcontext()
        if self.modules is not None:
            listening = attention_weights(self.model, self.modules, self._listen)
        with listening, self.model.read(points, self._take):
            self.model.run(ids, mask)
        self._end()

    def _take(self, site: Site, h: Float[Tensor, "b t d"]) -> Tensor:
        rows = h[self._kept.to(h.device)]
        if site.point in ("attn_out", "mlp_out"):
            self._parts[site.point] = rows
        else:
            if site.point == "resid_post":
                self._block(site.layer, self._stream[-1].to(h.device).float(), rows.float())
            self._stream.append(rows)
        return h.new_empty(0)  # what is wanted is kept here

    def _block(self, layer: int, pre: Float[Tensor, "n d"], post: Float[Tensor, "n d"]) -> None:
        self.states[layer] += post.double().sum(0).cpu()
        found = {"velocity": (post - pre).norm(dim=-1) / pre.norm(dim=-1)}
        if self.adds:
            a, m = (self._parts.pop(p).to(pre.device).float() for p in ("attn_out", "mlp_out"))
            middle = pre if self.model.anatomy[layer].parallel else pre + a
            for name, part, base in (("write", a + m, pre), ("attention", a, pre), ("mlp", m, middle)):
                found[name] = part.norm(dim=-1) / base.norm(dim=-1)
                found[f"{name}_cosine"] = torch.cosine_similarity(part, base, dim=-1)
            written = a + m if self._written is None else self._written.to(a.device) + a + m
            self._written = written
        self._add(layer, found)

    def _end(self) -> None:
        """What compares with the last state, once it is there; and what is of the prompt as a whole."""
        last = self._stream[-1].float()
        if not bool(torch.isfinite(last).all()):
            raise UserError(f"{self.model.name}: states after the last block hold NaN or Inf; load it in float32")
        if self._written is not None and len(last):
            moved = last - self._stream[0].to(last.device).float()
            gap = (moved - self._written.to(last.device)).norm(dim=-1) / moved.norm(dim=-1)
            self.identity = max(self.identity, float(gap.nan_to_num(0.0).max()))
        for i, states in enumerate(self._stream):
            h = states.float()
            found = {"norm": h.norm(dim=-1), "final_cosine": torch.cosine_similarity(h, last.to(h.device), dim=-1)}
            self._add(i, found)
            self._uniformity(i, h)
        if self.unembed is not None:
            self._lens(self.unembed)
        tokens = torch.zeros(len(self._index), dtype=torch.float64)
        tokens.index_add_(0, self._row, torch.ones(len(self._row), dtype=torch.float64))
        for name, counts in self.counts.items():
            counts[self._index] = (tokens > 1).double() if name in BY_PROMPT else tokens
        self.even += float((self._kept.nonzero()[:, 1] + 1).double().log().sum())
        self._stream, self._written, self._before = [], None, None

    def _uniformity(self, line: int, h: Float[Tensor, "n d"]) -> None:
        sizes = self._kept.sum(
            1
        ).tolist()  # rows stand prompt by prompt; sums by index would differ from run to run on a GPU
        found = torch.zeros(2, len(sizes), dtype=torch.float64)
        for i, part in enumerate(h.split(sizes)):
            n = len(part)
            if n > 1:
                units = (part / part.norm(dim=-1, keepdim=True)).sum(0).square().sum()
                share = part.sum(0).square().sum() / (n * part.square().sum())
                found[:, i] = torch.stack([(units - n) / (n * (n - 1)), share]).cpu()
        for name, value in zip(BY_PROMPT, found, strict=True):
            self.sums[name][line, self._index] += value

    def _lens(self, unembed: Unembedding) -> None:
        for part in unembed.batches(self._stream[-1]):
            p = unembed.log_probabilities(self._stream[-1][part])
            best = p.topk(TOP, -1).indices
            for i, states in enumerate(self._stream):
                q = unembed.log_probabilities(states[part]).to(p.device)
                both = (best[:, :, None] == q.topk(TOP, -1).indices[:, None, :]).any(-1)
                self._add(i, {"kl": divergence(p, q), "overlap": both.float().mean(-1)}, self._row[part])

    def _listen(self, layer: int, weights: Float[Tensor, "b h t t"]) -> None:
        entropy = torch.stack([torch.special.entr(w.float()).sum(-1).mean(0) for w in weights])  # a prompt at a time
        mean = weights.mean(1, dtype=torch.float32)
        kept = self._kept.to(mean.device)
        found = {"attention_entropy": entropy[kept]}
        if self._before is not None and self._before[0] == layer - 1:
            other = self._before[1].to(mean.device)
            found["attention_similarity"] = torch.cosine_similarity(mean[kept], other[kept], dim=-1)
        self._before = (layer, mean)
        self._add(layer, found)
        if "attention_similarity" not in found:
            self.sums["attention_similarity"][layer, self._index] = torch.nan  # the first has none before it

    def _add(self, line: int, found: dict[str, Float[Tensor, " n"]], row: Tensor | None = None) -> None:
        """Adds values of tokens to the sums of their prompts; one copy to the host for all of them."""
        stacked = torch.stack([value.double() for value in found.values()], 1).cpu()  # added there, in one order
        row = self._row if row is None else row
        sums = stacked.new_zeros(len(self._index), len(found)).index_add_(0, row, stacked)
        for j, name in enumerate(found):
            self.sums[name][line, self._index] += sums[:, j]
