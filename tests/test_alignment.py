"""Tokens of two tokenizers pair where they end at the same character of the same content, and nowhere else."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from workbench.alignment import align, pair_rows, shared_ends
from workbench.errors import UserError
from workbench.offsets import Offsets
from workbench.prompts import Prompt, PromptSet
from workbench.rendering import encode_spans, render, special_ids
from workbench.store.folder import Folder
from workbench.store.tables import Tables
from workbench.tokens import choose
from workbench.turns import turn_spans

from .tokenizer_kinds import KINDS, STRIPPING, TEMPLATE, tokenizer

EXACT = [kind for kind in KINDS if kind not in ("unigram nfkc", "wordpiece")]
ODD = [
    "👩\u200d👩\u200d👧", "😀", "😀😃", "\U0001f1e9\U0001f1ea", "e\u0301", "é", "\u0301", "한",
    "\u1112\u1161\u11ab", "日本", "語", "שלום", "مرحبا", " ", "  ", "\t", "\n", "\u00a0", "\u200d", "ﬁ", "２", "ｶﾞ", "ß", "İ",
    "▁", "Ġ", "<0x41>", "<|user|>", "hello", " world", "the cat", "A", "user", "naïve",
]  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(ODD), min_size=1, max_size=8).map("".join),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
).filter(lambda text: bool(text.strip()))


def text(value):
    return Prompt(None, value, "t")


def chat(*turns, roles=("user", "assistant")):
    pairs = zip((roles * len(turns))[: len(turns)], turns, strict=True)
    return Prompt(tuple({"role": r, "content": c} for r, c in pairs), None, "c")


def encoded(prompt, tok, **options):
    rendered = render([prompt], tok)
    return rendered[0], encode_spans([prompt], tok, rendered=rendered, **options)[0]


def one(prompt, kind, template=TEMPLATE):
    """The rendered text and its tokens; a text of which the tokenizer leaves nothing is no case."""
    try:
        return encoded(prompt, tokenizer(kind, template))
    except UserError as err:
        assume("no tokens" not in str(err))
        raise


def spans(cuts):
    edges = [0, *sorted(cuts)]
    return list(pairwise(edges))


@given(st.sets(st.integers(1, 30)), st.sets(st.integers(1, 30)))
def test_shared_ends_are_exactly_the_common_boundaries(a, b):
    x, y = spans(a), spans(b)
    pairs = shared_ends(x, y)
    assert [x[i][1] for i, _ in pairs] == [y[j][1] for _, j in pairs] == sorted(a & b)


def test_the_last_byte_of_a_character_ends_it():
    assert shared_ends([(0, 1), (1, 2), (1, 2), (2, 2)], [(0, 2)]) == [(2, 0)]


def test_a_token_that_a_later_one_reaches_back_into_ends_nowhere():
    assert shared_ends([(0, 1), (0, 2), (1, 2)], [(0, 1), (1, 2)]) == [(2, 1)]


def test_real_pieces_of_two_characters_are_told_apart():
    """Of 日本 the byte-level pieces are E6 97 | A5 E6 | 9C | AC: none ends between the two characters."""
    tok = tokenizer("byte-level")
    core = json.loads(tok.backend_tokenizer.to_str())
    ids = [core["model"]["vocab"][c] for c in "æĹ¥"] + [core["model"]["vocab"][c] for c in "æľ¬"]
    assert Offsets(tok).spans("日本", ids, None) == [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 2)]
    straddling = tokenizer("byte-level")
    known = {7: "æĹ", 8: "¥æ", 9: "ľ", 10: "¬"}
    fake = SimpleNamespace(convert_ids_to_tokens=known.get, added_tokens_decoder={}, backend_tokenizer=straddling)
    assert Offsets(fake).spans("日本", [7, 8, 9, 10], [(0, 1), (0, 2), (1, 2), (1, 2)]) == [
        (0, 0),
        (0, 0),
        (0, 0),
        (0, 2),
    ]


def true_ends(tok, ids, value):
    """The characters at which a token ends, from the bytes that the tokens spell: no offsets are asked."""
    table = {chr(c): c for c in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    table |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if chr(b) not in table)}
    edges = {len(value[:i].encode()): i for i in range(len(value) + 1)}
    byte_level = "ByteLevel" in repr(tok.backend_tokenizer.decoder)
    spelled, marks = b"", []
    for token in tok.convert_ids_to_tokens(ids):
        if token.startswith("<0x") and not byte_level:
            spelled += bytes([int(token[3:5], 16)])
        elif byte_level:
            spelled += bytes(table[c] for c in token)
        else:
            spelled += token.replace("▁", " ").encode()
        marks.append(len(spelled))
    lead = len(spelled) - len(value.encode())
    assert spelled[lead:] == value.encode()
    return [edges.get(mark - lead) if mark > lead else None for mark in marks]


@settings(deadline=None)
@given(TEXTS, st.sampled_from(EXACT))
@example("日本 日本語", "byte-level")
@example(" a", "llama 2")
@example("a  b ", "byte-level trimmed")
@example("😀😃", "unigram")
def test_spans_are_what_the_bytes_of_the_tokens_say(value, kind):
    assume("▁" not in value and not any(s in value for s in ("<|user|>", "<0x")))
    tok = tokenizer(kind)
    ids, found = (e := encode_spans([text(value)], tok)[0]).ids, e.spans
    assume("<unk>" not in tok.convert_ids_to_tokens(ids))
    assert [end if end > start else None for start, end in found] == true_ends(tok, ids, value)
    assert [b for a, b in found if b > a] == [*[a for a, b in found if b > a][1:], len(value)]


@settings(deadline=None)
@given(TEXTS, st.sampled_from(KINDS), st.sampled_from(KINDS))
@example("e\u0301 ﬁ", "unigram nfkc", "byte-level")
@example("\u1112\u1161\u11ab", "unigram nfkc", "byte-level")
@example("Ü\u0301ber", "wordpiece", "byte-level trimmed")
def test_pairs_are_all_the_places_where_both_have_an_end(value, first, second):
    (shown, a), (_, b) = one(text(value), first), one(text(value), second)
    assert shown == value
    pairs = align(text(value), value, a, value, b)
    assert all(x < y for p, q in pairwise(pairs) for x, y in zip(p, q, strict=True))
    ends = [{end for start, end in e.spans if end > start} for e in (a, b)]
    assert [a.spans[i][1] for i, _ in pairs] == [b.spans[j][1] for _, j in pairs] == sorted(ends[0] & ends[1])
    assert all(a.spans[i][0] < a.spans[i][1] and b.spans[j][0] < b.spans[j][1] for i, j in pairs)
    assert align(text(value), value, b, value, a) == [(j, i) for i, j in pairs]
    if {first, second} <= set(EXACT) and "<unk>" not in str([tokenizer(first).convert_ids_to_tokens(a.ids)]):
        for i, j in pairs:
            read = ["".join(value[s:e] for s, e in one.spans[: k + 1] if e > s) for one, k in ((a, i), (b, j))]
            assert read[0] == read[1]


@settings(deadline=None)
@given(TEXTS, st.sampled_from(KINDS))
def test_a_tokenizer_pairs_with_itself_everywhere(value, kind):
    shown, a = one(text(value), kind)
    assert align(text(value), shown, a, shown, a) == [(i, i) for i, (s, e) in enumerate(a.spans) if e > s]


@settings(deadline=None)
@given(TEXTS, st.sampled_from(KINDS))
def test_offsets_never_go_back_nor_beyond_the_text(value, kind):
    found = [span for span in one(text(value), kind)[1].spans if span[1] > span[0]]
    assert all(0 <= a < b <= len(value) for a, b in found)
    assert all(p[1] <= q[0] for p, q in pairwise(found))


def test_normalised_marks_belong_to_the_letter_that_they_melt_into():
    for kind in ("unigram nfkc", "wordpiece"):
        assert [s for s in one(text("cafe\u0301 a"), kind)[1].spans if s[1] - s[0] > 0][-2:][0][1] >= 5


def brute(prompt, a, b, kind_a, kind_b):
    """Pairs by content and character, from `turn_spans` and nothing else."""
    found = []
    turns = [turn_spans(prompt, shown, e.frame) for shown, e in (a, b)]
    for m, ((_, s1, e1), (_, s2, e2)) in enumerate(zip(*turns, strict=True)):
        content = prompt.messages[m]["content"]
        leads = content.index(a[0][s1:e1]), content.index(b[0][s2:e2])
        for i, (x, y) in enumerate(a[1].spans):
            for j, (u, v) in enumerate(b[1].spans):
                inside = y > x and v > u and s1 < y <= e1 and s2 < v <= e2
                if inside and y - s1 + leads[0] == v - s2 + leads[1]:
                    found.append((i, j))
    last = len(a[1].ids) - 1, len(b[1].ids) - 1
    return [p for p in found if p[0] != last[0] and p[1] != last[1]] + [last]


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXTS, min_size=1, max_size=3), st.sampled_from(KINDS), st.sampled_from(KINDS))
@example(["user"], "byte-level", "llama 2")
@example([" hello ", "assistant", "hello"], "byte-level", "unigram")
@example(["a\n"], "byte-level", "wordpiece")
def test_chats_pair_within_each_content_whatever_the_templates(turns, first, second):
    prompt = chat(*turns)
    a, b = one(prompt, first), one(prompt, second, STRIPPING)
    pairs = align(prompt, *a, *b)
    assert pairs == sorted(brute(prompt, a, b, first, second))
    assert all(x < y for p, q in pairwise(pairs) for x, y in zip(p, q, strict=True))
    assert align(prompt, *b, *a) == [(j, i) for i, j in pairs]


def test_the_words_of_a_chat_pair_across_templates():
    prompt = chat(" the cat sat ")
    a, b = encoded(prompt, tokenizer("byte-level")), encoded(prompt, tokenizer("unigram", STRIPPING))
    ends = [(a[0][: a[1].spans[i][1]][-3:], b[0][: b[1].spans[j][1]][-3:]) for i, j in align(prompt, *a, *b)[:-1]]
    assert ("cat", "cat") in ends
    assert ("sat", "sat") in ends
    assert align(prompt, *a, *b)[-1] == (len(a[1].ids) - 1, len(b[1].ids) - 1)


def test_cut_prompts_pair_where_both_have_the_characters():
    prompt = chat("the cat sat on the mat " * 6)
    whole = encoded(prompt, tokenizer("byte-level"))
    cut = encoded(prompt, tokenizer("unigram", STRIPPING), max_length=30)
    assert cut[1].cut
    for i, j in align(prompt, *whole, *cut)[:-1]:
        (_, start, _), (_, other, _) = *turn_spans(prompt, whole[0]), *turn_spans(prompt, cut[0])
        assert whole[1].spans[i][1] - start == cut[1].spans[j][1] - other


def test_a_system_prompt_that_one_template_moves_pairs_all_the_same():
    moving = ("{% for m in messages if m['role'] == 'user' %}[{% if messages[0]['role'] == 'system' %}"
              "{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }}]{% endfor %}")  # fmt: skip
    late = (
        "{% for m in messages if m['role'] == 'user' %}[{{ m['content'] }}]{% endfor %}({{ messages[0]['content'] }})"
    )
    prompt = chat("the mat", "the cat", roles=("system", "user"))
    a = encoded(prompt, tokenizer("byte-level", moving))
    for other in (moving, late):
        b = encoded(prompt, tokenizer("wordpiece", other))
        pairs = align(prompt, *a, *b)
        assert {"the", "mat", "cat"} <= {b[0][slice(*b[1].spans[j])] for _, j in pairs}


def test_a_slow_tokenizer_is_aligned_where_its_tokens_spell_the_text():
    fast = tokenizer("byte-level", None)
    slow = copy.copy(fast)
    words = SimpleNamespace(
        added_tokens_decoder={}, convert_ids_to_tokens=str, decode=lambda ids: "ab cd"[ids[0] : ids[0] + 1]
    )
    ids = fast("hello 😀 world")["input_ids"]
    assert Offsets(slow).spans("hello 😀 world", ids, None) == encode_spans([text("hello 😀 world")], fast)[0].spans
    assert Offsets(words).spans("ab cd", list(range(5)), None) == [(i, i + 1) for i in range(5)]
    assert Offsets(words).spans("ab  cd", list(range(5)), None) == [(-1, -1)] * 5


def test_without_offsets_nothing_is_aligned():
    _, a = encoded(text("hello"), tokenizer("byte-level"))
    blind = type(a)(a.ids, [(-1, -1)] * len(a.ids))
    with pytest.raises(UserError, match="prompt 't': a tokenizer gives no offsets, so its tokens cannot be aligned"):
        align(text("hello"), "hello", a, "hello", blind)


# stores

ROWS = [("row", pa.int64()), ("prompt", pa.int64()), ("position", pa.int32()), ("char_start", pa.int32()),
        ("char_end", pa.int32())]  # fmt: skip


def tables(folder: Path, prompts: PromptSet, tok, tokens="all", **options):
    """The two tables of a store, as a profile writes them, without any activation."""
    folder.mkdir()
    rendered = render(prompts, tok)
    found = encode_spans(prompts, tok, rendered=rendered, **options)
    rows, special = [], special_ids(tok)
    for n, (prompt, shown, e) in enumerate(zip(prompts, rendered, found, strict=True)):
        rows += [(n, i, *e.spans[i]) for i in choose(tokens, e, prompt, shown, special)]
    columns = [list(range(len(rows))), *map(list, zip(*rows, strict=True))]
    arrays = [pa.array(c, kind) for c, (_, kind) in zip(columns, ROWS, strict=True)]
    pq.write_table(pa.table(arrays, schema=pa.schema(ROWS)), folder / "rows.parquet", row_group_size=7)
    lines = [{"id": p.id, "text": shown, "content": json.dumps(p.content), "n_tokens": len(e.ids)}
             for p, shown, e in zip(prompts, rendered, found, strict=True)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(lines), folder / "prompts.parquet", row_group_size=5)
    kept = SimpleNamespace(path=folder, prompt_hash=prompts.hash, tokens=tokens, name="m")
    kept.manifest = {"prompts": {"name": "p", "count": len(prompts)}, "n_rows": len(rows)}
    read_again(kept)
    return kept, rendered, found, [(n, i) for n, i, *_ in rows]


def read_again(store) -> None:
    sizes = {name: {"bytes": (store.path / name).stat().st_size} for name in ("rows.parquet", "prompts.parquet")}
    store.tables = Tables(Folder(store.path), {**store.manifest, "tables": sizes})


SET = PromptSet.load([
    *(f"the cat {i} sat on the mat 😀 日本" for i in range(9)), "user", "assistant", "USER", ":", " hello ", "hello\n",
    [{"role": "system", "content": "hello"}, {"role": "user", "content": "hello hello"}],
    [{"role": "user", "content": "the"}, {"role": "assistant", "content": "the cat"}, {"role": "user", "content": "cat"}],
    {"text": "a plain text  with 👩‍👩‍👧"},
])  # fmt: skip


@pytest.mark.parametrize("policies", [("all", "all"), ("all+special", "every:2"), ("last", "last"), ("last:3", "user")])
@pytest.mark.parametrize("template", [TEMPLATE, STRIPPING])
def test_rows_of_stores_pair_as_prompts_do(tmp_path, policies, template, monkeypatch):
    monkeypatch.setattr("workbench.alignment.PROMPTS", 4)
    a, texts_a, found_a, rows_a = tables(tmp_path / "a", SET, tokenizer("byte-level"), policies[0])
    b, texts_b, found_b, rows_b = tables(
        tmp_path / "b", SET, tokenizer("unigram", template), policies[1], max_length=60
    )
    expected = []
    for n, prompt in enumerate(SET):
        for i, j in align(prompt, texts_a[n], found_a[n], texts_b[n], found_b[n]):
            if (n, i) in rows_a and (n, j) in rows_b:
                expected.append((rows_a.index((n, i)), rows_b.index((n, j))))
    x, y = pair_rows(a, b)
    assert list(zip(x.tolist(), y.tolist(), strict=True)) == expected
    back = pair_rows(b, a)
    assert sorted(zip(back[1].tolist(), back[0].tolist(), strict=True)) == sorted(expected)


@pytest.mark.parametrize("template", [TEMPLATE, STRIPPING])
def test_the_rows_of_some_prompts_are_those_of_all_that_are_theirs(tmp_path, template):
    a, _, _, rows_a = tables(tmp_path / "a", SET, tokenizer("byte-level"))
    b, *_ = tables(tmp_path / "b", SET, tokenizer("unigram", template))
    every = list(zip(*(rows.tolist() for rows in pair_rows(a, b)), strict=True))
    chosen = [16, 0, 3, 8, 3, len(SET) - 1]
    found = list(zip(*(rows.tolist() for rows in pair_rows(a, b, chosen)), strict=True))
    assert found == [(x, y) for x, y in every if rows_a[x][0] in chosen]
    assert pair_rows(a, b, range(len(SET)))[0].tolist() == [x for x, _ in every]


def test_some_prompts_are_read_and_no_others(tmp_path, monkeypatch):
    a, *_ = tables(tmp_path / "a", SET, tokenizer("byte-level"))
    monkeypatch.setattr(Tables, "batches", lambda *_, **__: pytest.fail("the tables were read from end to end"))
    assert len(pair_rows(a, a, [2])[0]) > 5
    with pytest.raises(UserError, match=f"has prompts 0 to {len(SET) - 1}; got {len(SET)}"):
        pair_rows(a, a, [len(SET)])
    with pytest.raises(UserError, match="hold no tokens that end at the same character"):
        pair_rows(a, a, [])


def test_a_store_pairs_with_itself_row_by_row(tmp_path):
    a, *_ = tables(tmp_path / "a", SET, tokenizer("wordpiece"))
    x, y = pair_rows(a, a)
    assert x.tolist() == y.tolist() == list(range(len(x)))


def test_stores_that_do_not_pair_are_refused(tmp_path):
    a, *_ = tables(tmp_path / "a", SET, tokenizer("byte-level"), "first:1")
    b, *_ = tables(tmp_path / "b", SET[:3], tokenizer("byte-level"))
    with pytest.raises(UserError, match="hold different prompts"):
        pair_rows(a, b)
    c, *_ = tables(tmp_path / "c", SET, tokenizer("unigram", STRIPPING), "last")
    with pytest.raises(UserError, match=r"tokens first:1\) and .* hold no tokens that end at the same character"):
        pair_rows(a, c)
    table = pq.read_table(tmp_path / "c" / "rows.parquet")
    blind = table.set_column(4, "char_end", pa.array(np.full(len(table), -1, np.int32)))
    pq.write_table(blind, tmp_path / "c" / "rows.parquet")
    read_again(c)
    with pytest.raises(UserError, match="the tokenizer of m gave no offsets"):
        pair_rows(a, c)
    pq.write_table(
        pq.read_table(tmp_path / "c" / "prompts.parquet").drop(["content"]), tmp_path / "c" / "prompts.parquet"
    )
    read_again(c)
    with pytest.raises(UserError, match="keeps no contents"):
        pair_rows(a, c)
