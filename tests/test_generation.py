"""Answers as they come, turn by turn, and by the command line."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from workbench import cli_generate
from workbench.adapters import Blend, vector
from workbench.cli import app
from workbench.conversation import Conversation
from workbench.errors import UserError
from workbench.generation import Decoding, check_room
from workbench.models import Model, load
from workbench.prompts import PromptSet, encode
from workbench.sites import Site

from .conftest import make_module, save_folder, word_tokenizer

PROMPTS = ["w20 w21 w22 w23", "w30", "w40 w41"]


def steering(size: float = 8.0, positions: str = "last"):
    return vector(Site(1), size * torch.randn(48, generator=torch.Generator().manual_seed(0)), positions=positions)


def workbench(*line: Any, **more: Any) -> Result:
    return CliRunner().invoke(app, [str(part) for part in line], **more)


def good(*line: Any, **more: Any) -> Result:
    result = workbench(*line, **more)
    assert result.exit_code == 0, result.output
    return result


def told(*line: Any, **more: Any) -> str:
    result = workbench(*line, **more)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, one without, and two adapters."""
    home = tmp_path_factory.mktemp("generation")
    save_folder(make_module("gpt2"), home / "model")
    bare = save_folder(make_module("gpt2"), home / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    steering().save(home / "a")
    steering(-5.0, "generated").save(home / "b")
    return home


# -- how tokens are chosen --------------------------------------------------------------------------------------------


def test_streamed_pieces_are_the_answers_one_after_another(small_model):
    for adapter in (None, steering(), Blend([steering(positions="generated")], "linear:3")):
        answers = small_model.generate(PROMPTS, max_new_tokens=6, adapter=adapter)
        pieces: list[str] = []
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            began = len(pieces)
            streamed = small_model.generate([prompt], max_new_tokens=6, adapter=adapter, on_text=pieces.append)
            assert "".join(pieces[began:]) == streamed[0] == answer
        assert len(pieces) > len(PROMPTS)
        assert small_model.generate(PROMPTS, max_new_tokens=6, adapter=adapter, on_text=pieces.append) == answers


def test_streaming_a_bundled_model_loses_no_character():
    for name, adapter in (("donor", "bundled:refusal"), ("recipient", None)):
        model = load(f"bundled:{name}")
        from workbench.adapters import Adapter

        used = None if adapter is None else Adapter.load(adapter)
        pieces: list[str] = []
        answer = model.generate(["what is 3 plus 4 minus 9 ?"], max_new_tokens=30, adapter=used, on_text=pieces.append)
        assert "".join(pieces) == answer[0]


def test_what_is_known_at_the_end_alone_is_not_streamed(llama):
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(UserError, match="not known before its end"):
            llama.generate(["w1"], on_text=lambda text: None, **options)


def test_draws_are_from_the_whole_distribution_unless_told(llama):
    """A checkpoint's own top_k must not cut what is asked for as it stands."""
    llama.module.generation_config.top_k = 1
    llama.module.generation_config.top_p = 0.1
    greedy = llama.generate(PROMPTS, max_new_tokens=8)
    free = llama.generate(PROMPTS, **Decoding(8, sample=True, temperature=5.0).options)
    assert free != greedy
    assert llama.generate(PROMPTS, **Decoding(8, top_k=1).options) == greedy
    assert llama.generate(PROMPTS, **Decoding(8, top_p=1e-6).options) == greedy
    seeds = [llama.generate(PROMPTS, **Decoding(8, sample=True, temperature=5.0, seed=s).options) for s in (0, 0, 1)]
    assert seeds[0] == seeds[1] == free != seeds[2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "temperature 0.0 must be positive"),
        ({"temperature": float("nan")}, "temperature nan must be positive"),
        ({"top_p": 1.5}, "top_p 1.5 is out of range"),
        ({"top_k": 0}, "top_k 0 is out of range"),
        ({"beams": 0}, "beams 0 is out of range"),
    ],
)
def test_decoding_out_of_range_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        Decoding(**options)


# -- turn by turn -----------------------------------------------------------------------------------------------------


def test_a_conversation_is_kept_and_each_answer_sees_it(small_model):
    talk = Conversation(small_model, system="w5", decoding=Decoding(5))
    first, second = talk.say("w20 w21"), talk.say("w30")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    chat = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w20 w21"}]
    assert [first] == [a.strip() for a in small_model.generate([chat], max_new_tokens=5)]
    chat += [{"role": "assistant", "content": first}, {"role": "user", "content": "w30"}]
    assert [second] == [a.strip() for a in small_model.generate([chat], max_new_tokens=5)]
    talk.reset()
    assert (talk.messages, talk.turns) == (chat[:1], 0)
    assert talk.say("w20 w21") == first


