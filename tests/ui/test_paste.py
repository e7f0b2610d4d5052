"""The page of pastes: every state of a run, every figure's code, others' text as text, and sessions that do not mix."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ui.held import HeldModel
from ui.pages.paste import answers
from workbench.adapters import Adapter, vector
from workbench.errors import UserError
from workbench.jobs import Job
from workbench.models import load
from workbench.sites import Site

from ..conftest import make_model
from .conftest import as_markup, charts, run_snippets, words
from .paste_runs import PROMPT, paste_run, write_run

EVIL = ("<script>alert(1)</script>", "[x](javascript:1)", "**b**", "a\u202eb", "x" * 10_000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paste_run(tmp_path_factory.mktemp("work"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "work"))


# -- states ---------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_shown_with_its_stored_answers_and_all_its_figures(open_page, made):
    page = open_page("paste", made)
    assert not page.exception
    said = words(page)
    assert "kept base 0" in said
    assert "kept paste 0" in said
    assert page.selectbox(key="ask").value == 0
    assert len(page.get("plotly_chart")) == 3
    assert run_snippets(page) == 3


def test_the_snippets_of_other_picks_run_too(open_page, made):
    page = open_page("paste", made, strength="0.5", positions="all", schedule="linear", n="4", whose="Recipient + paste",
                     over="the prompt alone", curve="the run's 300 evaluation prompts, with intervals")  # fmt: skip
    assert not page.exception
    assert run_snippets(page) == 3
    code = "\n".join(c.value for c in page.code)
    assert "PasteSettings(strength=0.5, layers=None, positions='all', schedule='linear:4')" in code
    page = open_page("paste", made, whose="Donor + adapter")
    assert run_snippets(page) == 3
    assert "workbench.load('bundled:donor'" in "\n".join(c.value for c in page.code)


def test_a_run_without_adapters_says_what_to_run_and_shows_what_it_keeps(open_page, folder):
    shutil.rmtree(folder / "first" / "adapters")
    page = open_page("paste", folder)
    assert not page.exception
    assert "This run has no paste yet." in words(page)
    assert f"workbench run {folder}/first/job.toml" in words(page)
    assert "kept base 0" in words(page)
    assert page.button(key="answer").disabled
    assert run_snippets(page) == 1  # the stored curve


def test_a_model_that_may_not_be_loaded_is_not_and_the_rest_is_shown(open_page, folder):
    job = (folder / "first" / "job.toml").read_text().replace("bundled:recipient", "somebody/else")
    (folder / "first" / "job.toml").write_text(job)
    page = open_page("paste", folder)
    assert not page.exception
    assert f"workbench ui {folder} --model somebody/else" in words(page)
    assert "kept paste 0" in words(page)
    assert page.button(key="answer").disabled
    assert run_snippets(page) == 1


def test_a_donor_that_may_not_be_loaded_leaves_the_recipient(open_page, folder):
    job = (folder / "first" / "job.toml").read_text().replace("bundled:donor", "somebody/else")
    (folder / "first" / "job.toml").write_text(job)
    page = open_page("paste", folder, ask="type one", say=PROMPT, tokens="3")
    page.button(key="answer").click().run()
    assert not page.exception
    kept = page.session_state[answers.KEPT]
    assert sorted(kept) == ["base", "native", "paste"]
    assert all(said.whole and not said.problem for said in kept.values())


def test_a_damaged_adapter_is_one_line(open_page, folder):
    (folder / "first" / "adapters" / "reasoning" / "paste" / "adapter.safetensors").write_bytes(b"no")
    page = open_page("paste", folder)
    assert not page.exception
    assert "adapter.safetensors" in words(page)
    assert page.button(key="answer").disabled
    page = open_page("paste", folder, behaviour="refusal")
    assert not page.button(key="answer").disabled


def test_an_adapter_of_another_model_is_one_line(open_page, folder):
    place = folder / "first" / "adapters" / "reasoning" / "paste"
    replace(Adapter.load(place), base={"name": "another", "weights": "x"}).save(place, overwrite=True)
    page = open_page("paste", folder, tokens="2")
    page.button(key="answer").click().run()
    assert not page.exception
    assert "belongs to another" in words(page)
    assert page.session_state[answers.KEPT]["base"].problem == ""


def test_damaged_metrics_and_answers_are_lines(open_page, folder):
    (folder / "first" / "metrics.json").write_text("{")
    page = open_page("paste", folder)
    assert not page.exception
    assert "is not whole JSON" in words(page)
    (folder / "second").mkdir()
    shutil.copy(folder / "first" / "job.toml", folder / "second" / "job.toml")
    (folder / "first" / "job.toml").write_text("[")
    assert not open_page("paste", folder).exception


def test_damaged_answers_are_a_line(open_page, folder):
    (folder / "first" / "answers" / "reasoning.jsonl").write_text('{"prompt": "a"}\n')
    page = open_page("paste", folder)
    assert not page.exception
    assert "has no column" in words(page)
    assert page.selectbox(key="ask").value == -1


def test_no_prompt_and_a_prompt_that_is_too_long(open_page, made):
    page = open_page("paste", made, ask="type one")
    assert not page.exception
    assert "Type a prompt" in words(page)
    assert page.button(key="answer").disabled
    page.text_area(key="say").set_value("plus 1 " * 2500).run()
    page.button(key="answer").click().run()
    assert not page.exception
    assert words(page).count("give a shorter one, or fewer new tokens") == 4
    assert "give a shorter one" in words(page)


def test_links_that_ask_for_what_is_not_there_are_refused(open_page, made):
    page = open_page("paste", made, behaviour="../../etc", positions="<b>", run="../secret")
    assert not page.exception
    assert words(page).count("it was refused") == 3
    assert page.selectbox(key="behaviour").value == "reasoning"


def test_an_adapter_folder_that_leads_out_is_not_read(open_page, folder, made):
    place = folder / "first" / "adapters" / "reasoning"
    shutil.rmtree(place)
    place.symlink_to(made / "first" / "adapters" / "reasoning")
    page = open_page("paste", folder)
    assert not page.exception
    assert "leads out of the opened folder" in words(page)


# -- answers --------------------------------------------------------------------------------------------------------------


def test_four_answers_are_those_of_the_models(open_page, made):
    page = open_page("paste", made, tokens="6")
    page.button(key="answer").click().run()
    kept = page.session_state[answers.KEPT]
    run = made / "first" / "adapters" / "reasoning"
    for arm, side, folder in (
        ("base", "recipient", None), ("paste", "recipient", "paste"), ("native", "recipient", "native"),
        ("donor_adapter", "donor", "donor"),
    ):  # fmt: skip
        adapter = None if folder is None else Adapter.load(run / folder)
        want = load(f"bundled:{side}", device="cpu").generate([PROMPT], max_new_tokens=6, adapter=adapter)[0]
        assert kept[arm].answer == want
        assert kept[arm].whole
        assert want.strip() in words(page)


def test_settings_are_the_pastes_alone_and_only_it_is_answered_again(open_page, made, monkeypatch):
    page = open_page("paste", made, tokens="3")
    page.button(key="answer").click().run()
    asked: list[Any] = []
    monkeypatch.setattr(answers, "stream", lambda name, prompt, adapter, *rest: asked.append(adapter) or "again")
    page.slider(key="strength").set_value(0.0).run()
    assert "not answered yet" in words(page)
    page.button(key="answer").click().run()
    assert [a.strength for a in asked] == [0.0]
    page.multiselect(key="layers-reasoning").set_value([3]).run()
    page.slider(key="strength").set_value(2.0).run()
    page.button(key="answer").click().run()
    assert asked[-1] == Adapter.load(made / "first" / "adapters" / "reasoning" / "paste").only([3]) * 2


def test_with_no_layer_nothing_is_pasted(open_page, made):
    page = open_page("paste", made, ask="type one", say=PROMPT)
    page.multiselect(key="layers-reasoning").set_value([]).run()
    assert not page.exception
    spec = charts(page)[0]
    assert set(spec["data"][0]["marker"]["color"]) == {0.0}
    assert "exactly 0" in str(spec["layout"]["annotations"])


def test_a_stopped_answer_keeps_what_came(open_page, made, monkeypatch):
    def half(name: str, prompt: str, adapter: Any, decoding: Any, on_text: Callable[[str], None], waiting: Any) -> str:
        on_text("as far as")
        raise UserError("the model was released meanwhile")

    monkeypatch.setattr(answers, "stream", half)
    page = open_page("paste", made)
    page.button(key="answer").click().run()
    assert not page.exception
    assert words(page).count("as far as") >= 4
    assert "released meanwhile" in words(page)


def test_a_sampled_answer_depends_on_its_seed_alone(open_page, made):
    def answer(seed: str) -> str:
        page = open_page("paste", made, tokens="12", sample="true", temperature="3.0", seed=seed)
        page.button(key="answer").click().run()
        assert not page.exception
        return str(page.session_state[answers.KEPT]["base"].answer)

    assert answer("1") == answer("1") != answer("2")


# -- the rest of the page -------------------------------------------------------------------------------------------------


def test_a_picked_token_is_in_the_address_and_shows_its_bars(open_page, made):
    page = open_page("paste", made)
    first = page.selectbox(key="token").value
    other = page.selectbox(key="token").set_value(0 if first else 1).run()
    assert not other.exception
    assert f"figure = top_bars(changes, {0 if first else 1})" in words(other)
    assert run_snippets(other) == 3


def test_another_behaviour_has_its_own_prompts_and_keeps_what_it_can(open_page, made):
    page = open_page("paste", made, ask=f"1: {'w'}")
    page.selectbox(key="token").set_value(2).run()
    page.selectbox(key="behaviour").set_value("refusal").run()
    assert not page.exception
    assert page.selectbox(key="ask").value == 1
    assert page.selectbox(key="ask").options[2] == "1: refusal w"
    assert "refusal w" in words(page)
    assert page.selectbox(key="token").value == 2
    assert "it was refused" not in words(page)


def test_a_job_file_is_written_once_and_overwrites_nothing(open_page, folder):
    page = open_page("paste", folder, strength="0.5")
    page.button(key="write").click().run()
    assert not page.exception
    file = folder / "first-reasoning.toml"
    job = Job.load(file)
    assert job.paste.strength == 0.75
    assert [b.name for b in job.behaviours] == ["reasoning"]
    assert f"workbench run {file}" in words(page)
    before = file.read_bytes()
    page.button(key="write").click().run()
    assert "is there already" in words(page)
    assert file.read_bytes() == before


def test_a_name_that_leads_out_writes_nothing(open_page, folder):
    before = sorted(folder.parent.rglob("*"))
    page = open_page("paste", folder)
    page.text_input(key="job-reasoning").set_value("../out").run()
    assert not page.exception
    assert "these settings: name" in words(page)
    assert not [b for b in page.button if b.key == "write"]
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("evil", EVIL)
def test_prompts_answers_and_names_are_text(open_page, tmp_path, made, monkeypatch, evil):
    adapters = {
        arm: Adapter.load(made / "first" / "adapters" / "reasoning" / arm) for arm in ("paste", "native", "donor")
    }
    job = Job.load(made / "first" / "job.toml")
    table = job.behaviours[0].model_copy(update={"openers": [evil[:40]], "score_name": evil})
    job = job.model_copy(update={"behaviours": [table], "out": str(tmp_path)})
    write_run(tmp_path / "run", job, adapters, (evil, "w"))
    short = evil[:200]
    monkeypatch.setattr(answers, "stream", lambda *a: a[4](short) or short)
    page = open_page("paste", tmp_path)
    page.button(key="answer").click().run()
    assert not page.exception
    assert not as_markup(page, evil[:200])
    assert evil[:200].replace("\u202e", "⟨U+202E⟩") in words(page)
    for chart in page.get("plotly_chart"):
        assert "<script" not in chart.proto.spec
        assert "\u202e" not in chart.proto.spec
    assert max(len(o) for box in page.selectbox for o in box.options) < 400


# -- several sessions -----------------------------------------------------------------------------------------------------


def test_two_sessions_that_answer_at_once_do_not_mix(monkeypatch):
    model = make_model("llama")
    held = HeldModel(model)
    monkeypatch.setattr(answers, "held_model", lambda name: held)
    push = 4 * torch.randn(model.width, generator=torch.Generator().manual_seed(0))
    arms = {"w1 w2": None, "w1 w3": vector(Site(1), push, positions="all"), "w4": vector(Site(1), -push)}
    decoding = answers.Decoding(12)
    want = {p: model.generate([p], max_new_tokens=12, adapter=a)[0] for p, a in arms.items()}
    found, order = dict[str, list[str]](), list[str]()

    def session(prompt: str) -> None:
        for _ in range(3):
            pieces: list[str] = []
            come = lambda piece, pieces=pieces: (order.append(prompt), pieces.append(piece))  # noqa: E731
            answer = answers.stream("m", prompt, arms[prompt], decoding, come, lambda: None)
            found.setdefault(prompt, []).append(answer)
            assert "".join(pieces).split() == answer.split()

    threads = [threading.Thread(target=session, args=(prompt,)) for prompt in arms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {prompt: [answer] * 3 for prompt, answer in want.items()}
    # nine whole answers one after another: who speaks changes only between two of them
    assert sum(a != b for a, b in itertools.pairwise(order)) < 9


def test_sampled_answers_of_two_models_at_once_are_those_of_their_seeds(monkeypatch):
    models = {"a": make_model("llama"), "b": make_model("gpt2")}
    held = {name: HeldModel(model) for name, model in models.items()}
    monkeypatch.setattr(answers, "held_model", lambda name: held[name])
    # the third is greedy, and leaves what the others draw alone
    asked = [("a", answers.Decoding(12, sample=True, seed=3)), ("b", answers.Decoding(12, sample=True, seed=3)),
             ("b", answers.Decoding(12))]  # fmt: skip
    want = [models[name].generate(["w1 w2"], **decoding.options)[0] for name, decoding in asked]
    found: dict[int, list[str]] = {i: [] for i in range(len(asked))}

    def session(i: int) -> None:
        for _ in range(4):
            name, decoding = asked[i]
            found[i].append(answers.stream(name, "w1 w2", None, decoding, lambda piece: None, lambda: None))

    threads = [threading.Thread(target=session, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: [answer] * 4 for i, answer in enumerate(want)}


def test_who_waits_for_a_model_is_told_and_may_give_up():
    held = HeldModel(make_model("llama"))
    began, done = threading.Event(), threading.Event()

    def busy() -> None:
        with held.alone():
            began.set()
            done.wait(30)

    thread = threading.Thread(target=busy)
    thread.start()
    began.wait(30)

    def give_up() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError), held.alone(give_up):
        raise AssertionError("two at once")
    done.set()
    thread.join(30)
    with held.alone(give_up) as model:
        assert model is held.model


def test_a_model_that_was_released_is_said_to_be():
    held = HeldModel(make_model("llama"))
    held.model = None
    with pytest.raises(UserError, match="released meanwhile"), held.alone():
        raise AssertionError("there is no model")


def test_an_answer_that_is_broken_off_leaves_the_model_free_and_as_it_was(monkeypatch):
    model = make_model("llama")
    held = HeldModel(model)
    monkeypatch.setattr(answers, "held_model", lambda name: held)
    want = model.generate(["w1 w2"], max_new_tokens=8)[0]
    adapter = vector(Site(1), torch.full((model.width,), 0.01), positions="all")

    def stop(piece: str) -> None:
        raise KeyboardInterrupt  # as the explorer's own signal, no ordinary exception

    with pytest.raises(KeyboardInterrupt):
        answers.stream("m", "w1 w2", adapter, answers.Decoding(8), stop)
    assert answers.stream("m", "w1 w2", None, answers.Decoding(8), lambda piece: None) == want
