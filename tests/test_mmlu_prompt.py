"""MMLU's prompts, letter by letter and token by token.

The strings are written by hand, from what the original program does (`hendrycks/test`, evaluate.py: its header puts a blank before
each word of the subject's name after "about ", each example is the question, "\\nA. ..." to "\\nD. ...", "\\nAnswer:",
and for a solved one a blank, the letter and two line breaks).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mmlu_helpers import bytes_tokenizer, keys, llama, question, roberta, subject

from velora.data.mmlu import read_subjects
from velora.data.mmlu_prompt import Encoder, begin_ids, common_prefix, prompt_text, prompts, split_choices
from velora.errors import ConfigError

ALGEBRA = """\
The following are multiple choice questions (with answers) about  abstract algebra.

Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.
A. 0
B. 1
C. 2
D. 3
Answer: B

Statement 1 | If aH is an element of a factor group, then |aH| divides |a|. Statement 2 | If H and K are subgroups of G then HK is a subgroup of G.
A. True, True
B. False, False
C. True, False
D. False, True
Answer: B

Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.
A. 0
B. 4
C. 2
D. 6
Answer:"""  # noqa: E501

LOGIC = """\
The following are multiple choice questions (with answers) about  formal logic.

 Select the best translation into predicate logic: No people drive on Mars.
A. ~Pd
B. (∀x)(Px ∨ ~Dx)
C. (∀x)(Px ⊃ ~Dx)
D. ~Dp
Answer: C

Identify the conclusion of the following argument. It is hard not to verify in our peers the same weakened intelligence due to emotions that we observe in our everyday patients. The arrogance of our consciousness, which in general, belongs to the strongest defense mechanisms, blocks the unconscious complexes. Because of this, it is difficult to convince people of the unconscious, and in turn to teach them what their conscious knowledge contradicts. (Sigmund Freud, The Origin and Development of Psychoanalysis)
A. It is hard not to verify in our peers the same weakened intelligence due to emotions that we observe in our everyday patients.
B. The arrogance of our consciousness, which in general, belongs to the strongest defense mechanisms, blocks the unconscious complexes.
C. Because of this, it is difficult to convince people of the unconscious, and in turn to teach them what their conscious knowledge contradicts.
D. It is difficult to convince people of the unconscious, and in turn to teach them what their conscious knowledge contradicts.
Answer:"""  # noqa: E501

POLICY = """\
The following are multiple choice questions (with answers) about  us foreign policy.

How did the 2008 financial crisis affect America's international reputation?
A. It damaged support for the US model of political economy and capitalism
B. It created anger at the United States for exaggerating the crisis
C. It increased support for American global leadership under President Obama
D. It reduced global use of the US dollar
Answer: A

Which is not a nonstate actor that poses a threat to the United States?
A. Terrorists
B. Organized crime
C. Drug traffickers
D. China
Answer:"""


@pytest.mark.parametrize(
    ("name", "index", "shots", "expected"),
    [("abstract_algebra", 0, 2, ALGEBRA), ("formal_logic", 0, 1, LOGIC), ("us_foreign_policy", 2, 1, POLICY)],
)
def test_the_original_prompts(shared_data: Path, name: str, index: int, shots: int, expected: str) -> None:
    (found,), _ = read_subjects(keys(subjects=[name]), shared_data)
    assert prompt_text(found, found.questions[index], shots, "hendrycks") == expected


def test_the_other_mode_has_one_blank_and_strips_questions(shared_data: Path) -> None:
    (found,), _ = read_subjects(keys(subjects=["formal_logic"]), shared_data)
    expected = LOGIC.replace("about  formal", "about formal").replace("\n\n Select", "\n\nSelect")
    assert prompt_text(found, found.questions[0], 1, "lm_eval") == expected


def test_letters_are_those_after_the_prompt(shared_data: Path) -> None:
    """Pieces of sentencepiece by their text; LLaMA's " A" is 319, its bare "A" 29909."""
    tokenizer = llama(shared_data)
    prompt = prompts(subject(), keys(), Encoder(tokenizer))[0]
    assert tokenizer.convert_ids_to_tokens(list(prompt.letters)) == ["▁A", "▁B", "▁C", "▁D"]
    assert tokenizer.convert_ids_to_tokens([prompt.context[-1]]) == [":"]
    byte_level = roberta(shared_data)
    prompt = prompts(subject(), keys(), Encoder(byte_level))[0]
    assert byte_level.convert_ids_to_tokens(list(prompt.letters)) == ["ĠA", "ĠB", "ĠC", "ĠD"]