def test_an_adapter_edits_the_end_of_every_turn(small_model):
    talk, plain = (
        Conversation(small_model, steering(), decoding=Decoding(5)),
        Conversation(small_model, decoding=Decoding(5)),
    )
    seen = []
    with small_model.edit({Site(1): lambda h, w: seen.append(w.mask("last").sum().item()) or h}):
        answers = [talk.say(line) for line in ("w20 w21", "w30 w31")]
    assert seen.count(1) == 2  # the prefill of each turn
    assert answers != [plain.say(line) for line in ("w20 w21", "w30 w31")]


def test_the_oldest_turns_go_where_there_is_no_more_room(llama):
    talk = Conversation(llama, system="w7", decoding=Decoding(8))
    lines = [" ".join(f"w{10 * i + j}" for j in range(10)) for i in range(9)]
    for line in lines:
        talk.say(line)
        assert talk.messages[0] == {"role": "system", "content": "w7"}
        assert talk.messages[-2]["content"] == line
    kept = [m["content"] for m in talk.messages if m["role"] == "user"]
    assert talk.turns == len(lines) == len(kept) + talk.forgotten
    assert talk.forgotten > 0
    assert kept == lines[-len(kept) :]
    with pytest.raises(UserError, match=r"there is room for 120; say it in fewer words"):
        talk.say("w1 " * 130)
    assert talk.messages[-2]["content"] == lines[-1]


def test_a_broken_off_answer_is_not_kept(llama):
    talk = Conversation(llama, steering(), decoding=Decoding(8))
    talk.say("w20")
    before, hooks = talk.messages, sum(len(m._forward_hooks) for m in llama.module.modules())

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("w30", on_text=interrupt)
    assert talk.messages == before
    assert sum(len(m._forward_hooks) for m in llama.module.modules()) == hooks


def test_without_a_template_each_line_stands_alone():
    tokenizer = word_tokenizer().__class__(tokenizer_object=word_tokenizer().backend_tokenizer, bos_token="<s>",
                                           eos_token="</s>", pad_token="<pad>", unk_token="<unk>")  # fmt: skip
    model = load(make_module("gpt2"), tokenizer=tokenizer)
    talk = Conversation(model, decoding=Decoding(5))
    assert not talk.remembers
    answers = [talk.say(line) for line in ("w20", "w30", "w20")]
    assert answers[0] == answers[2]
    assert talk.messages == []
    with pytest.raises(UserError, match="no chat template, so there is no place for a system prompt"):
        Conversation(model, system="w1")
    with pytest.raises(UserError, match="the line is empty"):
        talk.say("  ")


def test_drawn_answers_differ_by_turn_and_repeat_by_seed(llama):
    def said(seed: int) -> list[str]:
        talk = Conversation(llama, decoding=Decoding(8, temperature=5.0, seed=seed))
        answers = []
        for _ in range(2):
            answers.append(talk.say("w20"))
            talk._said.clear()
        return answers

    assert said(0) == said(0) != said(5)
    assert len(set(said(0))) == 2


# -- by the command line ----------------------------------------------------------------------------------------------


def answers_of(result: Result) -> list[str]:
    return [json.loads(text)["answer"] for text in result.stdout.splitlines()]


def test_several_adapters_each_with_its_options(home):
    model = load(home / "model")
    line = ("generate", home / "model", *PROMPTS, "--max-new-tokens", 6, "--json")
    two = ("--adapter", home / "a", "--adapter", home / "b")
    a, b = steering(), steering(-5.0, "generated")
    cases: list[tuple[tuple[Any, ...], Blend]] = [
        ((), Blend([a, b])),
        (("--strength", 0.5), Blend([a * 0.5, b * 0.5])),
        (("--strength", 1, "--strength", -2), Blend([a, b * -2])),
        (("--positions", "both", "--schedule", "first:2"), 
         Blend([steering(positions="all"), steering(-5.0, "all")], "first:2")),
        (("--positions", "prompt", "--positions", "generated", "--schedule", "constant", "--schedule", "linear:3"),
         Blend([steering(positions="prompt"), b], ["constant", "linear:3"])),
    ]  # fmt: skip
    found = []
    for options, blend in cases:
        found.append(answers_of(good(*line, *two, *options)))
        assert found[-1] == model.generate(PROMPTS, max_new_tokens=6, adapter=blend)
    assert len({str(answers) for answers in found}) > 3


def test_decoding_options_of_the_command_line(home):
    model = load(home / "model")
    line = ("generate", home / "model", *PROMPTS, "--max-new-tokens", 6, "--json")
    assert answers_of(good(*line, "--beams", 3)) == model.generate(PROMPTS, max_new_tokens=6, num_beams=3)
    drawn = Decoding(6, temperature=3.0, top_p=0.9, top_k=40, seed=3)
    options = ("--temperature", 3, "--top-p", 0.9, "--top-k", 40, "--seed", 3)
    assert answers_of(good(*line, *options)) == model.generate(PROMPTS, **drawn.options)


