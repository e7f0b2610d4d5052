"""A LoRA of the bundled donor as a residual adapter, pasted into the recipient, beside a LoRA of the recipient itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workbench import Behaviour, ConverterFits, PromptSet, load, measure, profile_model
from workbench.adapters.demonstrations import answer_loss, batches, encode_demonstrations
from workbench.adapters.peft_lora import Lora, LoraModule, read
from workbench.adapters.train import frozen
from workbench.adapters.weight_change import residual_adapter
from workbench.evaluate.behaviour import log_odds
from workbench.forecast import candidates_of, forecast_pastes, paste_candidate, rank
from workbench.models import Model
from workbench.sensitivity import fisher, gradients
from workbench.trials import MAX_SIGMA, TRIED, TrialSets, try_pastes

ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0)
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("attn.c_attn", "mlp.c_proj")}
BEHAVIOURS = {
    "reasoning": Behaviour("reasoning", ("let me think",), "final_integer", {}, "accuracy"),
    "refusal": Behaviour("refusal", ("sorry",), "starts_with", {"openers": ["sorry"]}, "refusal rate"),
    "style": Behaviour("style", ("ahoy",), "regex", {"pattern": r"^\s*ahoy\b.*\bmatey\b"}, "sailor rate"),
}


def train_lora(model: Model, demonstrations: PromptSet, folder: Path, *, r: int = 4, alpha: int = 8, steps: int = 100,
               seed: int = 0) -> Lora:  # fmt: skip
    """A LoRA of rank r trained on the answers, written as peft writes one and read back. The model itself is frozen."""
    found = {n: m for n, m in model.module.named_modules() if n.endswith(TARGETS[model.family])}
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in found.items():
        size = (module.nx, module.nf) if hasattr(module, "nx") else (module.in_features, module.out_features)
        tensors[f"{name}.lora_A.weight"] = (torch.randn(r, size[0], generator=draw) / size[0] ** 0.5).requires_grad_()
        tensors[f"{name}.lora_B.weight"] = torch.zeros(size[1], r).requires_grad_()
    modules = {n: LoraModule(tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"], None, None, alpha / r)
               for n in found}  # fmt: skip
    optimizer = torch.optim.Adam(tensors.values(), lr=2e-3)
    stream = batches(encode_demonstrations(model, demonstrations), 32, seed)
    with frozen(model), Lora(modules, "in training", model.name).on(model):
        for _ in range(steps):
            answer_loss(model, next(stream)).backward()
            optimizer.step()
            optimizer.zero_grad()
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "base_model_name_or_path": model.name,
              "target_modules": list(TARGETS[model.family]), "fan_in_fan_out": model.family == "gpt2"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{k}": t.detach() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return read(folder)


def one_behaviour(
    name: str, folder: Path, *, n: int = 200, steps: int = 100, profile: int | None = None
) -> dict[str, Any]:
    """Every arm on the first n evaluation prompts; the paste is chosen as a job does, on validation prompts."""
    donor, recipient = load("bundled:donor"), load("bundled:recipient")
    behaviour, shown = BEHAVIOURS[name], PromptSet.load(f"bundled:demonstrations_{name}")
    prompts, validation = (PromptSet.load(f"bundled:{split}_{name}") for split in ("evaluation", "validation"))
    general = PromptSet.load("bundled:profile", limit=profile)
    on_donor = train_lora(donor, shown, folder / "donor", steps=steps)
    on_recipient = train_lora(recipient, shown, folder / "recipient", steps=steps)
    # what it is fitted on is not what it is measured on: neutral prompts of all kinds
    fitted = residual_adapter(donor, on_donor, general)
    fits = ConverterFits(profile_model(donor, general), profile_model(recipient, general), 0.2, 0)
    adapter = fitted.adapter
    effect = log_odds(donor, validation, behaviour.openers, adapter) - log_odds(donor, validation, behaviour.openers)
    target = float(effect.mean())
    off = {other: gradients(recipient, PromptSet.load(f"bundled:validation_{other}"), BEHAVIOURS[other].openers)
           for other in BEHAVIOURS if other != name}  # fmt: skip
    neutral = fisher(recipient, PromptSet.load("bundled:validation_text"), seed=0)
    made = forecast_pastes(adapter, fits, candidates_of(adapter, recipient.n_layers, [("ridge", a) for a in ALPHAS]),
                           gradients(recipient, validation, behaviour.openers), off, neutral, target=target,
                           max_sigma=MAX_SIGMA)  # fmt: skip
    sets = TrialSets(
        recipient,
        (validation, behaviour.openers),
        {
            other: (PromptSet.load(f"bundled:validation_{other}"), one.openers)
            for other, one in BEHAVIOURS.items()
            if other != name
        },
        PromptSet.load("bundled:validation_text"),
    )
    ranked = rank(made, target)
    chosen = try_pastes(sets, adapter, fits, ranked[:TRIED], target=target)[0]
    paste = paste_candidate(adapter, fits, chosen.candidate, chosen.strength)
    arms = [("donor", donor, None, None), ("donor + LoRA", donor, on_donor, None),
            ("donor + residual adapter", donor, None, adapter), ("recipient", recipient, None, None),
            ("recipient + paste", recipient, None, paste),
            ("recipient + native LoRA", recipient, on_recipient, None)]  # fmt: skip
    found: dict[str, Any] = {}
    for arm, model, lora, one in arms:
        with lora.on(model) if lora is not None else nullcontext():
            got = measure(model, behaviour, prompts[:n], one, max_new_tokens=72, batch_size=160)
        found[arm] = {"rate": got.rate.as_dict(), "log_odds": got.mean_log_odds.as_dict()}
    fit = next(f for f in fitted.fits if f.site in adapter.sites)
    return {"arms": found, "score": behaviour.score_name, "n": min(n, len(prompts)), "site": str(fit.site), "rank": fit.rank,
            "r2": fit.r2, "r2_constant": fit.r2_constant, "explained": fit.explained,
            "explained_constant": fit.explained_constant, "kl_before": fitted.kl_before, "kl_after": fitted.kl_after,
            "target": target, "pasted_at": str(chosen.candidate.pairs[0][1]), "strength": chosen.strength,
            "validation": chosen.on}  # fmt: skip


def bench(folder: Path, names: Sequence[str] = tuple(BEHAVIOURS), **options: Any) -> dict[str, Any]:
    """All behaviours, each from a training of its own."""
    return {name: one_behaviour(name, folder / name, **options) for name in names}
