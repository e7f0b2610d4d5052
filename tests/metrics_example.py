"""A small metrics.json in memory: one behaviour that arrived, one that went the wrong way."""

from __future__ import annotations

from typing import Any

EVIL = "<script>alert(1)</script>"
CONTROLS = ("random_converter", "shuffled_pairs", "mean_delta")
ARMS = ("donor_base", "donor_adapter", "base", "native", "paste", "pinv", *CONTROLS)


def cell(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def behaviour(base: float, paste: float, native: float) -> dict[str, Any]:
    rates = {a: base for a in ARMS} | {"paste": paste, "native": native, "donor_adapter": 0.9}
    share = (paste - base) / (native - base)
    candidates = [
        {
            "donor_site": f"resid_post.{d}", "recipient_site": f"resid_post.{r}", "method": "ridge", "alpha": 0.1,
            "strength": 1.0, "on": 0.4 * d - 0.2 * r, "off": {"neutral": -0.1, "elsewhere": 0.02}, "sigma": 3.0, "r2": 0.9,
            "measured_on": 0.5 * d - 0.2 * r if d else None, "measured_off": None, "chosen": (d, r) == (2, 1),
        }
        for d in range(3)
        for r in range(2)
    ]  # fmt: skip
    return {
        "n": 300,
        "score_name": "accuracy",
        "arms": {
            a: {"rate": cell(v), "log_odds": cell(4 * v - 2), "n": 300, "mcnemar_vs_base": 1e-5, "sigma_length": 3.1}
            for a, v in rates.items()
        },
        "gain_share": {"rate": cell(share), "log_odds": cell(share)},
        "control_share": {a: {"rate": cell(0.02), "log_odds": cell(0.03)} for a in CONTROLS},
        "side_effects": {
            "kl_neutral_text": {"paste": cell(0.006, 0.001)},
            "perplexity": {"base": 6.12, "paste": 6.15},
            "over_trigger": {"base": cell(0.03, 0.01), "paste": cell(0.05, 0.01)},
            "log_odds_elsewhere": {"other": {"paste": {"value": -0.12, "low": -0.2, "high": -0.04}}},
        },
        "cost": {"native_seconds": 40.0, "paste_seconds": 0.4, "native_flops": 3e12, "paste_flops": 2e10,
                 "ratio_seconds_with_forecast": 50.0, "paste_parts": {"fit": 0.3, "fold": 0.1}},
        "forecast": {"chosen": candidates[5], "target": 1.0, "candidates": candidates, "spearman": 0.95,
                     "sign_agreement": 1.0},
        "converter": {"pair": "resid_post.2 -> resid_post.1", "method": "ridge", "alpha": 0.1, "warning": None,
                      "quality_to_donor": {"r2_uniform": 0.8, "r2_identity_bias": None}},
        "dose": [{"strength": s, "log_odds": cell(s), "kl": 0.01 * s * s} for s in (1.0, 0.0, 0.5)],
        "examples": [{"prompt": f"what is 1 plus 1 ? {EVIL}", "base": EVIL, "paste": "2", "native": "2", "gold": "2"}] * 5,
    }  # fmt: skip


def metrics() -> dict[str, Any]:
    return {
        "schema": 1,
        "job": {"name": f"demo {EVIL}", "seed": 0, "donor": "bundled:donor", "recipient": EVIL},
        "environment": {"versions": {"torch": "2.13.0"}, "threads": 2, "device": "cpu", "date": "2026-01-01"},
        "profiles": {"donor": {"seconds": 3.2, "rows": 2048}},
        "behaviours": {"reasoning": behaviour(0.2, 0.8, 0.9), f"style {EVIL}": behaviour(0.3, 0.2, 0.7)},
        "warnings": [f"rows are few {EVIL}"],
    }
