"""The protocol that four tasks share: parsing, prompts, data, figures.  Fixtures have the published columns."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfctl.data.records import Prompt, Reward
from bnfctl.errors import UsageError
from bnfctl.tasks import items as task_items
from bnfctl.tasks.crux import Crux
from bnfctl.tasks.gsm8k import GSM8K
from bnfctl.tasks.math_l5 import MathL5
from bnfctl.tasks.mmlu_redux import MMLURedux
from bnfctl.tasks.zeroeval import CHOICE, OPEN, ZeroEvalTask, load_template, parse

GSM = [
    {"id": f"gsm8k-main-test-#{i}", "question": f"What is {i} + 4?", "answer": f"# {i + 4}", "source": "openai/gsm8k",
     "config": "main", "task_type": "qa"} for i in range(5)
]  # fmt: skip
MATH = [{"id": i, "problem": f"Find $x$ with $x + 20 = {i}$.", "answer": str(i - 20)} for i in range(4)]
CRUX = [
    {"id": f"crux-test-#{i}", "question": f"def f(n):\n    return [n]\nassert f({i}) == ??", "answer": f"[{i}]"}
    for i in range(4)
]
MMLU = [
    {"id": f"mmlu-redux-anatomy-#{i}", "question": "Which is largest?", "choices": ["1", "20", "3", "4"],
     "correct_answer": "20", "config": "anatomy"} for i in range(4)
]  # fmt: skip
TASKS: list[tuple[type[ZeroEvalTask], str, list[dict[str, Any]]]] = [
    (GSM8K, "gsm", GSM), (MathL5, "math-l5", MATH), (Crux, "crux", CRUX), (MMLURedux, "mmlu-redux", MMLU),
]  # fmt: skip


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def item(answer: str) -> Prompt:
    return Prompt("i", ({"role": "user", "content": "?"},), answer)


@pytest.mark.parametrize(
    ("response", "answer", "reasoning"),
    [
        ('{"reasoning": "2 + 2", "answer": "4"}', "4", "2 + 2"),
        ('Here it is:\n```json\n{\n  "reasoning": "2 +\n2",\n  "answer": "4"\n}\n```\nDone.', "4", "2 +2"),
        ('{"reasoning": "r", "answer": 4}', 4, "r"),
        ('{"reasoning": "r", "answer": ["4", 5]}', ["4", 5], "r"),
        ('{"reasoning": "r", "answer": true}', True, "r"),
        ('{"reasoning": "r", "answer": null}', None, "r"),
        ('{"reasoning": "r", "answer": ""}', "", "r"),
        ('{"answer": "4"}', "4", ""),
        # \f of \frac is a form feed in JSON, and no error
        (r'{"reasoning": "r", "answer": "\frac{1}{2}"}', "\x0crac{1}{2}", "r"),
        # \s and \( are errors: the patterns read it instead
        (r'{"reasoning": "\sqrt{4} \(x\)", "answer": "2"}', "2", r"\sqrt{4} \(x\)"),
        ('{"reasoning": "a\tb", "answer": "2"}', "2", "a\tb"),
        ('{"reasoning": "cut off here", "answer": "17', '"17', "cut off here"),
        ('{"reasoning": "cut off", "answer": "17"', "17", "cut off"),
        ('{"reasoning": "r", "answer": 17, "x', "17", "r"),
        ("reasoning: r, answer: 17, and more", "17", "r"),
        ('{"reasoning": "r,\nanswer": "x", "answer":\n"1\n2"', "1\n2", "r,\nanswer"),
        # a set in front is the first object: broken, so no later one is tried, but the patterns read on
        ('The set {1, 2}: {"reasoning": "of it", "answer": "3"}', "3", "of it"),
        ('{"note": 1} {"reasoning": "second", "answer": "3"}', "3", "second"),
        ('{"answer": "1"} {"answer": "2"}', "1", ""),
        # braces inside strings count
        ('{"reasoning": "an open { one", "answer": "5"}', "5", "an open { one"),
        ('{"reasoning": "a {whole} one", "answer": "5"}', "5", "a {whole} one"),
        ('} {"answer": "5"}', "5", ""),
    ],
)
def test_parsing(response: str, answer: Any, reasoning: str) -> None:
    parsed = parse(response)
    assert (parsed.found, parsed.answer, parsed.reasoning) == (True, answer, reasoning)


@pytest.mark.parametrize("response", ["", "It is 4.", "{}", '{"reasoning": "r"}', r"so \boxed{4}", '{"Answer": "4"}'])
def test_no_answer(response: str) -> None:
    assert not parse(response).found


def test_empty_answers_count_as_none_for_multiple_choice_only() -> None:
    for response in ('{"answer": null}', '{"answer": ""}', '{"answer": "", '):
        assert parse(response).found
        assert not parse(response, empty_is_none=True).found
    assert parse('{"answer": 0}', empty_is_none=True).found


def test_boxed_is_read_for_the_models_that_it_was_made_for_only() -> None:
    response = "I think $\\boxed{36}$."
    assert parse(response, boxed=True).answer == "36"
    assert not parse(response + " " * 30, boxed=True).found, "it is not at the end"
    assert parse('{"answer": "1"} \\boxed{36}', boxed=True).answer == "1"
    task = GSM8K(model="meta-llama/Llama-3.1-8B-Instruct")
    assert task.grade(item("36"), response).value == 1.0
    assert GSM8K().grade(item("36"), response).value == 0.0
    assert GSM8K().grade(item("36"), response, "Meta-Llama-3.1-8B-Instruct").value == 1.0


def test_a_grade_says_what_was_read() -> None:
    task = GSM8K()
    right = task.grade(item("4"), '{"reasoning": "2 + 2", "answer": 4}')
    assert right == Reward(1.0, {"parsed": "4", "no_answer": False, "reasoning": 5})
    assert task.grade(item("4"), "no idea") == Reward(0.0, {"parsed": None, "no_answer": True, "reasoning": 0})
    halved = task.grade(item("4"), '{"answer": "\\ud83d"}')
    assert halved.extra["parsed"].encode() == b"?", "half an emoji cannot be written"


def test_figures_beyond_the_mean() -> None:
    task = Crux()
    texts = ['{"reasoning": "12345", "answer": "[1]"}', '{"reasoning": "123", "answer": "[ 1 ]"}', "no idea", "none"]
    figures = task.aggregate([task.grade(item("[1]"), text) for text in texts])
    assert figures == {
        "no_answer": 0.5, "reasoning_characters": 4.0, "acc_literal": 0.5, "acc_zeroeval-20240801": 0.25,
    }  # fmt: skip
    assert task.aggregate([task.grade(item("1"), "none")])["reasoning_characters"] is None


@pytest.mark.parametrize(
    ("reasoning", "length"), [("abc", 3), (["a", "bcd"], 2), ({"step": "x"}, 1), (None, 0), (12345, 5)]
)
def test_length_of_the_reasoning(reasoning: Any, length: int) -> None:
    assert parse(json.dumps({"reasoning": reasoning, "answer": "1"})).reasoning_length == length


@pytest.mark.parametrize(("task", "name", "rows"), TASKS)
def test_items_from_files_of_every_kind(
    task: type[ZeroEvalTask], name: str, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / kind for kind in ("jsonl", "json", "parquet", "hub")]
    for folder in folders:
        folder.mkdir()
    write_jsonl(folders[0] / f"{name}.jsonl", rows)
    (folders[1] / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folders[2] / f"{name}.parquet")
    (folders[3] / name).mkdir()
    split = task.source.split
    pq.write_table(pa.Table.from_pylist(rows), folders[3] / name / f"{split}-00000-of-00001.parquet")
    if name in ("gsm", "mmlu-redux", "crux"):  # the hub's folder holds one per subset
        (folders[3] / name / name).mkdir()
        (folders[3] / name / f"{split}-00000-of-00001.parquet").rename(
            folders[3] / name / name / f"{split}-00000-of-00001.parquet"
        )

    found = [task(folder).requests(None) for folder in folders]
    assert f"{len(rows)} items; the published set has {task.source.rows}" in capsys.readouterr().err
    for prompts in found:
        assert [(p.id, p.messages, p.answer) for p in prompts] == [(p.id, p.messages, p.answer) for p in found[0]]
    assert [prompt.id for prompt in found[0]] == [str(row["id"]) for row in rows]
    question = rows[1].get("question") or rows[1]["problem"]
    assert question in found[0][1].text and "{question}" not in found[0][1].text
    assert [turn["role"] for turn in found[0][0].messages] == ["user"]
    assert task(folders[0]).requests(2) == found[0][:2]


def test_choices_stand_in_the_prompt_with_their_letters(tmp_path: Path) -> None:
    text = MMLURedux(write_jsonl(tmp_path / "x.jsonl", MMLU)).requests(1)[0].text
    assert "- (A) 1\n- (B) 20\n- (C) 3\n- (D) 4\n" in text
    assert '"answer": "C"' in text and '"reasoning": "___"' in text


def test_a_question_may_hold_a_place_of_the_layout(tmp_path: Path) -> None:
    rows = [{**MMLU[0], "question": "What is {choices} in {question}?"}]
    text = MMLURedux(write_jsonl(tmp_path / "x.jsonl", rows)).requests(1)[0].text
    assert "What is {choices} in {question}?" in text


@pytest.mark.parametrize(
    ("task", "rows", "what"),
    [
        (GSM8K, [{"id": "a", "question": "?"}], "no text in column 'answer'"),
        (GSM8K, [{"id": "a", "answer": "# 1"}], "no text in column 'question'"),
        (GSM8K, [{"id": "a", "question": "?", "answer": "# one"}], "the known answer is no number"),
        (GSM8K, [GSM[0], GSM[0]], "two items with the id gsm8k-main-test-#0"),
        (MMLURedux, [{**MMLU[0], "choices": "1, 2"}], "choices is not a list of texts"),
        (MMLURedux, [{**MMLU[0], "correct_answer": "B"}], "correct_answer is none of the choices"),
        (GSM8K, [], "no items"),
    ],
)
def test_broken_items_name_their_row(
    task: type[ZeroEvalTask], rows: list[dict[str, Any]], what: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(UsageError, match=what) as caught:
        task(path).requests(None)
    assert str(path) in str(caught.value.where)


@pytest.mark.parametrize("text", ["[1, 2]", '[{"id": ', "[" * 100_000])
def test_broken_json_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "gsm.json").write_text(text)
    with pytest.raises(UsageError):
        GSM8K(tmp_path).requests(None)


def test_missing_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no gsm8k\.jsonl or gsm\.jsonl") as caught:
        GSM8K(tmp_path).requests(None)
    assert str(tmp_path) in str(caught.value.where)
    with pytest.raises(UsageError, match="cannot be fetched: HF_HUB_OFFLINE") as caught:
        GSM8K().requests(None)
    assert "--data-dir" in str(caught.value.hint)


def test_the_hub_must_have_the_published_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def rows(pinned: Any, split: str, subset: str | None) -> Any:
        asked.append((pinned.ref, split, subset))
        return (("row", dict(GSM[0], id=str(i))) for i in range(count))

    monkeypatch.setattr(task_items, "read_rows", rows)
    monkeypatch.setattr(task_items.hub, "commit_of", lambda ref, kind: ("c0ffee", ""))
    count = 1318
    with pytest.raises(UsageError, match="1318 rows, where the published set has 1319"):
        GSM8K().requests(3)
    count = 1319
    assert len(GSM8K().requests(3)) == 3
    assert asked[0] == ("yuchenlin/zero-eval@c0ffee", "test", "gsm")
    assert "not the published questions" in capsys.readouterr().err


def test_templates_of_the_users_own(tmp_path: Path) -> None:
    plain, code = tmp_path / "mine.txt", tmp_path / "OEQA.py"
    plain.write_text("Q: {question}")
    code.write_text('# a comment\nOEQA = """\n## {question}\n"""\nraise SystemExit("this is read, never run")\n')
    data = write_jsonl(tmp_path / "gsm.jsonl", GSM)
    assert GSM8K(data, template=plain).requests(1)[0].text == "Q: What is 0 + 4?"
    assert GSM8K(data, template=code).requests(1)[0].text == "\n## What is 0 + 4?\n"
    versions = {GSM8K().version, GSM8K(template=plain).version, GSM8K(template=code).version}
    assert len(versions) == 3, "other prompts, other figures"


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.txt", "Q: ?", r"has no \{question\}"),
        ("b.txt", "Q: {question}", r"has no \{choices\}"),
        ("c.py", "X = 1", "no template in it: 'MCQA'"),
        ("d.py", "MCQA = (", "no template in it"),
        ("e.py", "MCQA = open('x').read()", "no template in it"),
    ],
)
def test_templates_that_cannot_be_used(name: str, text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=what):
        MMLURedux(template=tmp_path / name)
    with pytest.raises(UsageError):
        load_template(tmp_path / "missing.txt", "MCQA", CHOICE)


