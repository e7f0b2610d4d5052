"""Dictionary: a sparse autoencoder over one site, of any of the four kinds, and what it makes of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.sites import Site

KINDS = ("relu", "jumprelu", "topk", "gated")
NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")
LAYER_NORM_EPS = 1e-5  # SAELens adds it to the deviation, not to the variance
# which parameters a kind has beside the four that all have
EXTRA = {"relu": (), "jumprelu": ("threshold",), "topk": ("k",), "gated": ("r_mag", "b_mag")}


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder of f features over rows of width d.

    With z = normalised(h), less b_dec where `subtract_b_dec`, and p = z @ W_enc + b_enc:

        relu      a = relu(p)
        jumprelu  a = p where p > threshold and p > 0, else 0
        topk      a = relu(p) of the k largest p of a row, else 0
        gated     a = relu((z @ W_enc) * exp(r_mag) + b_mag) where p > 0, else 0 (b_enc is the bias of the gate)

    and the reconstruction is denormalised(a @ W_dec + b_dec).

    Args:
        W_enc [d, f], b_enc [f], W_dec [f, d], b_dec [d], kind: as above.
        threshold [f], k, r_mag [f], b_mag [f]: of the kinds that have them.
        subtract_b_dec: SAELens's apply_b_dec_to_input.
        normalise: `none`; `constant_norm_rescale` (each row scaled to length sqrt(d)); `layer_norm` (each row centred
            and divided by its unbiased deviation + 1e-5). Undone after decoding, with the row's own constants.
        site: where it belongs, such as `resid_post.20`; None where its file does not say.
        model: the name of the model it was trained on; empty where unknown.
        meta: what else its file said; JSON values only, no part of `==`.

    Raises:
        UserError: shapes that do not fit together, a kind without its parameters, an unknown kind or normalisation.

    >>> one = Dictionary(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), "jumprelu", threshold=torch.ones(2))
    >>> one.encode(torch.tensor([[0.5, 3.0]])).tolist()
    [[0.0, 3.0]]

    Source: SAELens `sae_lens/saes`; dictionary_learning `dictionary.py`; Gemma Scope (arXiv:2408.05147).
    """

    W_enc: Float[Tensor, "d f"]
    b_enc: Float[Tensor, " f_bias"]
    W_dec: Float[Tensor, "f_dec d_dec"]
    b_dec: Float[Tensor, " d_bias"]
    kind: str
    threshold: Float[Tensor, " f_threshold"] | None = None
    k: int | None = None
    r_mag: Float[Tensor, " f_r"] | None = None
    b_mag: Float[Tensor, " f_mag"] | None = None
    subtract_b_dec: bool = False
    normalise: str = "none"
    site: str | None = None
    model: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown kind of dictionary {self.kind!r}; allowed: {', '.join(KINDS)}")
        if self.normalise not in NORMALISATIONS:
            raise UserError(f"unknown normalisation {self.normalise!r}; allowed: {', '.join(NORMALISATIONS)}")
        if self.W_enc.ndim != 2:
            raise UserError(f"a dictionary needs W_enc [d, f]; got shape {list(self.W_enc.shape)}")
        d, f = self.W_enc.shape
        wanted: dict[str, list[int]] = {"b_enc": [f], "W_dec": [f, d], "b_dec": [d]}
        wanted |= {name: [f] for name in EXTRA[self.kind] if name != "k"}
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is None:
                raise UserError(f"a dictionary of kind {self.kind} needs {name} {shape}; it is missing")
            if list(value.shape) != shape:
                raise UserError(f"a dictionary with W_enc {[d, f]} needs {name} {shape}; got {list(value.shape)}")
        if self.kind == "topk" and not (self.k is not None and 1 <= self.k <= f):
            raise UserError(f"a topk dictionary needs k in 1..{f}; got {self.k}")

    def __repr__(self) -> str:
        return f"Dictionary({self.kind}, {self.n_features} features, width {self.width}, {self.site or 'site unknown'})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dictionary):
            return NotImplemented
        plain = ("kind", "k", "subtract_b_dec", "normalise", "site", "model")
        mine, theirs = self.tensors, other.tensors
        return (
            all(getattr(self, name) == getattr(other, name) for name in plain)
            and mine.keys() == theirs.keys()
            and all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine)
        )

    @property
    def width(self) -> int:
        """d, the width of the rows that it reads."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, those of other kinds left out."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", *(n for n in EXTRA[self.kind] if n != "k"))
        return {name: getattr(self, name) for name in names}

    @property
    def directions(self) -> Float[Tensor, "f d"]:
        """The rows of W_dec at length 1: what a feature writes, whatever its strength."""
        return self.W_dec / (self.W_dec.norm(dim=1, keepdim=True) + 1e-12)

    def encode(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """The features of each row, in the dtype and on the device of the dictionary."""
        self.check(width=h.shape[-1])
        z, _, _ = self._normalised(h.to(self.W_enc))
        if self.subtract_b_dec:
            z = z - self.b_dec
        bare = z @ self.W_enc
        p = bare + self.b_enc
        if self.kind == "relu":
            return p.relu()
        if self.kind == "jumprelu":
            return torch.where(p > self.threshold, p, 0.0).relu()
        if self.kind == "gated":
            assert self.r_mag is not None
            return torch.where(p > 0, bare * self.r_mag.exp() + self.b_mag, 0.0).relu()
        top = p.topk(self.k or 1, dim=-1)
        return torch.zeros_like(p).scatter_(-1, top.indices, top.values.relu())

    def decode(self, a: Float[Tensor, "n f"], h: Float[Tensor, "n d"] | None = None) -> Float[Tensor, "n d"]:
        """The rows that features stand for, a @ W_dec + b_dec.

        h: the rows that were encoded, whose mean and length go back in; needed by a dictionary that normalises.
        """
        out = a.to(self.W_dec) @ self.W_dec + self.b_dec
        if self.normalise == "none":
            return out
        if h is None:
            raise UserError(f"this dictionary normalises its rows ({self.normalise}): give decode the rows too, "
                            "decode(a, h)")  # fmt: skip
        _, mean, scale = self._normalised(h.to(self.W_dec))
        return out * scale + mean

    def __call__(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The reconstruction of each row."""
        return self.decode(self.encode(h), h)

    def select(self, features: Sequence[int] | Int[Tensor, " g"]) -> Dictionary:
        """The dictionary of some features alone, in the order given: they fire as they did.

        Raises UserError for a feature that there is not, and for topk, where features compete.
        """
        if self.kind == "topk":
            raise UserError("features of a topk dictionary fire or not by what the others do; encode with all of them")
        index = check_features(features, self.n_features).to(self.W_enc.device)
        parts = {name: value[index] for name, value in self.tensors.items() if name not in ("W_enc", "b_dec")}
        return replace(self, W_enc=self.W_enc[:, index], **parts)

    def check(
        self, *, width: int | None = None, site: Site | str | int | None = None, model: str | None = None
    ) -> None:
        """Raises UserError, in one line, where the dictionary is of another width, site or model than what is given."""
        of = f"this dictionary ({self.site or 'site unknown'}{f' of {self.model}' if self.model else ''})"
        if width is not None and width != self.width:
            raise UserError(f"{of} reads rows of width {self.width}; got width {width}: use one trained on this model")
        if site is not None and self.site is not None and Site.parse(site) != Site.parse(self.site):
            raise UserError(f"{of} does not belong to {Site.parse(site)}; load the one of that layer")
        if model is not None and self.model and model != self.model:
            raise UserError(f"{of} was trained on another model than {model}; load one that was trained on it")

    def to(self, *args: Any, **kwargs: Any) -> Dictionary:
        """As `Tensor.to`: another device or dtype."""
        return replace(self, **{name: value.to(*args, **kwargs) for name, value in self.tensors.items()})

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes a folder in the SAELens format: cfg.json + sae_weights.safetensors."""
        from .dictionary_files import write_saelens

        write_saelens(self, Path(path), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, *, scale: float | None = None) -> Dictionary:
        """Reads a dictionary: SAELens, Gemma Scope or dictionary_learning, told apart by the files in the folder.

        Args:
            path: a folder with cfg.json + sae_weights.safetensors (SAELens), params.npz (Gemma Scope), or config.json +
                ae.pt (dictionary_learning); one of those weight files itself; or `bundled:NAME`.
            scale: the factor that activations were multiplied by in training, where a SAELens dictionary was trained
                with `expected_average_only_in` and its file does not say it; it is folded into the weights.

        Raises:
            UserError: anything missing, damaged, of an unknown kind, or larger than its file can honestly hold.
        """
        from .dictionary_files import read_dictionary

        return read_dictionary(path, scale)

    def _normalised(self, h: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """(rows as the encoder takes them, what to add, what to multiply with, when they are decoded)."""
        if self.normalise == "constant_norm_rescale":
            length = h.norm(dim=-1, keepdim=True) / self.width**0.5
            return h / length, 0.0, length
        if self.normalise == "layer_norm":
            mean = h.mean(-1, keepdim=True)
            deviation = (h - mean).std(-1, keepdim=True)
            return (h - mean) / (deviation + LAYER_NORM_EPS), mean, deviation
        return h, 0.0, 1.0


def check_features(features: Sequence[int] | Int[Tensor, " g"], n: int) -> Int[Tensor, " g"]:
    """Feature ids as a tensor; UserError for none, one twice, or one outside 0..n-1."""
    index = torch.as_tensor(features if isinstance(features, Tensor) else list(features)).long().flatten()
    if not len(index) or int(index.min()) < 0 or int(index.max()) >= n:
        got = "none" if not len(index) else f"{int(index.min())} to {int(index.max())}"
        raise UserError(f"this dictionary has features 0 to {n - 1}; got {got}")
    if len(index.unique()) != len(index):
        raise UserError("a feature is named twice; name each once")
    return index
