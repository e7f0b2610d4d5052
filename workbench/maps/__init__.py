"""Linear maps between rows of activations: fitting, composing, scoring, saving. Tensors only; no models."""

from __future__ import annotations

from .autoencoder import ReluMap, fit_autoencoder
from .baselines import BASELINES, baseline
from .cca import CanonicalCorrelations, SubspaceSize, subspace_size
from .family import METHODS, Candidate, MapFit, fit_map
from .fit import fit_pinv, fit_procrustes, fit_ridge, fit_ridge_moments, fold_ids, ridge_path
from .grouped import GroupedMoments, plan_passes
from .jackknife import Estimate, leave_out_shards
from .leverage import LeaveOneOut, leave_one_out
from .linear_map import LinearMap
from .moments import Moments, total
from .pair_factors import Cores, PairFactors
from .pairs import PairFit, fit_pair
from .pls import partial_least_squares
from .quality import R2, Quality, mahalanobis, quality, r2, row_warning
from .rank_family import RankCurve, RankFamily
from .reduced_rank import optimal_ranks, truncated_ranks
from .ridge import ALPHAS, REFERENCE_ALPHAS, RidgeFit, fit_ridge_targets, fold_scores
from .scores import HeldOut, MomentScore, score_map
from .sparsity import SparsePath, sparse_path
from .spectrum import Spectrum
from .whitening import Whitener

__all__ = [
    "ALPHAS",
    "BASELINES",
    "METHODS",
    "R2",
    "REFERENCE_ALPHAS",
    "Candidate",
    "CanonicalCorrelations",
    "Cores",
    "Estimate",
    "GroupedMoments",
    "HeldOut",
    "LeaveOneOut",
    "LinearMap",
    "MapFit",
    "MomentScore",
    "Moments",
    "PairFactors",
    "PairFit",
    "Quality",
    "RankCurve",
    "RankFamily",
    "ReluMap",
    "RidgeFit",
    "SparsePath",
    "Spectrum",
    "SubspaceSize",
    "Whitener",
    "baseline",
    "fit_autoencoder",
    "fit_map",
    "fit_pair",
    "fit_pinv",
    "fit_procrustes",
    "fit_ridge",
    "fit_ridge_moments",
    "fit_ridge_targets",
    "fold_ids",
    "fold_scores",
    "leave_one_out",
    "leave_out_shards",
    "mahalanobis",
    "optimal_ranks",
    "partial_least_squares",
    "plan_passes",
    "quality",
    "r2",
    "ridge_path",
    "row_warning",
    "score_map",
    "sparse_path",
    "subspace_size",
    "total",
    "truncated_ranks",
]
