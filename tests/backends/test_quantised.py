"""Quantised models on the default backend; skipped where bitsandbytes is not installed."""

import pytest
import torch
import transformers as tf

from tests.conftest import VOCABULARY, save_folder, word_tokenizer
from workbench.models import load
from workbench.profile import profile_model
from workbench.sites import POINTS, Site

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    "how", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}], ids=["8", "4"]
)
@pytest.mark.filterwarnings("ignore")
def test_quantised_models_are_read_edited_and_profiled_at_every_point(tmp_path, how):
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    save_folder(tf.LlamaForCausalLM(config), tmp_path)
    module = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=tf.BitsAndBytesConfig(**how), device_map="cpu"
    )
    model = load(module, tokenizer=word_tokenizer())  # proves what is read and written
    assert not model.missing
    assert model.fingerprint["weights"]
    sites = [Site(1, point) for point in POINTS]
    with profile_model(model, ["w1 w2 w3", "w4 w5"], sites=sites, tokens="all") as store:
        mid, out = store.read(Site(1, "resid_mid")), store.read(Site(1, "mlp_out"))
        torch.testing.assert_close(mid + out, store.read(Site(1)), atol=1e-3, rtol=1e-3)
