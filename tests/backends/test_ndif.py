"""Remote runs, in nnsight's own rehearsal: the request is sent and opened as on NDIF, and run on this machine."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_module, save_folder
from workbench.errors import UserError
from workbench.hashes import file_hash
from workbench.models import Model, load
from workbench.prompts import pad
from workbench.sites import Site

SITES = [Site(1), Site(0, "resid_pre")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """The same folder, here and in the rehearsal of a remote run."""
    folder = save_folder(make_module("llama"), tmp_path_factory.mktemp("model"))
    return load(folder), load(folder, backend="nnsight", remote="local")


def last_of(site, h):
    return h[:, -1] * 2.0


def sent(site, h):
    return h[:, 0]


sent.remote = lambda h: h[:, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_remote_run_reads_what_a_local_one_reads(models, side):
    ids, mask = pad([[1, 20, 21, 22], [1, 30]], 0, side)
    for take in (None, last_of, sent):
        found = []
        for model in models:
            with torch.inference_mode(), model.read(SITES, take=take) as seen:
                model.run(ids, mask, stop_after=1)
            found.append(seen)
        for site in SITES:
            torch.testing.assert_close(found[1][site], found[0][site], atol=1e-6, rtol=0)
    a, b = (m.logits(ids, mask, last_only=True) for m in models)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_remote_answers_are_those_of_the_model_here(models):
    prompts = ["w20 w21", "w30"]
    assert models[0].generate(prompts, max_new_tokens=4) == models[1].generate(prompts, max_new_tokens=4)


def test_the_remote_model_is_known_by_the_same_fingerprint(models):
    assert models[0].fingerprint_id == models[1].fingerprint_id


def test_weights_that_are_only_on_the_hub_are_known_by_their_files(models, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    class File:
        def __init__(self, name: str, sha: str) -> None:
            self.rfilename, self.lfs = name, {"sha256": sha}

    class Info:
        siblings = [
            *(File(f.name, file_hash(f)) for f in models[0].folder.glob("*.safetensors")),
            File("original/model.safetensors", "0" * 64),
        ]

    remote = load(models[0].folder, backend="nnsight", remote="local")
    remote.folder = None
    with pytest.raises(UserError, match="the hub does not tell the hashes of its weights"):
        _ = remote.fingerprint
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: Info())
    assert remote.fingerprint["weights"] == models[0].fingerprint["weights"]


def test_what_cannot_be_done_remotely_is_refused(models, monkeypatch: pytest.MonkeyPatch):
    remote = models[1]
    with pytest.raises(UserError, match="edits are not sent to a remote model"):
        remote.edit({Site(0): lambda h, w: h})
    with pytest.raises(UserError, match="a remote model is read at resid_pre and resid_post"):
        with remote.read([Site(0, "mlp_out")]):
            pass
    with pytest.raises(UserError, match="not read while it generates"), remote.read([Site(0)]):
        remote.generate(["w1"], max_new_tokens=2)


def test_a_remote_run_without_a_key_is_refused(models, monkeypatch: pytest.MonkeyPatch):
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(UserError, match="remote=True needs a key for NDIF and none is set: put it in NDIF_API_KEY"):
        load("owner/name", backend="nnsight", remote=True)
    with pytest.raises(UserError, match="nnsight cannot open 'no/such'"):
        load("no/such", backend="nnsight", remote="local")
