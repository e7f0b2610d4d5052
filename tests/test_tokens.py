"""Which positions a policy keeps of a prompt: by place, by turn, by characters, by a predicate."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from functools import partial

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from workbench.errors import UserError
from workbench.prompts import Prompt, PromptSet
from workbench.rendering import Encoded, encode_spans, render, special_ids
from workbench.tokens import Predicate, Token, check_tokens, choose, policy_name
from workbench.turns import Frames, turn_spans

from .tokenizer_kinds import KINDS, STRIPPING, TEMPLATE, tokenizer

IDS = [0, 10, 11, 1, 12, 13, 14, 1]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
BARE = "{% for m in messages %}{{ m['content'] }}{{ '\n' if not loop.last }}{% endfor %}"
INST = (
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}[INST] {% if loop.last and "
    "messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def chat(*turns, roles=("user", "assistant"), **meta):
    pairs = zip((roles * len(turns))[: len(turns)], turns, strict=True)
    return Prompt(tuple({"role": r, "content": c} for r, c in pairs), None, "c", None, meta)


def text(value, **meta):
    return Prompt(None, value, "t", None, meta)


def kept(policy, prompt, tok=None, **options):
    """The texts of the tokens that a policy keeps, and where."""
    tok = tok or tokenizer("byte-level")
    shown = render([prompt], tok)
    (one,) = encode_spans([prompt], tok, rendered=shown, **options)
    at = choose(policy, one, prompt, shown[0], special_ids(tok))
    return "".join(shown[0][slice(*one.spans[i])] for i in at), at, one


@pytest.mark.parametrize(
    ("policy", "positions"),
    [
        ("last", [7]),
        ("all", [1, 2, 4, 5, 6]),
        ("first:2", [1, 2]),
        ("last:2", [5, 6]),
        ("every:2", [1, 4, 6]),
        ("first:99", [1, 2, 4, 5, 6]),
        ("all+special", list(range(8))),
        ("every:3+special", [0, 3, 6]),
        ("first:1+special", [0]),
        (lambda token: token.id > 11, [4, 5, 6]),
        (lambda token: token.special, []),
        (Predicate(lambda token: token.special), [0, 3, 7]),
    ],
)
def test_policies_by_place(policy, positions):
    assert choose(policy, Encoded(IDS, [(-1, -1)] * 8), text("x"), "x", {0, 1}) == positions


def test_nothing_to_keep():
    assert choose("all", Encoded([0, 1], [(0, 0)] * 2), text("x"), "x", {0, 1}) == []
    assert choose("last", Encoded([0, 1], [(0, 0)] * 2), text("x"), "x", {0, 1}) == [1]


@pytest.mark.parametrize("policy", ["", "lst", "first", "first:0", "first:-1", "every:x", "all:2", "last:1.5", "spans:",
                                    "response:2", "first:²", "user:"])  # fmt: skip
def test_unknown_policies_are_named(policy):
    with pytest.raises(
        UserError, match=r"allowed: last, all, first:n.*response, assistant, user, spans, spans:KEY.*function"
    ):
        check_tokens(policy)


def test_allowed_policies_are_returned():
    for policy in ("response", "assistant+special", "user", "spans", "spans:where+special", str.isupper):
        assert check_tokens(policy) is policy


# turns

TURNS = chat("name a cat", " the mat", "and another", "the hat")


@pytest.mark.parametrize("template", [TEMPLATE, STRIPPING, CHATML])
@pytest.mark.parametrize("kind", ["byte-level", "unigram", "llama 2"])
def test_turns_are_told_apart(kind, template):
    tok = tokenizer(kind, template)
    assert kept("response", TURNS, tok)[0].strip() == "the hat"
    assert "".join(kept("assistant", TURNS, tok)[0].split()) == "thematthehat"
    assert "".join(kept("user", TURNS, tok)[0].split()) == "nameacatandanother"


def test_plain_text_is_all_the_users_and_has_no_response():
    assert kept("user", text("a cat"))[0] == "a cat"
    assert kept("assistant", text("a cat"))[1] == []
    with pytest.raises(UserError, match="'t' is a plain text; tokens='response' keeps the assistant's turn at the end"):
        kept("response", text("a cat"))
    with pytest.raises(UserError, match="'c' is a chat that ends with the user's turn"):
        kept("response", TURNS if len(TURNS.messages) % 2 else chat("a", "b", "c"))


@pytest.mark.parametrize("policy", ["response", "user"])
def test_truncated_prompts_keep_their_turns(policy):
    prompt = chat("the cat sat on the mat " * 9 + "why?", "the hat")
    found, at, one = kept(policy, prompt, max_length=30)
    assert one.cut
    assert found == "the hat" if policy == "response" else "sat on the mat why?".endswith(found[-19:])
    assert max(at) < len(one.ids) == 30


def test_truncation_cuts_the_user_where_the_answer_says_the_same():
    prompt = chat("the cat sat on the mat", "the cat sat on the mat")
    whole = kept("response", prompt)[0]
    found, _, one = kept("response", prompt, max_length=len(kept("all", prompt)[2].ids) - 3)
    assert found == whole
    assert one.cut == 3


@pytest.mark.parametrize("template", [TEMPLATE, STRIPPING, CHATML])
@pytest.mark.parametrize("turns", [
    ["user"], ["assistant"], ["<|user|>"], ["s"], [":"], ["ASSISTANT:"], ["\n"], [" x "], [">", "|"], ["hi", "hi"],
    ["a", "ab", "b"], ["ab", "a", "ab a"], ["user", "assistant", "user"],
])  # fmt: skip
def test_contents_that_look_like_markers_or_one_another(turns, template):
    prompt = chat(*turns)
    tok = tokenizer("byte-level", template)
    (shown,), (one,) = render([prompt], tok), encode_spans([prompt], tok)
    found = turn_spans(prompt, shown, one.frame)
    assert [shown[a:b].strip() for _, a, b in found] == [t.strip() for t in turns]
    assert [role for role, *_ in found] == ["user", "assistant", "user"][: len(turns)]
    edges = [0, *(e for _, a, b in found for e in (a, b)), len(shown)]
    assert [shown[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)] == list(one.frame.pieces)


@settings(deadline=None)
@given(st.lists(st.text("ab <|user>:ASINT\né日😀", min_size=1).map(lambda t: t + "x"), min_size=1, max_size=4),
       st.sampled_from([TEMPLATE, STRIPPING, CHATML]))  # fmt: skip
@example(["<|end|>", "<|end|><|user|>"], TEMPLATE)
@example(["\n", "x\nASSISTANT: y"], STRIPPING)
def test_every_content_is_where_the_template_wrote_it(turns, template):
    """What is left without the contents is what the template writes around any others."""
    prompt, tok = chat(*turns), tokenizer("byte-level", template)
    (shown,), (one,) = render([prompt], tok), encode_spans([prompt], tok)
    found = turn_spans(prompt, shown, one.frame)
    strip = str.strip if template == STRIPPING else str
    assert [shown[a:b] for _, a, b in found] == list(map(strip, turns))
    other = chat(*("QQ" for _ in turns))
    (plain,) = render([other], tok)
    edges = [0, *(e for _, a, b in found for e in (a, b)), len(shown)]
    assert "QQ".join(shown[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)) == plain


@pytest.mark.parametrize(
    "turns", [["user"], ["assistant"], ["s"], ["user", "assistant"], ["assistant", "user"], ["hi", "hi"]]
)
@pytest.mark.parametrize("template", [TEMPLATE, CHATML])
def test_turns_are_found_without_a_frame(turns, template):
    prompt, tok = chat(*turns), tokenizer("byte-level", template)
    (shown,) = render([prompt], tok)
    assert turn_spans(prompt, shown) == turn_spans(prompt, shown, encode_spans([prompt], tok)[0].frame)


def test_frames_are_learned_from_other_prompts():
    tok = tokenizer("byte-level", STRIPPING)
    frames = Frames()
    for word in ("the cat", "a mat ", ":", "R"):
        frames.learn(chat(word), render([chat(word)], tok)[0])
    for word in (":", "R", "USER", " E "):
        (shown,), (one,) = render([chat(word)], tok), encode_spans([chat(word)], tok)
        assert turn_spans(chat(word), shown, frames.get(chat(word))) == turn_spans(chat(word), shown, one.frame)
    assert frames.get(chat("a", "b")) is None


def test_a_moved_system_prompt_and_dropped_reasoning_are_found():
    tok = tokenizer("byte-level", INST)
    prompt = chat("be brief", "hello", "yes", "and?", roles=("system", "user", "assistant", "user"))
    (shown,), (one,) = render([prompt], tok), encode_spans([prompt], tok)
    assert [shown[a:b] for _, a, b in turn_spans(prompt, shown, one.frame)] == ["be brief", "hello", "yes", "and?"]
    thinking = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    assert (
        kept("assistant", chat("why?", "<think>so</think>the cat", "ok"), tokenizer("byte-level", thinking))[0]
        == "the cat"
    )


def test_a_content_that_the_template_drops_is_named_where_it_is_wanted():
    tok = tokenizer(
        "byte-level", TEMPLATE.replace("m['content']", "m['content'] | upper if loop.first else m['content']")
    )
    prompt = chat("why?", "the cat")
    assert kept("response", prompt, tok)[0] == "the cat"
    with pytest.raises(UserError, match=r"prompt 'c': message 0 \(user\) is not in the rendered text as given"):
        kept("user", prompt, tok)
    with pytest.raises(UserError, match=r"message 0 \(user\)"):
        turn_spans(prompt, render([prompt], tok)[0])


def test_contents_of_parts_are_turns_too():
    parts = TEMPLATE.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")
    prompt = Prompt(({"role": "user", "content": [{"type": "text", "text": "the cat"}]},), None, "c")
    assert kept("user", prompt, tokenizer("byte-level", parts))[0] == "the cat"


# characters


def test_spans_are_characters_of_the_text_or_of_the_last_users_turn():
    assert kept("spans", text("hello 日本 world", spans=[[6, 8]]))[0] == "日本"
    assert kept("spans:at", chat("  the cat sat ", at=[[6, 9]]), tokenizer("wordpiece", STRIPPING))[0] == "cat"
    several = chat("cat", "the mat", "the hat", spans=[[1, 4, 7], [-1, 4, 7]])
    assert kept("spans", several, tokenizer("wordpiece"))[0] == "mathat"
    assert kept("spans", text("a cat", spans=[]))[1] == []
    found = kept("spans", replace(several, meta={"spans": [[0, 3]]}), tokenizer("wordpiece"))[0]
    assert found == "the"


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), st.data(), st.sampled_from(KINDS))
def test_a_token_is_kept_if_and_only_if_it_covers_a_wanted_character(value, data, kind):
    start = data.draw(st.integers(0, len(value)))
    end = data.draw(st.integers(start, len(value)))
    tok = tokenizer(kind)
    assume(tok.tokenize(value))
    _, at, one = kept("spans+special", text(value, spans=[[start, end]]), tok)
    wide = [i for i, (a, b) in enumerate(one.spans) if b > a]
    assert [i for i in at if i in wide] == [i for i in wide if set(range(*one.spans[i])) & set(range(start, end))]


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({}, r"reads meta\['spans'\], which is missing \(it has nothing\)"),
        ({"span": 1}, r"missing \(it has span\)"),
        ({"spans": 3}, "which is 3; give a list"),
        ({"spans": [3]}, r"span 3 of meta\['spans'\] is not understood"),
        ({"spans": [[0, 1.5]]}, "is not understood"),
        ({"spans": [[0, 9, 1, 1]]}, "is not understood"),
        ({"spans": [[0, 6]]}, r"span \[0, 6\] is not within its text of 5 characters"),
        ({"spans": [[3, 2]]}, "is not within"),
        ({"spans": [[4, 0, 2]]}, "names message 4 of 1"),
    ],
)
def test_bad_spans_are_named(meta, said):
    with pytest.raises(UserError, match="prompt 'c': .*" + said):
        kept("spans", chat("a cat", **meta))


def test_turns_and_spans_need_offsets():
    for policy, prompt in (("user", text("x")), ("spans", text("x", spans=[[0, 1]]))):
        with pytest.raises(UserError, match="prompt 't': its tokenizer gives no offsets"):
            choose(policy, Encoded([5], [(-1, -1)]), prompt, "x", set())


# predicates


def test_a_predicate_sees_the_token_in_its_place():
    seen: list[Token] = []
    prompt = chat("why?", "the cat")
    _, at, one = kept(lambda token: seen.append(token) or token.role == "assistant", prompt)
    assert at == kept("assistant", prompt)[1]
    assert [t.position for t in seen] == kept("all", prompt)[1]
    assert {(t.role, t.turn) for t in seen} == {("user", 0), ("assistant", 1)}
    shown = render([prompt], tokenizer("byte-level"))[0]
    assert all((t.text, t.id, t.prompt) == (shown[t.start : t.end], one.ids[t.position], prompt) for t in seen)
    with pytest.raises(FrozenInstanceError):
        seen[0].id = 3
    assert kept(lambda token: token.text.strip() == "cat", prompt, tokenizer("wordpiece"))[0] == "cat"
    seen.clear()
    kept(lambda token: seen.append(token), text("a cat"))
    assert {(t.role, t.turn) for t in seen} == {(None, None)}


def longer_than(token: Token, n: int = 3) -> bool:
    return len(token.text) > n


def test_the_name_of_a_predicate_tells_it_from_others():
    def beyond(n):
        return lambda token: token.position > n

    assert policy_name("first:2+special") == "first:2+special"
    assert policy_name(longer_than).startswith(f"{__name__}.longer_than#")
    assert policy_name(longer_than) == policy_name(longer_than)
    named = [
        longer_than,
        beyond(1),
        beyond(2),
        partial(longer_than, n=1),
        partial(longer_than, n=2),
        Predicate(longer_than),
    ]
    assert len({policy_name(f) for f in named}) == len(named)
    space: dict[str, object] = {}
    for number in (1, 2):
        exec(f"def f{number}(token): return token.position == {number}\nf{number}.__qualname__ = 'f'", space)
    assert policy_name(space["f1"]) != policy_name(space["f2"])
    assert policy_name(space["f1"]) == policy_name(space["f1"])


def test_a_profile_records_its_predicate_and_keeps_its_rows(llama):
    from workbench.profile import profile_model

    prompts = PromptSet.load([{"text": "w1 w2 w3"}, {"text": "w4 w5"}])
    with profile_model(llama, prompts, sites=[0], tokens=lambda token: token.position % 2 == 0) as store:
        assert store.rows(["position"]).position.tolist() == [0, 2, 0]
        assert store.tokens.startswith(f"{__name__}.") and "#" in store.tokens  # noqa: PT018
