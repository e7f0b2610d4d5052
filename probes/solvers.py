"""How the weights of a probe are found, kind by kind: scikit-learn on a CPU, L-BFGS and closed forms in torch on a GPU.

All but the plain difference of means work on rows that are centred and scaled to unit variance by the training rows; what
they return reads the rows as they are.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import UserError

KINDS = {
    "logistic": "logistic regression, penalised by the squared length of its weights",
    "ridge": "least squares, penalised by the squared length of its weights",
    "mass_mean": "the difference of the classes' means",
    "mass_mean_cov": "the difference of means, whitened by the covariance within the classes",
    "sparse": "logistic regression (of a quantity: least squares), penalised by the sum of its weights' sizes",
}
PENALTY = {"logistic": 0.01, "ridge": 0.1, "mass_mean": 0.0, "mass_mean_cov": 0.1, "sparse": 0.01}
"""unless given; of mass_mean_cov it is the share of the mean variance in the covariance, as LDA's shrinkage"""
OF_QUANTITIES = ("ridge", "sparse")
ITERATIONS = 500
TOLERANCE = 1e-4
"""of the gradient, where scikit-learn stops; the torch solver stops at a tenth of it. Their directions then agree to a cosine
of 0.999 (0.9999 where there are more rows than the width), and their probabilities to 0.005"""


class Fitted(NamedTuple):
    """Scores of a row x [d] are x @ weight + bias: one log-odds of the second of two classes, one a class, or the quantity."""

    weight: Float[np.ndarray, "d c"]
    bias: Float[np.ndarray, " c"]
    converged: bool