def test_generate_streams(home):
    streamed = good(
        "generate", home / "model", *PROMPTS, "--max-new-tokens", 6, "--stream", "--adapter", home / "a"
    ).stdout
    printed = good("generate", home / "model", *PROMPTS, "--max-new-tokens", 6, "--adapter", home / "a").stdout
    assert streamed.split() == printed.split()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--strength", 2), "--strength is of an adapter and there is none"),
        (("--schedule", "first:2"), "--schedule is of an adapter"),
        (("--adapter", "A", "--strength", 1, "--strength", 2), "--strength was given 2 times and --adapter 1 times"),
        (("--adapter", "A", "--schedule", "first:2"), "positions 'last' hold none"),
        (("--adapter", "A", "--positions", "middle"), "unknown positions 'middle'"),
        (("--adapter", "A", "--positions", "both", "--schedule", "soon"), "unknown schedule 'soon'"),
        (("--stream", "--json"), "--stream shows words as they come, and --json"),
        (("--stream", "--beams", 2), "and --beams knows them at the end only"),
        (("--top-p", 0), "top_p 0.0 is out of range"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(options, says, home):
    given = [home / "a" if part == "A" else part for part in options]
    result = told("generate", home / "model", "w1", *given)
    assert says in result


def test_chat_from_a_pipe(home):
    line = ("chat", home / "model", "--max-new-tokens", 5, "--adapter", home / "a")
    result = good(*line, input="w20 w21\n\nw30\n/reset\nw20 w21\n/strength 0\nw20 w21\n/quit\nw40\n")
    talk = Conversation(load(home / "model"), steering(), decoding=Decoding(5))
    first, second = talk.say("w20 w21"), talk.say("w30")
    plain = Conversation(talk.model, decoding=Decoding(5))
    plain._said = [{"role": "user", "content": "w20 w21"}, {"role": "assistant", "content": first}]
    wanted = [first, second, first, plain.say("w20 w21")]
    assert result.stdout.splitlines() == wanted
    assert "no chat template" in good("chat", home / "bare", input="w20\n").stderr
    assert good("chat", home / "model", input="").stdout == ""


def test_chat_refuses_in_one_line(home):
    assert "unknown command '/help'; allowed: /quit" in told("chat", home / "model", input="/help\n")
    assert "no adapter whose strength" in told("chat", home / "model", input="/strength 2\n")
    assert "'much' is no number" in told("chat", home / "model", "--adapter", home / "a", input="/strength much\n")
    assert "no place for a system prompt" in told("chat", home / "bare", "--system", "w1", input="w1\n")
    other = vector(Site(0), torch.ones(7))
    other.save(home / "narrow")
    assert "width 7" in told("chat", home / "model", "--adapter", home / "narrow", input="w1\n")


class AtTerminal:
    """What a person does at a terminal: types lines, and at some point presses Ctrl-C."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines: Iterator[Any] = iter(lines)

    def __call__(self, prompt: str) -> str:
        line = next(self.lines)
        if not isinstance(line, str):
            raise line
        return line


@pytest.mark.usefixtures("interrupts_are_heard")
def test_ctrl_c_breaks_an_answer_off_and_ends_the_chat_where_there_is_none(llama, monkeypatch, capsys):
    typed = AtTerminal("w20", "/nonsense", "w30", "w40", KeyboardInterrupt)
    monkeypatch.setattr("builtins.input", typed)
    talk = Conversation(llama, steering(), decoding=Decoding(5))
    shown = cli_generate._show

    def press(text: str) -> None:
        if talk.turns == 1 and talk.asked == "w30":
            talk.asked = ""
            signal.raise_signal(signal.SIGINT)
        shown(text)

    say = talk.say

    def noted(text: str, on_text: Any = None) -> str:
        talk.asked = text
        return say(text, on_text)

    monkeypatch.setattr(talk, "say", noted)
    monkeypatch.setattr(cli_generate, "_show", press)
    cli_generate._talk(talk, cli_generate._lines(True), True)
    said = capsys.readouterr()
    assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["w20", "w40"]
    assert "broken off" in said.err
    assert "unknown command '/nonsense'" in said.err


def test_the_end_of_input_ends_the_chat(llama: Model, monkeypatch):
    monkeypatch.setattr("builtins.input", AtTerminal("w1", EOFError))
    assert list(cli_generate._lines(True)) == ["w1"]


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(llama):
    n = check_room(llama, "w1 w2 w3", 20)
    assert n == len(encode(PromptSet.load(["w1 w2 w3"]), llama.tokenizer)[0])
    assert check_room(llama, "w1 w2 w3", llama.max_length - n) == n
    with pytest.raises(UserError, match=rf"takes {n} tokens and .* reads 128, an answer of {129 - n} included"):
        check_room(llama, "w1 w2 w3", llama.max_length - n + 1)


def test_a_greedy_answer_leaves_the_generator_as_it_was(llama):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    llama.generate(["w1 w2"], max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)
