"""What a fold is calibrated and scored on: texts as they stand, chats with an answer that alone is predicted."""

from __future__ import annotations

import pytest

from workbench.errors import UserError
from workbench.folding.texts import completed, part_of

from ..conftest import word_tokenizer

ASKED = [{"role": "user", "content": "w1 w2"}]
GIVEN = [
    {"text": "w5 w6 w7"},
    {"messages": ASKED},
    {"messages": [*ASKED, {"role": "assistant", "content": "w8 w9"}]},
    {"prompt": "w1 w2", "response": "w8 w9"},
]


def words(ids):
    return word_tokenizer().convert_ids_to_tokens(list(ids))


def test_answers_alone_are_predicted(llama):
    found = completed(llama, GIVEN, answers=4)
    said = [words(ids[start:]) for ids, start in zip(found.ids, found.starts, strict=True)]
    assert said[0] == ["w5", "w6", "w7"]
    assert words(found.ids[1])[: found.starts[1]][-1] == "<assistant>"
    assert 1 <= len(said[1]) <= 4
    assert said[2][:2] == said[3][:2] == ["w8", "w9"]
    answer = llama.generate([{"messages": ASKED}], max_new_tokens=4)[0].split()
    assert said[1] == answer


def test_prompts_may_be_taken_as_they_stand(llama):
    found = completed(llama, GIVEN, answers=0)
    assert found.starts == (1, 1, 1, 1)
    part = part_of(found, [2, 0])
    assert part.ids == (found.ids[2], found.ids[0])
    with pytest.raises(UserError, match="answers=-1: the tokens of an answer are 0"):
        completed(llama, GIVEN, answers=-1)


def test_answers_beyond_the_length_are_told(llama):
    with pytest.raises(UserError, match="no answer is left within 2 tokens"):
        completed(llama, GIVEN[2:3], answers=4, max_length=2)
