"""WildBench: what the judge is shown, how its JSON is read, score files, and the whole way from a stub judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bnfctl.errors import UsageError
from bnfctl.tasks.imports import Answered
from bnfctl.tasks.judged_imports import read_responses, wildbench_scores
from bnfctl.tasks.judging import Judged
from bnfctl.tasks.wildbench import WildBench, read_object, read_score, whole
from bnfctl.tasks.wildbench_pairs import WildBenchPairs, cut
from tests.stub_server import Call, StubServer
from tests.tasks.judged_world import judge_all, said_so, wild_row, write

TAGS = [("Math", "Data Analysis"), ("Coding & Debugging", "Reasoning"), ("Creative Writing",), ("Advice seeking",)]


def items(folder: Path) -> Path:
    """Four items; the last one has three turns."""
    write(folder / "wildbench.jsonl", [wild_row(n, tags, 3 if n == 3 else 1) for n, tags in enumerate(TAGS)])
    return folder


def answered(task: Any, texts: list[str], model: str = "mine") -> list[Answered]:
    return [Answered(item, text, model, "") for item, text in zip(task.requests(None), texts, strict=True)]


def score(value: Any) -> str:
    return json.dumps({"strengths": "s", "weaknesses": "w", "score": value})


def test_a_conversation_is_asked_whole(tmp_path: Path) -> None:
    task = WildBench(items(tmp_path))
    last = task.requests(None)[3]
    assert last.id == "s3"  # not the row's other id
    assert [turn["role"] for turn in last.messages] == ["user", "assistant", "user"]
    (question,) = task.questions(last, "my {checklist} response")
    text = question.messages[0]["content"]
    assert "USER: turn 0 of 3\n\nASSISTANT: turn 1 of 3\n\n" in text and "ASSISTANT: turn 2" not in text
    assert "turn 2 of 3\n>>>" in text and "my {checklist} response\n>>>" in text
    assert "- Is 3 right?\n- Is it clear?\n" in text
    assert not any(f"{{{name}}}" in text for name in ("mark", "history", "query", "response"))
    assert question.as_json and question.max_tokens == 1024 and len(question.messages) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (score("7"), 7.0),
        (score(7), 7.0),
        (score(" 6.5 "), 6.5),
        (f"```json\n{score('8')}\n```", 8.0),
        (f"<think>{score('1')}</think>Here: ```\n{score('9')}```\nDone.", 9.0),
        ('{"strengths": "a line\nand a tab\t", "score": "3",\n}', 3.0),
        (score("11"), None),
        (score("0"), None),
        (score(True), None),
        (score("7/10"), None),
        (score("nan"), None),
        (score(None), None),
        (score([7]), None),
        (score(10**400), None),
        ('{"strengths": "s"}', None),
        ('{"strengths": "s", "score": "7"', None),
        ("7", None),
        ("[7]", None),
        ("", None),
        ('{"score": ' + "[" * 100_000, None),
        ("<think>" + score("9"), None),
    ],
)
def test_scores_are_read_strictly(text: str, wanted: float | None) -> None:
    assert read_score((read_object(text) or {}).get("score")) == wanted


def test_the_score_from_a_stub_judge(tmp_path: Path) -> None:
    task = WildBench(items(tmp_path), draws=200)
    said = {"one": score("9"), "two": "I refuse to answer in JSON", "four": score(4)}

    def fault(call: Call) -> bool:
        text = call.body["messages"][0]["content"]
        assert call.body["response_format"] == {"type": "json_object"}
        return said_so(
            call, next(answer for word, answer in said.items() if "<<< response" in text and f"\n{word}\n>>>" in text)
        )

    with StubServer(fault) as stub:
        rows = judge_all(task, answered(task, ["one", "two", " \n", "four"]), stub.url)
        assert sum(stub.asked.values()) == 3  # nothing is asked about an empty response
    assert [row.value for row in rows] == [9.0, None, 1.0, 4.0]
    assert rows[1].extra["nulls"] == {"score": "no JSON object"}
    assert task.aggregate(rows[::-1]) == task.aggregate(rows)
    found = task.aggregate(rows)["models"]["mine"]
    mean = (9 + 1 + 4) / 3
    assert found["score"] == pytest.approx(mean) and found["adjusted"] == pytest.approx((mean - 5) * 2)
    assert (found["n"], found["dropped"], found["length"]) == (3, 1, 3.5)
    assert set(found["groups"]) == {"Math & Data Analysis", "Information/Advice seeking"}
    # 80 points with share 1.0 and -20 with 0.75; the empty response counts in no group
    assert found["macro"]["mean"] == pytest.approx((80 * 1.0 - 20 * 0.75) / 1.75)


def test_a_judgment_that_was_cut_off_is_dropped_and_says_so(tmp_path: Path) -> None:
    task = WildBench(items(tmp_path))
    with StubServer(lambda call: said_so(call, '{"strengths": "a", "score": "7', "length")) as stub:
        rows = judge_all(task, answered(task, list("abcd")), stub.url)
    assert {row.extra["nulls"]["score"] for row in rows} == {"cut off, no JSON object"}
    with pytest.raises(UsageError, match="no judgment could be read"):
        task.aggregate(rows)


def test_several_models_are_a_table(tmp_path: Path) -> None:
    task = WildBench(items(tmp_path), draws=50)
    both = [*answered(task, list("abcd"), "one"), *answered(task, list("efgh"), "two")]
    with StubServer(
        lambda call: said_so(call, score(3 + ("\ne\n" in str(call.body["messages"][0]["content"]))))
    ) as stub:
        figures = task.aggregate(judge_all(task, both, stub.url))["models"]
    assert figures["one"]["score"] == 3 and figures["two"]["score"] == 3.25


def score_rows() -> list[dict[str, Any]]:
    texts, scores = ["", "four", "sixsix", "cut... (truncated)"], ["1", "7", "4", "9"]
    return [
        {"session_id": f"s{n}", "parsed_result": {"strengths": "", "score": value}, "meta_data": {"error": None},
         "model_test": "org/mine", "score": value, "model_output": text}
        for n, (text, value) in enumerate(zip(texts, scores, strict=True))
    ]  # fmt: skip


def test_score_files_need_no_data_but_groups_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(score_rows(), indent=1), encoding="utf-8")
    rows, judge = wildbench_scores(path, WildBench(draws=50), "gpt-4o")
    found = WildBench(draws=50).aggregate(rows)["models"]["org/mine"]
    # the overall mean counts empty and cut responses, the mean length does not
    assert (found["score"], found["adjusted"], found["length"]) == (5.25, 0.5, 5.0)
    assert found["groups"] == {} and found["macro"]["mean"] is None
    assert "no figures of groups" in capsys.readouterr().err
    assert judge.served_model == "gpt-4o" and wildbench_scores(path, WildBench(draws=50))[1].served_model == "unknown"
    task = WildBench(items(tmp_path), draws=50)
    found = task.aggregate(wildbench_scores(path, task)[0])["models"]["org/mine"]
    assert found["groups"]["Coding & Debugging"]["mean"] == 40 and found["groups"]["Creative Tasks"]["mean"] == -20
    assert set(found["groups"]) == {"Coding & Debugging", "Planning & Reasoning", "Creative Tasks"}


def test_scores_may_be_in_what_was_parsed_only(tmp_path: Path) -> None:
    rows = score_rows()
    for row in rows:
        row["model_output"], row["generator"] = [row["model_output"]], row.pop("model_test")
        del row["score"]
    rows[1]["parsed_result"] = {"score": "N/A"}
    found = wildbench_scores(write(tmp_path / "x.jsonl", rows), WildBench(items(tmp_path)))[0]
    assert [row.value for row in found] == [1.0, None, 4.0, 9.0] and found[0].answered.model == "org/mine"


def test_a_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    task = WildBench(items(tmp_path))
    with pytest.raises(UsageError, match="no score of WildBench"):
        wildbench_scores(write(tmp_path / "x.jsonl", [{"session_id": "s1", "score": 3}]), task)
    with pytest.raises(UsageError, match="no item 'else'"):
        wildbench_scores(write(tmp_path / "x.jsonl", [{**score_rows()[0], "session_id": "else"}]), task)
    for change in ({"conversation_input": []}, {"checklist": None}, {"session_id": None}, {"primary_tag": 3}):
        write(tmp_path / "wildbench.jsonl", [{**wild_row(0), **change}])
        with pytest.raises(UsageError, match="no item of WildBench"):
            WildBench(tmp_path).requests(None)
    write(tmp_path / "wildbench.jsonl", [wild_row(0, ("Maths",))])
    with pytest.raises(UsageError, match="no WildBench tag: 'Maths'"):
        WildBench(tmp_path).requests(None)


def test_outputs_of_wildbench_are_read(tmp_path: Path) -> None:
    task = WildBench(items(tmp_path))
    rows = [
        {"id": 7, "session_id": f"s{n}", "output": [f"out {n}"], "generator": "org/m", "chat_history": []}
        for n in (2, 1)
    ]
    found = list(read_responses(write(tmp_path / "m.jsonl", rows), task))
    assert [(one.item.id, one.response, one.model) for one in found] == [
        ("s2", "out 2", "org/m"),
        ("s1", "out 1", "org/m"),
    ]


def test_the_original_prompt_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.md").write_text("{$history}|{$user_query}|{$model_output}|{$checklist}|{$other}", encoding="utf-8")
    task = WildBench(items(tmp_path), judge_prompt=tmp_path / "t.md")
    (question,) = task.questions(task.requests(None)[0], "{$checklist}")
    assert question.messages[0]["content"] == "|turn 0 of 0|{$checklist}|- Is 0 right?\n- Is it clear?\n|{$other}"
    assert task.version != WildBench().version
    (tmp_path / "t.md").write_text("{history}{query}{response}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"has no \{checklist\}"):
        WildBench(judge_prompt=tmp_path / "t.md")


def test_whole_responses() -> None:
    assert [whole(text) for text in ("x", " ", "", "x... (truncated)", "... (truncated) x")] == [
        True,
        False,
        False,
        False,
        True,
    ]


# ---- pairs ----


def pairs(folder: Path, **options: Any) -> WildBenchPairs:
    data = items(folder)
    for reference, texts in {"ref-1": ["theirs"] * 4, "ref-2": ["theirs", "", "theirs", "long " * 1200]}.items():
        rows = [{"session_id": f"s{n}", "output": [text], "generator": reference} for n, text in enumerate(texts)]
        write(data / "wildbench-outputs" / f"{reference}.jsonl", rows)
    return WildBenchPairs(data, references=("ref-1", "ref-2"), draws=50, **options)


def choose(wanted: dict[tuple[str, int], str]) -> Any:
    """A judge that says for each (response, number of the item) what it is worth: ++, +, =, - or --."""

    def fault(call: Call) -> bool:
        text = call.body["messages"][0]["content"]
        first = "<<< response A" in text and text.split("<<< response A")[1].split("\n")[1].startswith("mine")
        number = int(text.split("turn ")[-1].split(" of ")[1][0])
        value = wanted["mine", number]
        choice = {"+": "A+", "++": "A++", "-": "B+", "--": "B++", "=": "A=B"}[value]
        swapped = {"A": "B", "B": "A"}
        choice = choice if first or choice == "A=B" else swapped[choice[0]] + choice[1:]
        return said_so(call, json.dumps({"analysis of A": "", "choice": choice}))

    return fault


def test_rewards_are_the_hand_count(tmp_path: Path) -> None:
    task = pairs(tmp_path)
    texts = ["mine", "mine", "mine " * 200, "mine"]
    fault = choose({("mine", 0): "++", ("mine", 1): "-", ("mine", 2): "+", ("mine", 3): "--"})
    with StubServer(fault) as stub:
        rows = judge_all(task, answered(task, texts), stub.url)
        assert sum(stub.asked.values()) == 4 + 3  # the empty reference loses without a call
        sides = {body["messages"][0]["content"].split("<<< response A")[1].split("\n")[1][:4] for body in stub.bodies}
    assert sides == {"mine", "thei"} or sides == {"mine", "thei", "long"}
    assert task.aggregate(rows[::-1]) == task.aggregate(rows)
    figures = task.aggregate(rows)["models"]["mine"]
    first, second = figures["K=-1"]["references"]["ref-1"], figures["K=-1"]["references"]["ref-2"]
    assert first["overall"]["mean"] == pytest.approx(100 * (1 - 0.5 + 0.5 - 1) / 4)
    # an empty and a cut reference are worth 0, and count in the divisor
    assert second["overall"]["mean"] == pytest.approx(100 * (1 + 0.5) / 4)
    assert figures["K=-1"]["mix"]["mean"] == pytest.approx((0 + 37.5) / 2)
    # a slight win by about a thousand characters more is a tie under K=500
    assert figures["K=500"]["references"]["ref-1"]["overall"]["mean"] == pytest.approx(100 * (1 - 0.5 - 1) / 4)
    assert rows[1].extra["games"]["ref-2"]["choice"] == ("A++" if task.model_is_a("ref-2", "s1") else "B++")
    assert [row.value for row in rows] == [1.0, -0.25, 0.5, -0.5]


def test_sides_depend_on_item_and_reference_only(tmp_path: Path) -> None:
    task = pairs(tmp_path)
    tossed = [task.model_is_a("ref-1", f"s{n}") for n in range(400)]
    assert 160 < sum(tossed) < 240
    assert tossed != [task.model_is_a("ref-2", f"s{n}") for n in range(400)]


def test_long_texts_are_cut_for_the_judge_of_pairs(tmp_path: Path) -> None:
    assert cut("a " * 999 + "a") == "a " * 999 + "a"
    assert cut("a " * 1000 + "b") == "a " * 999 + "a... (truncated)"
    task = pairs(tmp_path)
    last = task.requests(None)[3]
    texts = [question.messages[0]["content"] for question in task.questions(last, "mine")]
    assert "long long... (truncated)\n>>>" in texts[1] and "truncated" not in texts[0]
    assert texts[1].count("long") == 1000


def test_choices_are_read_strictly(tmp_path: Path) -> None:
    task = pairs(tmp_path)
    item = task.requests(None)[0]

    def row(text: str) -> Judged:
        raw = [{"choices": [{"text": text, "finish": "stop"}], "usage": {}}]
        return task.judged(Answered(item, "mine", "m", ""), {"ref-1": raw, "ref-2": raw})

    for text, why in {
        '{"choice": "A"}': "no choice of A++",
        "A++": "no JSON object",
        '{"choice": ["A+"]}': "no choice",
    }.items():
        found = row(text)
        assert found.value is None and found.extra["nulls"]["ref-1"].startswith(why)
    assert row('{"choice": " A=B "}').value == 0
