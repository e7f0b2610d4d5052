"""The benchmark of a device runs on the CPU at tiny sizes, and its page is told; its figures are for its table alone."""

from __future__ import annotations

from .device_bench import DTYPES, Sizes, run
from .tables import SECTIONS


def test_limits_are_measured_first_and_shares_of_them_told(tmp_path):
    found = run(tmp_path, "cpu", Sizes.little())
    assert list(found["limits"]["flops"]) == list(DTYPES)
    assert min(*found["limits"]["flops"].values(), *found["limits"]["bytes"].values()) > 0
    names = [line["what"] for line in found["lines"]]
    assert names[-2:] == ["moments of two sites, rows at hand", "fold through the Gram"]
    assert all(line["flops"] > 0 and line["share"] > 0 for line in found["lines"])
    said = SECTIONS["device-gpu"].tell(found)
    assert "| bfloat16 |" in said
    assert "| generation with a paste |" in said
    assert list(tmp_path.iterdir()) == []
