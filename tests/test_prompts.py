"""Prompts are read from anywhere, templated once, given one BOS, and cut without losing the assistant header."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from workbench.errors import UserError
from workbench.models import load
from workbench.prompts import (
    Prompt,
    PromptSet,
    encode,
    encode_spans,
    opener_ids,
    pad,
    partial_openers,
    render,
    response_ids,
)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DATED = '{{ bos_token }}{{ strftime_now("%Y-%m-%d") }} {{ date_string }}{{ messages[0]["content"] }}'


def tokenizer(
    template: str | None = TEMPLATE, *, adds_bos: bool = True, adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["what is two and three", "name a colour", "Sure, I can help"], trainer)
    if adds_bos or adds_eos:
        single = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=special[2:],
    )  # fmt: skip
    found.chat_template = template
    return found


def chat(*turns: str) -> Prompt:
    roles = ["user", "assistant"] * len(turns)
    return Prompt(tuple({"role": r, "content": t} for r, t in zip(roles, turns, strict=False)), None, "p")


def text(value: str) -> Prompt:
    return Prompt(None, value, "t")


def test_one_template_and_one_bos_for_chats():
    tok = tokenizer()
    ids = encode([chat("what is two")], tok)[0]
    assert tok.decode(ids) == "<s><|user|>what is two<|end|><|assistant|>"
    assert ids.count(tok.bos_token_id) == 1


@pytest.mark.parametrize("adds_eos", [False, True])
def test_plain_text_gets_the_bos_that_the_tokenizer_adds_and_no_eos(adds_eos):
    tok = tokenizer(adds_eos=adds_eos)
    for given in ("what is two", "<s>what is two", "<s><s>what is two"):
        assert tok.decode(encode([text(given)], tok)[0]) == "<s>what is two"
    bare = tokenizer(adds_bos=False, adds_eos=adds_eos)
    assert bare.decode(encode([text("what is two")], bare)[0]) == "what is two"


def test_a_template_without_bos_gets_the_tokenizers():
    tok = tokenizer(TEMPLATE.replace("{{ bos_token }}", ""))
    assert tok.decode(encode([chat("two")], tok)[0]) == "<s><|user|>two<|end|><|assistant|>"


def test_the_date_in_a_template_is_pinned():
    assert render([chat(" hi")], tokenizer(DATED)) == ["<s>2024-07-26 26 Jul 2024 hi"]


def test_no_template_reads_one_user_turn_as_text_and_refuses_more():
    tok = tokenizer(None)
    assert render([chat("name a colour")], tok) == ["name a colour"]
    with pytest.raises(UserError, match="no chat template"):
        render([chat("a", "b", "c")], tok)


def test_what_the_template_refuses_is_named():
    with pytest.raises(UserError, match=r"'p'.*roles must alternate"):
        render([chat("a")], tokenizer("{{ raise_exception('roles must alternate') }}"))


def test_truncation_keeps_the_assistant_header_and_the_end_of_the_question():
    tok = tokenizer()
    prompt = chat("name a colour " * 20 + "what is two")
    whole = encode([prompt], tok)[0]
    (cut,) = encode_spans([prompt], tok, max_length=12)
    assert len(cut.ids) == 12
    assert cut.cut == len(whole) - 12
    assert tok.decode(cut.ids).startswith("<s><|user|>")
    assert tok.decode(cut.ids).endswith("what is two<|end|><|assistant|>")
    rendered = render([prompt], tok)[0]
    assert all(rendered[a:b] == tok.decode([i]) for i, (a, b) in zip(cut.ids, cut.spans, strict=True))


def test_truncation_reaches_earlier_turns_where_the_last_is_too_short():
    tok = tokenizer()
    cut = encode([chat("what is two " * 20, "name a colour", "two")], tok, max_length=8)[0]
    assert len(cut) == 8
    assert tok.decode(cut).startswith("<s>")
    assert tok.decode(cut).endswith("two<|end|><|assistant|>")


def test_plain_text_is_cut_from_the_left():
    tok = tokenizer()
    whole = encode([text("what is two and three")], tok)[0]
    assert encode([text("what is two and three")], tok, max_length=4)[0] == [whole[0], *whole[-3:]]


@pytest.mark.parametrize(("prompt", "length"), [(chat("what is two"), 3), (text("what is two"), 1)])
def test_a_prompt_that_truncation_leaves_empty_is_refused(prompt, length):
    with pytest.raises(UserError, match=f"max_length={length} leaves nothing"):
        encode([prompt], tokenizer(), max_length=length)


def test_a_prompt_of_no_tokens_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        encode([text("")], tokenizer())


def test_response_is_what_the_template_writes_after_its_header():
    tok = tokenizer()
    prompt, answer = response_ids(chat("what is two"), "Sure, two", tok)
    assert prompt == encode([chat("what is two")], tok)[0]
    assert tok.decode(answer) == "Sure, two<|end|>"
    assert tok.decode(response_ids(chat("what is two"), "Sure, two", tok, end=False)[1]) == "Sure, two"


def test_response_without_template_is_space_response_eos():
    tok = tokenizer(None)
    for prompt in (chat("what is two"), text("what is two")):
        ids, answer = response_ids(prompt, "three", tok)
        assert tok.decode(ids + answer) == "<s>what is two three</s>"


def test_a_template_without_an_end_of_turn_gets_the_eos():
    tok = tokenizer(TEMPLATE.replace("<|end|>", "\n"))
    assert tok.decode(response_ids(chat("two"), "three", tok)[1]) == "three</s>"


def test_openers_are_the_first_tokens_of_answers_each_once():
    tok = tokenizer()
    found = opener_ids(["Sure", "Sure, two", "three"], tok, chat("two"))
    assert found == list(dict.fromkeys(response_ids(chat("two"), o, tok)[1][0] for o in ("Sure", "three")))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    ids, mask = pad([[5, 6, 7], [8]], 0, side)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids[mask.bool()].tolist() == [5, 6, 7, 8]
    assert mask[1].tolist() == ([0, 0, 1] if side == "left" else [1, 0, 0])
    with pytest.raises(UserError, match="middle"):
        pad([[1]], 0, "middle")


def test_every_kind_of_file_gives_the_same_prompts(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = [
        {"prompt": "what is 2?", "gold": "2", "label": "sum"},
        {"prompt": "name one,\nor two", "gold": "x", "label": "n"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    with (tmp_path / "p.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    sets = [PromptSet.load(tmp_path / name) for name in ("p.jsonl", "p.json", "p.csv", "p.parquet", "saved")]
    assert len({s.full_hash for s in sets}) == 1
    assert sets[0][1] == Prompt(({"role": "user", "content": "name one,\nor two"},), None, "1", "n", {"gold": "x"})
    assert sets[0].hash == PromptSet.load([r["prompt"] for r in rows]).hash


def test_chats_texts_and_columns():
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert PromptSet.load([turns])[0].messages == tuple(turns)
    assert PromptSet.load([{"messages": turns}])[0].messages == tuple(turns)
    assert PromptSet.load([{"text": "a plain text"}])[0].text == "a plain text"
    assert PromptSet.load([{"body": "hi", "text": "no"}], column="body")[0].user == "hi"
    assert PromptSet.load(["hi"], chat=False)[0].text == "hi"
    assert PromptSet.load([{"conversations": ["first turn", "answer"]}])[0].user == "first turn"
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    assert PromptSet.load([{"conversations": shared}])[0].messages == chat("hi", "yes").messages


def test_hash_depends_on_contents_and_order_alone():
    a = PromptSet.load([{"id": "x", "prompt": "one", "gold": 1}, {"id": "y", "prompt": "two"}])
    b = PromptSet.load(["one", "two"])
    assert a.hash == b.hash
    assert a.full_hash != b.full_hash
    assert b.hash not in (b.subset([1, 0]).hash, b.subset([0]).hash, PromptSet.load(["one", "two"], chat=False).hash)
    assert (b[:1] + b[1:]).hash == b.hash


def test_limit_seed_labels_and_system():
    many = PromptSet.load([{"prompt": f"p{i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(50)])
    assert [p.user for p in PromptSet.load(many, limit=2)] == ["p0", "p1"]
    sample = PromptSet.load(many, limit=5, seed=3)
    assert sample == PromptSet.load(many, limit=5, seed=3) != PromptSet.load(many, limit=5, seed=4)
    assert len(many.labelled("odd")) == 25
    with pytest.raises(UserError, match="even, odd"):
        many.labelled("other")
    twice = many.with_system("be brief").with_system("be kind")
    assert [m["content"] for m in twice[0].messages] == ["be kind", "p0"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "no prompts"),
        (["fine", "  "], "prompt 1: is empty"),
        ([{"role": "user", "content": "x"}], "none of the columns"),
        ([[{"role": "user"}]], "a message must be"),
        ([[{"role": "user", "content": ""}]], "message is empty"),
        ([[{"role": "robot", "content": "x"}]], "prompt 0: unknown role 'robot'; allowed: human, user"),
        ([[{"role": ["user"], "content": "x"}]], r"unknown role \['user'\]"),
        (
            [[{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]],
            "no user's turn, only system, assist",
        ),
        ([3], "is an int"),
        (["half \ud83d"], "surrogate"),
        ("missing.jsonl", "no such file"),
        ("bundled:nothing-of-the-kind", "not bundled"),
    ],
)
def test_bad_prompts_are_named(source, said):
    with pytest.raises(UserError, match=said):
        PromptSet.load(source)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000, "line 2: not JSON .nested too deep"),
        ("p.json", b"[" * 100_000, "not JSON .nested too deep"),
        ("p.json", b"[" + b"9" * 5000 + b"]", "not JSON .a number with too many digits"),
        ("p.json", b'{"prompt": "a"}', "must hold a list"),
        ("p.csv", b"prompt,gold\na,1\nwhat, who,2\n", r"row 2 \(line 3\): has 3 cells and the header 2"),
        ("p.xml", b"<a/>", "unknown kind of file"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.parquet", b"nothing", "not a parquet file"),
        ("p.csv", b"a,b\n1,2\n", "it has a, b"),
        ("p.txt", b"\n\n", "no prompts"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        PromptSet.load(tmp_path / name)
    with pytest.raises(UserError, match="at least 1"):
        PromptSet.load(["a"], limit=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "prompt,gold\nwhat is 2?,2\n"),
        ("p.txt", "what is 2?\n"),
        ("p.jsonl", '{"prompt": "what is 2?"}\n'),
        ("p.json", '[{"prompt": "what is 2?"}]'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert PromptSet.load(tmp_path / name).hash == PromptSet.load(["what is 2?"]).hash


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_limit_reads_no_more_of_a_file_than_it_asks_for(tmp_path, kind):
    import tracemalloc

    import pyarrow as pa
    import pyarrow.parquet as pq

    n, path = 15_000, tmp_path / f"p.{kind}"
    lines = {
        "txt": "what is {}?",
        "jsonl": '{{"prompt": "what is {}?"}}',
        "csv": "what is {}?",
        "parquet": "what is {}?",
    }
    made = [lines[kind].format(i) for i in range(n)]
    if kind == "parquet":
        pq.write_table(pa.table({"prompt": made}), path, row_group_size=1000)
    else:
        path.write_text("\n".join(["prompt"] * (kind == "csv") + made) + "\n")
    del made
    PromptSet.load(path, limit=1)  # what is imported on the way is no part of it
    tracemalloc.start()
    first = PromptSet.load(path, limit=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [p.user for p in first] == ["what is 0?", "what is 1?", "what is 2?"]
    assert peak < 50 * n  # bytes; the prompts themselves take several hundred each
    whole = PromptSet.load(path)
    assert len(whole) == n
    assert PromptSet.load(path, limit=9, seed=2) == PromptSet(PromptSet.load(whole, limit=9, seed=2).prompts, "p")


@pytest.mark.parametrize(
    ("name", "content"), [("p.jsonl", '{"prompt": "a"}\n{"prompt"\n'), ("p.csv", "prompt\na\nb,c\n")]
)
def test_what_lies_behind_the_limit_is_not_looked_at(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert PromptSet.load(tmp_path / name, limit=1)[0].user == "a"
    with pytest.raises(UserError, match="2"):
        PromptSet.load(tmp_path / name)


@pytest.mark.parametrize("size", [3, 9000, 20_000])
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_the_first_bad_byte_is_named_however_far_it_is(tmp_path, name, size):
    head = b"prompt\n" + b"a" * 50 + b"\n"
    (tmp_path / name).write_bytes(head + b'"' + b"b" * size + b"\xe9" + b'"\n')
    with pytest.raises(
        UserError, match=rf"not UTF-8 text \(byte {len(head) + 1 + size}\)" if name != "p.jsonl" else "not"
    ):
        PromptSet.load(tmp_path / name)


def test_datasets_generators_and_tables_in_memory():
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": "one", "gold": "1"}, {"prompt": "two", "gold": "2"}]
    data = Dataset.from_list(rows)
    assert PromptSet.load(data).full_hash == PromptSet.load(iter(rows)).full_hash == PromptSet.load(rows).full_hash
    assert PromptSet.load(data, limit=1, seed=0).prompts[0] in PromptSet.load(rows).prompts
    for wrong in (DatasetDict({"train": data}), {"prompt": "one"}, data.to_pandas()):
        with pytest.raises(UserError, match=rf"a {type(wrong).__name__} with .* is not a list of rows; give one split"):
            PromptSet.load(wrong)


def test_chats_in_a_csv_are_json(tmp_path):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi, you"}]
    with (tmp_path / "p.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], [json.dumps(turns)], ["hello"]])
    read = PromptSet.load(tmp_path / "p.csv")
    assert read[0].messages == tuple(turns)
    assert read[1].user == "hello"
    with pytest.raises(UserError, match="prompt 0, column 'messages': begins like a list of messages and is not JSON"):
        PromptSet.load([{"messages": "[{'role': 'user'}"}])


def test_labels_and_metadata_reach_the_store(llama):
    from workbench.profile import profile_model

    rows = [{"id": "x", "text": "w1 w2", "label": "yes", "gold": {"n": 1}}, {"id": "y", "text": "w3"}]
    with profile_model(llama, PromptSet.load(rows), sites=[0]) as store:
        kept = store.prompts()
        assert kept["id"].tolist() == ["x", "y"]
        assert kept["label"].tolist()[0] == "yes"
        assert kept["label"].isna().tolist() == [False, True]
        assert [json.loads(m) for m in kept["meta"]] == [{"gold": {"n": 1}}, {}]


def test_long_cells_are_read_and_longer_ones_named(tmp_path, monkeypatch):
    (tmp_path / "p.csv").write_text("prompt\n" + "a" * 200_000 + "\n")
    before = csv.field_size_limit()
    assert len(PromptSet.load(tmp_path / "p.csv")[0].user) == 200_000
    monkeypatch.setattr("workbench.prompt_files.LONGEST_CELL", 1000)
    with pytest.raises(UserError, match=r"row 1: cannot be read as CSV \(field larger"):
        PromptSet.load(tmp_path / "p.csv")
    assert csv.field_size_limit() == before


def test_every_role_that_chats_have_is_read():
    roles = ["system", "developer", "user", "assistant", "tool"]
    chat = PromptSet.load([[{"role": role, "content": "x"} for role in roles]])[0]
    assert [message["role"] for message in chat.messages] == roles


def test_a_thinking_block_is_part_of_the_prompt_or_refused():
    tok = copy.deepcopy(tokenizer())
    head = "{% for m in messages %}{{ m['role'] }}: "
    block = "{{ '<think> </think> ' if m['role'] == 'assistant' else '' }}"
    tail = "{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant: "
    tok.chat_template = head + block + tail + "{% if enable_thinking is false %}<think> </think> {% endif %}{% endif %}"
    prompt = PromptSet.load(["hello there"])[0]
    assert len(opener_ids(["alpha", "beta"], tok, prompt)) == 2
    tok.chat_template = head + block + tail + "{% endif %}"
    with pytest.raises(UserError, match="writes '<think> </think>' before an answer"):
        opener_ids(["w7"], tok, prompt)


def test_openers_that_the_tokenizer_cuts_are_named():
    prompt = PromptSet.load(["bundled prompts do"])[0]
    tok = load("bundled:recipient", prove=False).tokenizer
    assert partial_openers(["sorry", "let me think"], tok, prompt) == {"sorry": "s"}


def test_a_system_prompt_is_refused_or_told_where_texts_are_plain(caplog):
    plain, chat = {"text": "a"}, {"prompt": "b"}
    with pytest.raises(UserError, match="no prompt is a chat, and plain texts keep no system prompt"):
        PromptSet.load([plain]).with_system("x")
    assert PromptSet.load([plain, chat]).with_system("x")[0].text == "a"
    assert "1 of 2 are plain texts and keep no system prompt" in caplog.text


def test_chats_are_not_read_as_plain_texts():
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(UserError, match=r"prompt 1: its messages is no text but a list, and chat=False \(--plain\)"):
        PromptSet.load([{"prompt": "a"}, chat], chat=False)


def test_turns_that_are_left_out_are_counted(caplog):
    caplog.set_level("INFO")
    assert [p.user for p in PromptSet.load([["a", "b"], ["c"], "d"])] == ["a", "c", "d"]
    assert "1 of 3 prompts are lists of strings, of which only the first is read" in caplog.text


def test_splits_of_a_saved_dataset(tmp_path, caplog):
    from datasets import Dataset, DatasetDict

    caplog.set_level("INFO")
    splits = {name: Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    splits["test"].save_to_disk(tmp_path / "one@x")
    assert PromptSet.load(tmp_path / "both")[0].user == "train"
    assert "the split train of train, test is read; choose another with @split" in caplog.text
    named = PromptSet.load(f"{tmp_path}/both@test")
    assert (named.name, named[0].user) == ("both@test", "test")
    assert PromptSet.load(tmp_path / "one@x")[0].user == "test"
    for name, said in (("both@dev", "no split 'dev'; allowed: train, test"), ("one@x@test", "leave @test out")):
        with pytest.raises(UserError, match=said):
            PromptSet.load(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([{"text": None, "n": 1}], r"prompt 0: its column 'text' is empty \(null\)"),
        ([{"messages": []}], "is an empty list; a prompt is a string"),
        ("", "the name is empty; give a file"),
    ],
)
def test_what_is_empty_or_no_prompt_is_called_so(source, said):
    with pytest.raises(UserError, match=said):
        PromptSet.load(source)