def test_our_own_layouts_have_the_form_that_the_parsing_reads() -> None:
    for layout in (OPEN, CHOICE):
        parsed = parse(layout[layout.index("```json") :])
        assert (parsed.answer, parsed.reasoning) == ("___", "___")


def graders() -> list[tuple[ZeroEvalTask, str]]:
    return [(GSM8K(), "4"), (MathL5(), "-15"), (Crux(), "[1, 'a']"), (MMLURedux(), "B")]


PIECES = st.sampled_from(
    ['{"reasoning": "', '", "answer": "', '"}', "{", "}", "[", "]", "\\", '"', "answer", ":", "$", ",", "/", "-", "1", "\n",
     "null", "\\boxed{", "\ud800", "1e999", "9" * 5000, "**", "(", ")", " "]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join)))
def test_no_text_makes_a_grader_raise(text: str) -> None:
    wrapped = [text, json.dumps({"reasoning": text, "answer": text})]
    for task, gold in graders():
        for response in wrapped:
            reward = task.grade(item(gold), response, "Llama-3.1")
            assert reward.value in (0.0, 1.0)
            json.dumps(reward.extra).encode()
            task.aggregate([reward])


N = 400_000
HUGE = {
    "open braces": "{" * N, "close braces": "}" * N, "nested": '{"a":' * N + "}" * N, "lists": '{"answer": ' + "[" * N + "]" * N + "}",
    "nested list": '{"answer": ' + "[" * 500 + "]" * 500 + "}", "digits": '{"answer": ' + "9" * N + "}",
    "digits as text": '{"answer": "' + "9" * N + '"}', "divided": '{"answer": "' + "1/" * N + '1"}',
    "sums": '{"answer": "' + "1+" * 199 + '1/2"}', "signs": '{"answer": "' + "-" * 390 + '1/2"}',
    "parentheses": '{"answer": "' + "(" * 190 + "1/2" + ")" * 190 + '"}', "tower": '{"answer": "9**9**9**9**9/1"}',
    "tower of towers": '{"answer": "((9**999)**999)**999/1"}', "small base": '{"answer": "1/(0.5)**99999999999999999"}',
    "keys": '"answer"' * N, "key and spaces": '"answer"' + " " * N, "colons": "answer: " * N, "quotes": '"' * N,
    "boxed": "\\boxed{" * N + "boxed", "literal": '{"answer": "' + "-" * 9000 + '1"}', "literal lists": '{"answer": "' + "[" * 9000 + '"}',
    "literal sums": '{"answer": "' + "1+" * 4900 + '1"}', "literal parentheses": '{"answer": "' + "(" * 101 + "1" + ")" * 101 + '"}',
    "commas": '{"answer": "' + "," * N + '"}', "surrogates": '{"answer": "' + "\\ud800" * N + '"}', "zeros": '{"answer": "0\\u0000"}',
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_what_is_deep_or_huge_takes_no_time(name: str) -> None:
    started = time.process_time()
    for task, gold in graders():
        reward = task.grade(item(gold), HUGE[name], "Llama-3.1")
        assert reward.value == 0.0
        assert len(json.dumps(reward.extra)) < 2000
    assert time.process_time() - started < 4
