"""Graders that are models, and graders of one's own: the plumbing, on a tiny random classifier and the bundled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

from tests.conftest import VOCABULARY, make_module, save_folder, word_tokenizer
from workbench.cli import app
from workbench.errors import UserError
from workbench.evaluate import registry
from workbench.evaluate.graders import Verdict, filled, grade, language, verdicts
from workbench.evaluate.judges import label_probabilities, reply_log_odds
from workbench.evaluate.plugins import load_plugin, origin
from workbench.evaluate.scripts import main_script, script_share
from workbench.models import load
from workbench.prompts import Prompt, PromptSet, encode, opener_ids, pad

ANSWERS = ["w1 w2 w3", "w9", "w40 w41 w42 w43 w44"]
PROMPTS = [Prompt(None, f"w{i} w{i + 1}", str(i)) for i in range(3)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random text classifier of two labels, saved as an ordinary folder."""
    torch.manual_seed(0)
    config = tf.BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=16, max_position_embeddings=12, pad_token_id=0,
                           id2label={0: "plain", 1: "rude"}, label2id={"plain": 0, "rude": 1})  # fmt: skip
    module = tf.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        module.classifier.weight.mul_(50)
    return save_folder(module, tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "GRADERS", dict(registry.GRADERS))
    monkeypatch.setattr(registry, "BATCH", set(registry.BATCH))


