"""Windows over long prompts: every token once, each with its context, and those of the first window as if alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import UserError
from workbench.profile import profile_model
from workbench.profile.plan import make_plan
from workbench.profile.spool import windows
from workbench.prompts import PromptSet, encode

LONG = PromptSet.load([" ".join(f"w{(5 * i + 3 * j) % 170}" for j in range(n)) for i, n in enumerate((60, 7, 23))])


@given(st.integers(1, 300), st.integers(0, 3), st.data())
def test_windows_take_every_token_once_and_leave_it_its_context(n, head, data):
    longest = data.draw(st.integers(head + 2, 80))
    stride = data.draw(st.integers(1, longest - max(head, 1)))
    n = max(n, head + 1)
    found = windows(n, head, longest, stride)
    assert [token for _, new, end in found for token in range(new, end)] == list(range(n))
    for k, (begin, new, end) in enumerate(found):
        assert head + end - begin <= longest
        assert begin == head + k * stride
        assert k == 0 or new - begin + head >= longest - stride  # what a new token has before it, the head counted


def test_rows_of_the_first_window_are_those_without_windows(small_model):
    store = profile_model(small_model, LONG, tokens="all", max_length=16, stride=5)
    for i, ids in enumerate(encode(LONG, small_model.tokenizer)):
        with torch.inference_mode():
            alone = small_model.module(torch.tensor([ids[:16]]), output_hidden_states=True).hidden_states[2][0, 1:]
        start = store.rows_of(i).start
        torch.testing.assert_close(store.read(1, slice(start, start + len(alone))), alone, atol=1e-4, rtol=1e-4)


def test_every_token_is_there_once_with_the_prompts_positions_and_spans(llama):
    store = profile_model(llama, LONG, tokens="all", max_length=16, stride=5)
    rows, prompts = store.rows(), store.prompts()
    for i, ids in enumerate(encode(LONG, llama.tokenizer)):
        mine = rows[rows["prompt"] == i]
        assert mine["position"].tolist() == list(range(1, len(ids)))
        assert mine["token_id"].tolist() == ids[1:]
        for start, end, text in zip(mine["char_start"], mine["char_end"], mine["text"], strict=True):
            assert prompts["text"][i][start:end] == text
        assert (prompts["n_tokens"][i], prompts["cut"][i]) == (len(ids), 0)


def test_a_later_token_is_read_in_its_own_window(small_model):
    ids = encode(LONG, small_model.tokenizer)[0]
    store = profile_model(small_model, LONG, tokens="all", max_length=16, stride=5)
    # window 2 reads the BOS and tokens 11 to 25; its new tokens are 21 to 25
    with torch.inference_mode():
        seen = small_model.module(torch.tensor([[ids[0], *ids[11:26]]]), output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(store.read(1, slice(20, 25)), seen[-5:], atol=1e-4, rtol=1e-4)


def test_windows_without_wanted_rows_are_not_run(llama):
    plan = make_plan(llama, LONG, tokens="last", max_length=16, stride=5)
    ran = [s for block in plan.blocks for batch in plan.batches(block) for s in batch]
    assert len(ran) == len(LONG)
    assert plan.n_tokens == sum(plan.spool.lengths[ran])


@pytest.mark.parametrize("tokens", ["first:40", "every:7", "last:9+special"])
def test_policies_choose_of_the_whole_prompt(llama, tokens):
    windowed = make_plan(llama, LONG, tokens=tokens, max_length=16, stride=15)
    whole = make_plan(llama, LONG, tokens=tokens)
    assert windowed.spool.rows(0, windowed.n_rows)[1].tolist() == whole.spool.rows(0, whole.n_rows)[1].tolist()


@pytest.mark.parametrize("stride", [0, -1, 16, 40])
def test_a_stride_that_leaves_out_or_stands_still_is_refused(llama, stride):
    with pytest.raises(UserError, match=f"stride={stride} is not within 1 to max_length - 1 = 15"):
        make_plan(llama, LONG, max_length=16, stride=stride)
