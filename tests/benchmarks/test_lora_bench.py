"""The benchmark of pasted LoRAs runs, and its page is told; its figures are for its table alone."""

from __future__ import annotations

import pytest

from .lora_bench import bench
from .tables import SECTIONS


@pytest.mark.slow
def test_a_lora_is_trained_fitted_and_pasted(tmp_path):
    found = bench(tmp_path, ["refusal"], n=8, steps=3, profile=200)
    assert set(found["refusal"]["arms"]) == {
        "donor", "donor + LoRA", "donor + residual adapter", "recipient", "recipient + paste", "recipient + native LoRA",
    }  # fmt: skip
    assert found["refusal"]["kl_after"] <= found["refusal"]["kl_before"]
    assert "| recipient + paste |" in SECTIONS["lora"].tell(found)