def test_a_classifier_gives_the_probability_of_its_label(classifier):
    module = tf.AutoModelForSequenceClassification.from_pretrained(classifier)
    with torch.inference_mode():
        ids = [word_tokenizer()(a, return_tensors="pt", return_token_type_ids=False) for a in ANSWERS]
        by_hand = [module(**one).logits.softmax(-1)[0, 1].item() for one in ids]
    found = verdicts("classifier", ANSWERS, PROMPTS, model=str(classifier), label="rude", threshold=by_hand[1])
    assert [v.score for v in found] == pytest.approx(by_hand, abs=1e-5)
    low = label_probabilities(str(classifier), ANSWERS, "plain", batch_size=2)
    assert low == pytest.approx([1 - p for p in by_hand], abs=1e-5)
    between = sorted(by_hand)[1] - 1e-4
    passed = grade("classifier", ANSWERS, PROMPTS, model=str(classifier), label="rude", threshold=between)
    assert passed == [p >= between for p in by_hand]
    both = verdicts("classifier", ANSWERS, PROMPTS, model=str(classifier), label="rude", text="{prompt} {answer}")
    joint = [f"{p.user} {a}" for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert [v.score for v in both] == label_probabilities(str(classifier), joint, "rude")
    assert label_probabilities(str(classifier), ["w1 " * 40], "rude")  # longer than it reads: cut


def test_what_is_no_classifier_is_refused(classifier, tmp_path):
    with pytest.raises(UserError, match="no label 'toxic'; allowed: plain, rude"):
        label_probabilities(str(classifier), ANSWERS, "toxic")
    with pytest.raises(UserError, match="is no text classifier but LlamaForCausalLM"):
        label_probabilities(str(save_folder(make_module("llama"), tmp_path / "m")), ANSWERS, "rude")


def test_a_judge_scores_by_the_log_odds_of_its_reply(tmp_path):
    folder = save_folder(make_module("llama"), tmp_path / "judge")
    model = load(folder)
    found = verdicts("judge", ANSWERS, PROMPTS, model=str(folder), question="w7", text="{question} {prompt} {answer}",
                     yes=["w1", "w2"], no="w3", batch_size=2)  # fmt: skip
    for verdict, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        asked = PromptSet.load([f"w7 {prompt.user} {answer}"])
        yes, no = (opener_ids(words, model.tokenizer, asked[0]) for words in (["w1", "w2"], ["w3"]))
        with torch.inference_mode():
            p = model.logits(*pad(encode(asked, model.tokenizer), 0, "left"))[0, -1].double().softmax(0)
        odds = (p[yes].sum().log() - p[no].sum().log()).item()
        assert verdict.score == pytest.approx(odds, abs=1e-4)
        assert verdict.passed == (odds >= 0)
    assert reply_log_odds(str(folder), [], ["w1"], ["w3"]) == []
    with pytest.raises(UserError, match="begin with the same token"):
        reply_log_odds(str(folder), ["w1"], ["w4"], ["w4 w5"])


def test_a_bundled_model_judges_from_the_command_line(tmp_path):
    """Plumbing alone: so small a model knows nothing of what it is asked."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": "7 plus 8", "answer": a}) + "\n" for a in ("15", "sorry")))
    line = ["grade", str(file), "--grader", "judge", "--arg", "model=bundled:donor", "--arg", "question=Is it right?",
            "--arg", "yes=answer", "--arg", "no=sorry", "--out", str(tmp_path / "v.jsonl"), "--json"]  # fmt: skip
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    written = [json.loads(text) for text in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in written] == [row["score"] >= 0 for row in written]


def test_what_stands_in_an_answer_is_not_filled_in():
    assert filled("{question} {answer}", question="is {answer} right", answer="{question}") == (
        "is {answer} right {question}"
    )


def test_a_grader_of_ones_own_is_given_all_answers_at_once(registered):
    seen = []

    @registry.register_batch("longest")
    def longest(answers: list[str], prompts: list[Prompt], *, than: int = 0) -> list[Any]:
        seen.append(len(answers))
        return [Verdict(len(a) > than, float(len(a))) for a in answers]

    assert grade("longest", ANSWERS, PROMPTS, than=3) == [True, False, True]
    assert seen == [3]
    assert [v.score for v in verdicts("longest", ANSWERS, PROMPTS)] == [8.0, 2.0, 19.0]
    assert grade("longest", [], []) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [([True], "gave 1 verdicts for 3 answers"), ([0.5, 0.2, 0.1], r"gave 0\.5; it must give a bool or a Verdict")],
)
def test_verdicts_that_are_none_are_refused(given, says, registered):
    registry.register_batch("odd")(lambda answers, prompts: given)
    with pytest.raises(UserError, match=says):
        grade("odd", ANSWERS, PROMPTS)


PLUGIN = """
from workbench.evaluate.graders import Verdict, register, register_batch

@register("shouting")
def shouting(answer, prompt):
    return answer.isupper()

@register_batch("long")
def long(answers, prompts, *, than: int = 3):
    return [len(a) > than for a in answers]
"""


def test_a_plugin_registers_graders_for_the_command_line(registered, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "a.jsonl").write_text('{"answer": "HA"}\n{"answer": "hello"}\n')
    line = ["grade", str(tmp_path / "a.jsonl"), "--plugin", str(tmp_path / "mine.py"), "--json", "--grader"]
    for name, rate in (("shouting", 0.5), ("long", 0.5)):
        registry.GRADERS.pop(name, None)
        registry.GRADERS.pop("long", None)
        registry.GRADERS.pop("shouting", None)
        result = CliRunner().invoke(app, [*line, name])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["arms"]["answer"]["rate"]["value"] == rate
    before = origin("shouting")
    assert before is not None
    assert origin("refusal") is None
    (tmp_path / "mine.py").write_text(PLUGIN + "\n# changed\n")
    assert origin("shouting") != before


def test_a_module_that_is_imported_already_is_a_plugin_too(registered, tmp_path, monkeypatch):
    (tmp_path / "some_graders_of_mine.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        assert load_plugin("some_graders_of_mine") == ["long", "shouting"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("gone.py", None, "no such file"),
        ("no_such_module_here", None, "cannot be imported"),
        ("fails.py", "1 / 0", "failed: ZeroDivisionError"),
        ("empty.py", "x = 1", "registers no grader"),
        ("taken.py", PLUGIN.replace("shouting", "refusal"), "'refusal' is registered already"),
    ],
)
def test_plugins_that_do_not_work_are_refused(name, text, says, registered, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        load_plugin(str(tmp_path / name) if name.endswith(".py") else name)


@pytest.mark.parametrize(
    ("asked", "answer", "right"),
    [
        ("What is seven?", "Sieben, natürlich.", True),  # a language is not told from its script
        ("What is seven?", "это семь", False),
        ("What is seven?", "先计算 first", False),
        ("What is seven?", "it is 7 答", True),
        ("Сколько?", "семь", True),
        ("Сколько?", "seven", False),
        ("七は何ですか", "七です", True),
        ("7 + 8", "anything at all", True),
        ("What is it?", "15", True),
        ("ποιο;", "", True),
    ],
)
def test_language_follows_the_script_of_the_prompt(asked, answer, right):
    assert language(answer, Prompt(None, asked, "q")) is right


def test_language_by_name():
    prompt = Prompt(None, "", "q")
    assert language("안녕 세계", prompt, script="korean")
    assert not language("hello", prompt, script="korean")
    assert language("hello мир", prompt, script="latin", share=0.6)
    with pytest.raises(UserError, match="has no text whose script"):
        language("hello", prompt)
    assert main_script("漢字かな") == "japanese"
    assert main_script("漢字") == "han"
    assert script_share("ＡＢ", "latin") == 1.0
    assert script_share("12 !", "latin") is None
