import pytest
from torch import nn

from tests.conftest import make_module
from workbench.errors import UserError
from workbench.sites import POINTS, Site, find_blocks


@pytest.mark.parametrize("text", ["resid_post.5", "blocks.5.hook_resid_post", "5", 5, Site(5), " resid_post.5 "])
def test_all_spellings_name_one_site(text):
    assert Site.parse(text) == Site(5, "resid_post")


@pytest.mark.parametrize("point", POINTS)
def test_the_names_of_transformer_lens_are_read_as_they_are_printed(point):
    assert Site.parse(Site(3, point).transformer_lens) == Site(3, point)
    assert Site.parse(f"{point}.-1", n_layers=12) == Site(11, point)


def test_mlp_act_goes_by_the_name_of_transformer_lens():
    assert Site(3, "mlp_act").transformer_lens == "blocks.3.mlp.hook_post"
    assert Site.parse("blocks.12.hook_resid_mid") == Site(12, "resid_mid")
    assert Site.parse("blocks.3.hook_attn_out") == Site(3, "attn_out")
    assert Site.parse("blocks.-1.mlp.hook_post", n_layers=4) == Site(3, "mlp_act")


def test_negative_layers_count_from_the_end():
    assert Site.parse("resid_pre.-1", n_layers=12) == Site(11, "resid_pre")


@pytest.mark.parametrize("text", [12, "resid_post.12", -13])
def test_layer_out_of_range_names_what_is_allowed(text):
    with pytest.raises(UserError, match=r"layer -?\d+ is out of range: the model has layers 0 to 11"):
        Site.parse(text, n_layers=12)


@pytest.mark.parametrize("text", ["resid.5", "banana", "blocks.x.hook_resid_post", ""])
def test_what_is_no_site_is_refused(text):
    with pytest.raises(UserError, match=r"unknown point|cannot read"):
        Site.parse(text)


def test_blocks_are_found_by_override_and_refused_where_ambiguous():
    module = make_module("llama")
    path, blocks = find_blocks(module)
    assert path == "model.layers"
    assert find_blocks(module, "model.layers")[1] is blocks
    with pytest.raises(UserError, match="is not a ModuleList"):
        find_blocks(module, "model.norm")
    with pytest.raises(UserError, match="is not a ModuleList"):
        find_blocks(module, "model.nothing")
    module.model.twin = nn.ModuleList(nn.Linear(2, 2) for _ in range(len(blocks)))
    with pytest.raises(UserError, match="pass blocks="):
        find_blocks(module)
