"""Vision transformers: the paper's form folds without any change, saves and loads; ViT and DeiT go through the same code."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from workbench.errors import UserError
from workbench.folding.architecture import fold_module, register_folder
from workbench.folding.calibration import calibrate, image_batches
from workbench.folding.ffn import find_ffns
from workbench.folding.fold import planned
from workbench.folding.vision import ChannelIdleViTConfig, ChannelIdleViTForImageClassification, fold_vit

SIZE = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
            num_labels=5)  # fmt: skip


def images(n: int = 40) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def idle_vit(theta: float = 0.75) -> ChannelIdleViTForImageClassification:
    torch.manual_seed(0)
    model = ChannelIdleViTForImageClassification(ChannelIdleViTConfig(**SIZE, theta=theta))
    with torch.no_grad():
        for _ in range(5):  # the norms see what they will be given
            model.train()(images())
    return model.eval()


def test_a_channel_idle_vit_folds_exactly_and_saves(tmp_path):
    model = idle_vit()
    folded = fold_vit(model)
    with torch.inference_mode():
        whole, made = model(images()).logits, folded(images()).logits
        assert (made - whole).abs().max() < 1e-4
        assert (model.double()(images().double()).logits - folded.double()(images().double()).logits).abs().max() < 1e-5
    model.float()
    folded.float().save_pretrained(tmp_path / "folded")
    again = tf.AutoModelForImageClassification.from_pretrained(tmp_path / "folded").eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(images()).logits, folded(images()).logits, rtol=0, atol=0)
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in model.parameters())
    assert not model.config.folded


def test_fold_vit_refuses_what_has_nothing_to_fold():
    for model in (idle_vit(theta=0.0), fold_vit(idle_vit())):
        with pytest.raises(UserError, match="has no idle channels to fold"):
            fold_vit(model)
    with pytest.raises(UserError, match="from 0 to less than 1"):
        ChannelIdleViTForImageClassification(ChannelIdleViTConfig(**SIZE, theta=1.0))


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_trained_vision_transformers_go_through_the_code_of_language_models(kind, tmp_path):
    torch.manual_seed(0)
    model = getattr(tf, f"{kind}ForImageClassification")(getattr(tf, f"{kind}Config")(**SIZE)).eval()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    batches = image_batches(model, images(), size=10)
    ffns = find_ffns(model, list(blocks), batches[0][0])
    channels = calibrate(model, ffns, batches)
    error = {}
    with torch.inference_mode():
        whole = model(images()).logits
        for method in ("refit", "mean"):
            plan, r2 = planned(model, ffns, channels, 0.5, method, batches)
            folded = fold_module(model, plan)
            error[method] = float((folded(images()).logits - whole).square().mean())
            assert len(r2) == 2
    assert error["refit"] < error["mean"]
    folded.save_pretrained(tmp_path / "folded")
    assert register_folder(tmp_path / "folded")
    again = tf.AutoModelForImageClassification.from_pretrained(tmp_path / "folded").eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(images()).logits, folded(images()).logits, rtol=0, atol=0)
