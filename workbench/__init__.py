"""A workbench for interpretability and activation transfer between language models."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("workbench")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0.0.0"

_HOME = {
    "UserError": "errors",
    "Site": "sites",
    "Model": "models",
    "load": "models",
    "Prompt": "prompts",
    "PromptSet": "prompts",
    "Decoding": "generation",
    "Conversation": "conversation",
    "profile_model": "profile",
    "profile_moments": "profile.sums",
    "load_moments": "profile.sums",
    "moments_bytes": "profile.sums",
    "profile_cost": "profile.cost",
    "repair_store": "profile.repair",
    "Store": "store",
    "merge_stores": "store.merge",
    "export_store": "store.exports",
    "import_store": "store.imports",
    "pair_rows": "alignment",
    "verify_backends": "verification",
    "TransportGrid": "transport",
    "transport_grid": "transport",
    "LinearMap": "maps.linear_map",
    "Moments": "maps.moments",
    "fit_ridge": "maps.fit",
    "fit_pinv": "maps.fit",
    "Adapter": "adapters.adapter",
    "LowRank": "adapters.adapter",
    "Blend": "adapters.blend",
    "train_adapter": "adapters.train",
    "residual_adapter": "adapters.weight_change",
    "Converter": "convert",
    "ConverterFits": "convert",
    "fit_converters": "convert",
    "fits_of_recipients": "convert",
    "match_layers": "layer_matching",
    "layer_scores": "layer_matching",
    "fold_part": "paste",
    "paste_adapter": "paste",
    "gradients": "sensitivity",
    "answer_gradients": "sensitivity",
    "rank_pastes": "forecast_table",
    "forecast_pastes": "forecast",
    "forecast_frame": "forecast",
    "paste_candidate": "forecast",
    "Behaviour": "evaluate.behaviour",
    "log_odds": "evaluate.behaviour",
    "measure": "evaluate.behaviour",
    "kl_on_text": "evaluate.behaviour",
    "grade_answers": "evaluate.grading",
    "read_answers": "evaluate.answer_files",
    "arms_frame": "evaluate.comparison",
    "dose_response": "evaluate.comparison",
    "measure_interference": "evaluate.interference",
    "equality_of": "run_equality",
    "Job": "jobs",
    "run_job": "jobs",
    "plan_job": "planning",
    "plan_profile": "planning",
    "plan_transport": "planning",
    "store_overview": "store.overview",
    "show": "display",
    "fold_model": "folding.fold",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__spec__", "__version__"]