@dataclass
class Solver:
    """Fits probes of one kind one after another, each begun where the last one ended: made once for a run over layers.

    Args:
        kind: see KINDS. n_classes: 0 for a quantity. penalty: in units of the mean loss per row.
        device: where the rows lie.
        library: scikit-learn or torch for what both can do (logistic, ridge); auto: scikit-learn on a CPU.
    """

    kind: str
    n_classes: int
    penalty: float
    device: torch.device
    library: str = "auto"
    _last: Any = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown kind of probe {self.kind!r}; allowed: {', '.join(KINDS)}")
        if not self.n_classes and self.kind not in OF_QUANTITIES:
            raise UserError(f"a {self.kind} probe tells classes apart and the label is a quantity; take "
                            f"{' or '.join(OF_QUANTITIES)}")  # fmt: skip
        if not 0 <= self.penalty < float("inf") or (self.kind == "mass_mean_cov" and self.penalty > 1):
            raise UserError(
                f"penalty {self.penalty:g} of a {self.kind} probe is out of range; usual is {PENALTY[self.kind]:g}"
            )
        if self.kind == "sparse" and self.penalty == 0:
            raise UserError("a sparse probe needs a penalty above 0; with 0 take kind='logistic'")

    @property
    def in_torch(self) -> bool:
        return self.library == "torch" or (self.library == "auto" and self.device.type != "cpu")

    def fit(self, x: Float[Tensor, "n d"], y: np.ndarray) -> Fitted:
        """The probe of rows x, float32, with classes y, int64 from 0 (or quantities, float64)."""
        mean = x.mean(0, dtype=torch.float64)
        if self.kind.startswith("mass_mean"):
            return self._means(x, y, mean)
        scale = (x - mean.to(x)).square_().mean(0, dtype=torch.float64).sqrt_()
        scale = torch.where(scale > 1e-6 * scale.max().clamp(min=1e-30), scale, torch.ones_like(scale))
        z = (x - mean.to(x)).div_(scale.to(x))
        weight, bias, converged = self._solve(z, y)
        raw = weight / scale.cpu().numpy()[:, None]
        made = Fitted(raw, bias - mean.cpu().numpy() @ raw, converged)
        if self.kind == "ridge" and self.n_classes:
            return calibrated(made, x, y)
        return made

    def _solve(self, z: Tensor, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        if self.kind == "ridge":
            return (*_least_squares(z, self._targets(y), self.penalty, self.in_torch), True)
        if self.kind == "logistic" and self.in_torch:
            return self._torch_logistic(z, y)
        return self._sklearn(z.cpu().numpy(), y)

    def _targets(self, y: np.ndarray) -> np.ndarray:
        """What least squares fits, [n, c]: the quantity; +1 and -1; 1 and 0 for each class."""
        if not self.n_classes:
            return y[:, None].astype(np.float64)
        return (2.0 * y - 1)[:, None] if self.n_classes == 2 else np.eye(self.n_classes)[y]

    def _sklearn(self, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import Lasso, LogisticRegression

        if self._last is None or np.atleast_2d(self._last.coef_).shape[1] != z.shape[1]:
            # scikit-learn sums the losses, so its C is over the rows
            common = {"C": 1 / (self.penalty * len(z)) if self.penalty else np.inf, "tol": TOLERANCE, "warm_start": True,
                      "max_iter": ITERATIONS}  # fmt: skip
            if self.kind == "logistic":
                self._last = LogisticRegression(**common)
            elif self.n_classes:
                self._last = LogisticRegression(l1_ratio=1.0, solver="saga", random_state=0, **common | {"tol": 1e-3})
            else:
                self._last = Lasso(alpha=self.penalty, max_iter=ITERATIONS, warm_start=True, tol=1e-4)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self._last.fit(z, y)
        converged = not any(issubclass(w.category, ConvergenceWarning) for w in said)
        return (
            np.atleast_2d(self._last.coef_).T.astype(np.float64),
            np.atleast_1d(self._last.intercept_).astype(np.float64),
            converged,
        )

    def _torch_logistic(self, z: Tensor, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        c, target = 1 if self.n_classes == 2 else self.n_classes, torch.from_numpy(y).to(z.device)
        if self._last is None or self._last.shape != (z.shape[1] + 1, c):
            self._last = z.new_zeros(z.shape[1] + 1, c)
        self._last, converged = minimised(z, target, self.penalty, self._last)
        solved = self._last.double().cpu().numpy()
        return solved[:-1], solved[-1], converged

    def _means(self, x: Tensor, y: np.ndarray, mean: Tensor) -> Fitted:
        classes = torch.from_numpy(y).to(x.device)
        means = (
            torch.stack([x[classes == k].mean(0, dtype=torch.float64) for k in range(self.n_classes)]) - mean
        )  # [k, d]
        weight = means.T
        if self.kind == "mass_mean_cov":
            within = x - (means + mean)[classes].to(x)
            cov = _gram(within) / len(x)
            level = float(cov.diagonal().mean())
            if not level > 0:
                raise UserError(
                    "no direction varies within the classes, so there is nothing to whiten by; take mass_mean"
                )
            cov.mul_(1 - self.penalty).diagonal().add_(self.penalty * level + 1e-9 * level)
            weight = torch.linalg.solve(cov, weight)
        bias = -0.5 * (means * weight.T).sum(1)  # half way between the means
        if self.n_classes == 2:
            weight, bias = weight[:, 1:] - weight[:, :1], bias[1:] - bias[:1]
        w, b = weight.cpu().numpy(), (bias - mean @ weight).cpu().numpy()
        return calibrated(Fitted(w, b, True), x, y)


def minimised(
    z: Float[Tensor, "n d"], target: Int64[Tensor, " n"], penalty: float, start: Float[Tensor, "d_1 c"],
    iterations: int = ITERATIONS,
) -> tuple[Float[Tensor, "d_1 c"], bool]:  # fmt: skip
    """Weights [d + 1, c], the last line the bias, of the least mean log-loss + penalty / 2 |weights|^2, by L-BFGS.

    c is 1 for two classes. Also returned: whether it converged.
    """
    from torch.nn import functional as F

    w = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([w], max_iter=iterations, tolerance_grad=TOLERANCE / 10, tolerance_change=1e-9,
                                  history_size=10, line_search_fn="strong_wolfe")  # fmt: skip
    hit = target.to(z)[:, None] if w.shape[1] == 1 else target

    def closure() -> Tensor:
        optimiser.zero_grad()
        scores = torch.addmm(w[-1], z, w[:-1])
        loss = F.binary_cross_entropy_with_logits(scores, hit) if w.shape[1] == 1 else F.cross_entropy(scores, hit)
        loss = loss + 0.5 * penalty * w[:-1].square().sum()
        loss.backward()
        return loss

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32 in a fit
    try:
        with torch.enable_grad():
            optimiser.step(closure)  # type: ignore[no-untyped-call]
            closure()
    finally:
        torch.set_float32_matmul_precision(before)
    assert w.grad is not None
    return w.detach(), bool(w.grad.abs().max() < 10 * TOLERANCE)


def _least_squares(z: Tensor, targets: np.ndarray, penalty: float, in_torch: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights [d, c] and bias [c] of ridge regression of centred rows; the smaller of the two Gram matrices is solved."""
    n, d = z.shape
    strength = (penalty or 1e-9) * n
    if not in_torch:
        from sklearn.linear_model import Ridge

        made = Ridge(alpha=strength).fit(z.cpu().numpy().astype(np.float64), targets)
        return np.reshape(made.coef_, (targets.shape[1], d)).T, np.atleast_1d(made.intercept_)
    y = torch.from_numpy(targets).to(z.device)
    bias = y.mean(0)
    if d <= n:
        gram = _gram(z)
        gram.diagonal().add_(strength)
        weight = torch.linalg.solve(gram, z.T.double() @ (y - bias))
    else:
        gram = z.double() @ z.double().T
        gram.diagonal().add_(strength)
        weight = z.T.double() @ torch.linalg.solve(gram, y - bias)
    return weight.cpu().numpy(), bias.cpu().numpy()


def _gram(x: Tensor) -> Tensor:
    """X'X in float64, some rows at a time."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(8192):
        total += part.double().T @ part.double()
    return total


def calibrated(made: Fitted, x: Float[Tensor, "n d"], y: Int64[np.ndarray, " n"]) -> Fitted:
    """The same scores times one number, plus a bias for each class, so that on these rows they are log-odds (Platt).

    What orders the rows is as before. A little penalty keeps the number finite where the classes lie apart.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, log_softmax, logsumexp, softmax

    scores = x.double().cpu().numpy() @ made.weight + made.bias  # [n, c]
    spread = float(scores.std()) or 1.0
    s, c = scores / spread, scores.shape[1]
    hit = y[:, None].astype(np.float64) if c == 1 else np.eye(c)[y]

    def loss(p: np.ndarray) -> tuple[float, np.ndarray]:
        z = p[0] * s + p[1:]
        if c == 1:
            value, slope = float(np.mean(np.logaddexp(0, z) - hit * z)), (expit(z) - hit) / len(z)
        else:
            value, slope = float(-np.mean((log_softmax(z, axis=1) * hit).sum(1))), (softmax(z, axis=1) - hit) / len(z)
        value += 0.5e-3 * float((p**2).sum())
        return value, np.r_[(slope * s).sum(), slope.sum(0)] + 1e-3 * p

    p = minimize(loss, np.r_[1.0, np.zeros(c)], jac=True, method="L-BFGS-B").x
    factor = max(float(p[0]), 1e-6) / spread
    assert np.isfinite(logsumexp(p))
    return Fitted(made.weight * factor, made.bias * factor + p[1:], made.converged)