def test_letters_where_the_blank_is_a_token_of_its_own() -> None:
    prompt = prompts(subject(), keys(), Encoder(bytes_tokenizer()))[0]
    assert [i - 3 for i in prompt.letters] == [ord(letter) for letter in "ABCD"]
    assert bytes(i - 3 for i in prompt.context).decode().endswith("Answer: ")


def test_letters_of_several_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one token each.*give another model\.tokenizer"):
        split_choices([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 7, 4)])
    with pytest.raises(ConfigError, match="one token each"):
        split_choices([(1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 2, 5)])  # A and B are the same


class Says:
    """A tokenizer as far as the begin token goes: characters as ids, and what it sets around a text."""

    def __init__(self, before: list[int], after: list[int], bos: int | None = 1, add_bos_token: bool | None = None):
        self.before, self.after, self.bos_token_id = before, after, bos
        if add_bos_token is not None:
            self.add_bos_token = add_bos_token

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        ids = [ord(c) for c in text]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Says([1], []), (1,)),  # sets it by itself
        (Says([], [], bos=1), ()),  # has one, and does not set it
        (Says([], [2]), ()),  # an end token is no part of a prompt
        (Says([1], [2]), (1,)),
        (Says([1, 1], []), (1,)),  # doubled
        (Says([], [], add_bos_token=True), (1,)),  # says that it sets it, and does not
        (Says([1], [], add_bos_token=True), (1,)),
        (Says([], [], bos=None), ()),
    ],
)
def test_the_begin_token_is_there_once_or_not_at_all(tokenizer: Says, expected: tuple[int, ...]) -> None:
    assert begin_ids(tokenizer) == expected


def test_the_begin_token_of_real_tokenizers(shared_data: Path) -> None:
    for tokenizer, begin in ((llama(shared_data), (1,)), (roberta(shared_data), (0,)), (bytes_tokenizer(), ())):
        context = prompts(subject(), keys(), Encoder(tokenizer))[0].context
        text = prompt_text(subject(), subject().questions[0], 5, "hendrycks")
        plain = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert context[: len(begin)] == begin
        assert context[len(begin) : len(begin) + len(plain)] == plain
        assert len(context) - len(begin) - len(plain) == (1 if begin == () else 0)  # the blank, where it stands alone


def test_long_prompts_lose_whole_examples(shared_data: Path) -> None:
    """At every limit the prompt is that of some number of examples, the most that fit; the begin token stays."""
    found, encoder = subject(num_questions=1), Encoder(llama(shared_data))
    by_shots = {k: prompts(found, keys(num_shots=k), encoder)[0].context for k in range(6)}
    for limit in range(len(by_shots[0]), len(by_shots[5]) + 2):
        prompt = prompts(found, keys(max_length=limit), encoder)[0]
        fitting = max(k for k, ids in by_shots.items() if len(ids) <= limit)
        assert prompt.num_shots == fitting
        assert prompt.context == by_shots[fitting]
        assert prompt.context[0] == 1
    with pytest.raises(ConfigError, match=r"question 0 of astronomy has more than \d+ tokens"):
        prompts(found, keys(max_length=len(by_shots[0]) - 1), encoder)


def test_only_the_long_questions_of_a_subject_lose_examples() -> None:
    long = question(9, words=80)
    found = subject(num_questions=3)
    found = found._replace(questions=(found.questions[0], long, *found.questions[1:]))
    shots = [p.num_shots for p in prompts(found, keys(max_length=900), Encoder(bytes_tokenizer()))]
    assert shots == [5, min(shots), 5, 5]
    assert min(shots) < 5


def test_common_prefix() -> None:
    assert common_prefix([(1, 2, 3), (1, 2, 4), (1, 2)]) == 2
    assert common_prefix([(1, 2), (2, 2)]) == 0
    assert common_prefix([(5, 6)]) == 2
