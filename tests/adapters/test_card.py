"""The card beside a saved paste, and the licence of its donor."""

from __future__ import annotations

import pytest
import torch

from workbench.adapters import Adapter, LowRank
from workbench.adapters.card import card_text, licence_of
from workbench.convert import Converter
from workbench.maps.linear_map import LinearMap
from workbench.maps.quality import quality
from workbench.paste import paste_adapter
from workbench.sites import Site

D, R = 6, 4


def converters(with_quality: bool = True) -> list[Converter]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, R, generator=g), torch.randn(40, D, generator=g)
    there, back = (
        LinearMap(torch.randn(R, D, generator=g), torch.zeros(D)),
        LinearMap(torch.randn(D, R, generator=g), torch.zeros(R)),
    )
    scored = {}
    if with_quality:
        scored = {
            "quality_to_donor": quality(there, x, y, back=back, train_mean=y.mean(0), n_train=40),
            "quality_to_recipient": quality(back, y, x, back=there, train_mean=x.mean(0), n_train=40),
        }
    return [Converter(Site(1), Site(3), there, back, "ridge", 0.1, **scored)]


def donor(positions: str = "last", name: str = "org/donor") -> Adapter:
    part = LowRank(torch.randn(D, 2), torch.randn(2), torch.randn(2, D))
    return Adapter({Site(1): part}, positions, base={"name": name, "weights": "a" * 64}, name="refusal")


RECIPIENT = {"name": "org/recipient", "weights": "b" * 64}


def test_the_card_says_where_a_paste_comes_from_and_how_well_it_was_carried(tmp_path):
    made = paste_adapter(donor(), converters(), recipient_fingerprint=RECIPIENT)
    made.save(tmp_path / "p")
    card = (tmp_path / "p" / "README.md").read_text()
    scored = converters()[0].quality_to_donor
    for said in (
        "# refusal", "org/recipient (weights bbbbbbbbbbbb)", "org/donor (weights aaaaaaaaaaaa)",
        "resid_post.3 (rank 2); positions: last", "Licence of the donor: not stated",
        "| resid_post.1 | resid_post.3 | ridge |", f"to the donor: R2 on held-out prompts {scored.r2_weighted:.3f}",
    ):  # fmt: skip
        assert said in card
    assert card_text(Adapter.load(tmp_path / "p")) == card


def test_the_card_shows_forecast_beside_measured_where_there_are_any():
    made = paste_adapter(donor(), converters(False), recipient_fingerprint=RECIPIENT)
    assert "None was kept with this paste." in card_text(made)
    for measured, said in ((1.0, "forecast +1.250 (standard error 0.100), measured +1.000"), (None, "not measured")):
        evidence = {"forecast": {"on": 1.25, "on_se": 0.1, "measured_on": measured}}
        assert said in card_text(Adapter(made.parts, meta={**made.meta, "evidence": evidence}))


def test_a_paste_at_several_positions_is_the_sum_of_the_pastes(tmp_path):
    first, last = donor("first:2"), donor("last")
    both = paste_adapter((first + last) * 0.5, converters(), recipient_fingerprint=RECIPIENT, strength=2.0)
    apart = [paste_adapter(one, converters(), recipient_fingerprint=RECIPIENT) for one in (first, last)]
    h = torch.randn(3, R)
    for term, one in zip(both.split(), apart, strict=True):
        assert term.positions == one.positions
        torch.testing.assert_close(term.delta(Site(3), h), one.delta(Site(3), h))
    assert both.base == RECIPIENT
    both.save(tmp_path / "p")
    assert "positions: first:2 and last" in (tmp_path / "p" / "README.md").read_text()


def test_only_pastes_have_cards(tmp_path):
    donor().save(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"README.md": "---\nlicense: apache-2.0\ntags: [x]\n---\n# x"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: 'llama3.2'\n---\n"}, "llama3.2"),
        ({"README.md": "# no front matter\nlicense: mit"}, "not stated"),
        ({"LICENSE": "\n   MIT License\n\nCopyright"}, "MIT License (LICENSE)"),
        ({"README.md": "---\ntags: x\n---", "LICENSE.txt": "# Terms"}, "Terms (LICENSE.txt)"),
        ({"LICENSE": ""}, "not stated"),
        ({}, "not stated"),
    ],
)
def test_the_licence_of_a_model_is_what_its_folder_says(files, said, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(str(tmp_path)) == said
    made = paste_adapter(donor(name=str(tmp_path)), converters(False), recipient_fingerprint=RECIPIENT)
    assert f"Licence of the donor: {said}\n" in card_text(made)


@pytest.mark.parametrize("name", ["", "a b", "../..", "bundled:nobody", "x" * 300, "owner/na--me..", "/no/such/folder"])
def test_names_that_are_no_models_have_no_licence(name):
    assert licence_of(name) == "not stated"


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1_835_232), (torch.float32, 3_670_464)])
def test_a_paste_of_the_published_shape_is_its_numbers_and_little_more(dtype, size, tmp_path):
    """14 layers, rank 8, width 4096: 917,616 numbers. The folder is at most 1 % larger."""
    part = LowRank(torch.zeros(4096, 8), torch.zeros(8), torch.zeros(8, 4096)).to(dtype)
    Adapter({Site(l): part for l in range(14)}, meta={"kind": "paste"}).save(tmp_path / "p")
    found = sum(file.stat().st_size for file in (tmp_path / "p").iterdir())
    assert size <= found <= 1.01 * size
