"""ZeroEval's zero-shot JSON protocol, which four tasks share: the prompt, the parsing ladder, the figures.

A model is asked, in one user turn, to reason first and to answer in a JSON object {"reasoning", "answer"}; it answers
greedily, in at most 4,096 tokens.  Accuracy is over all items; a response without an answer is wrong.  Source: the
repository WildEval/ZeroEval as of 2024-09-24, of which the parsing and the graders are re-implemented here, and whose
prompts are worded anew.  `template` loads the original ones.

Texts of models are never evaluated as code.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any, ClassVar

from bnfctl import console
from bnfctl.artifact import Pinned
from bnfctl.data.jsonl import without_surrogates
from bnfctl.data.records import Prompt, Reward
from bnfctl.errors import UsageError
from bnfctl.options import fingerprint
from bnfctl.tasks import TaskDecoding
from bnfctl.tasks.items import Source, read_items

VERSION = "zeroeval-20240924.1"
"""Of prompts, parsing and graders: another one may give other grades for the same model."""

_FORM = """
```json
{
    "reasoning": "___",
    "answer": "___"
}
```
"""
OPEN = f"""# Question

{{question}}

# Instruction

Work through the question step by step first, and give your answer after that.
Reply with a JSON object of the form below. Write your steps into "reasoning", and nothing but the final answer into "answer", as a string, for example "answer": "42".
{_FORM}"""
CHOICE = f"""# Question

{{question}}

# Choices

{{choices}}
# Instruction

Work through the question step by step first, and pick the right choice after that.
Reply with a JSON object of the form below. Write your steps into "reasoning", and nothing but the letter of your choice into "answer", for example "answer": "C".
{_FORM}"""

_BRACE = re.compile(r"[{}]")
_BOXED = re.compile(r"\\boxed\{(\w+)\}")
_TAIL = 30
"""Characters at the end of a response in which "boxed" has to stand."""
_SHOWN = 200
"""Characters of an answer that are kept with its grade."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a response says, by ZeroEval's parsing."""

    found: bool
    """It has an answer; null counts as one."""
    answer: Any
    """A JSON value, or the text that a pattern found."""
    reasoning: Any

    @property
    def text(self) -> str:
        """The answer as ZeroEval's graders see it: Python's spelling of lists, booleans and null."""
        return spelled(self.answer)

    @property
    def reasoning_length(self) -> int:
        """Characters of the reasoning.  Of a list or an object it is the number of entries, as ZeroEval counts."""
        if isinstance(self.reasoning, (str, list, dict)):
            return len(self.reasoning)
        return 0 if self.reasoning is None else len(spelled(self.reasoning))


def spelled(value: Any) -> str:
    """A JSON value as Python's str() writes it; "" where that is too deep or too long."""
    try:
        return value if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):
        return ""


def parse(response: str, *, boxed: bool = False, empty_is_none: bool = False) -> Parsed:
    r"""The first JSON object of a response, else its fields by patterns, else, with `boxed`, its \boxed{...}.

    boxed: what ZeroEval does for models whose name contains "Llama-3.1", and for no other.
    empty_is_none: null and "" are no answers (multiple choice).
    """
    fields = _first_object(response)
    if fields is None or "answer" not in fields:
        fields = _by_patterns(response)
    found = "answer" in fields and not (empty_is_none and (fields["answer"] is None or fields["answer"] == ""))
    if not found and boxed and "boxed" in response[-_TAIL:]:
        match = _BOXED.search(response)
        if match is not None:
            found, fields["answer"] = True, match[1]
    return Parsed(found, fields.get("answer") if found else None, fields.get("reasoning", ""))


def _first_object(response: str) -> dict[str, Any] | None:
    """The first text with balanced braces, as JSON without its newlines; no later one is tried where it is broken.

    Braces inside strings count too: "{1, 2}" in front of the object, or a lone "{", hides it.
    """
    start, depth = 0, 0
    for brace in _BRACE.finditer(response):
        if brace[0] == "{":
            start = start if depth else brace.start()
            depth += 1
        elif depth:
            depth -= 1
            if not depth:
                return _loaded(response[start : brace.end()].replace("\n", ""))
    return None


def _loaded(text: str) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits is a ValueError too
        return None
    return value


def _by_patterns(response: str) -> dict[str, Any]:
    """Fields of broken or cut off JSON: a quoted value, else an unquoted one, else one whose name has no quotes."""
    found: dict[str, Any] = {}
    for key, patterns in _PATTERNS.items():
        match = next((match for pattern in patterns if (match := pattern.search(response))), None)
        if match is not None:
            found[key] = match[1]
    return found


_PATTERNS = {
    key: [
        re.compile(pattern)
        for pattern in (rf'"{key}"\s*:\s*"([^"]*)"', rf'"{key}"\s*:\s*([^,\s]*)', rf"{key}\s*:\s*([^,\s]*)")
    ]
    for key in ("reasoning", "answer")
}
"""The first of them reads across lines too.  ZeroEval's own pattern for that comes after it and finds nothing more."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark, without the prompt around it."""

    id: str
    question: str
    answer: str
    """The known one, as the grader wants it."""
    where: str
    choices: Sequence[str] = ()


def digest(items: Sequence[Item]) -> str:
    """Of ids, questions, choices and answers in their order, whatever file they came from."""
    return fingerprint([[item.id, item.question, list(item.choices), item.answer] for item in items])


class ZeroEvalTask(ABC):
    """What the four tasks share.  A task says how an item is read and how an answer is graded."""

    name: str
    source: ClassVar[Source]
    layout: ClassVar[str] = OPEN
    original: ClassVar[str] = "OEQA"
    """What the original template is called in ZeroEval's src/templates/NAME.py."""
    columns: ClassVar[Sequence[Sequence[str]]]
    """What a row needs to be an item: of each of these, one column."""
    empty_is_none: ClassVar[bool] = False
    binary = True
    decoding = TaskDecoding()

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        pinned: Pinned | None = None,
        template: Path | None = None,
        model: str = "",
    ) -> None:
        """data_dir: the user's files instead of the hub's.  pinned: the hub's data set at a commit.

        template: a file with the prompt to use: a text with {question} (and {choices}), or ZeroEval's own Python file.
        model: the name of who answers, for the step of the parsing that depends on it.
        UsageError for a template without its places.
        """
        self.data_dir, self.pinned, self.model = data_dir, pinned, model
        self.version = VERSION + (", boxed" if _boxes(model) else "")
        self.layout_used = self.layout
        if template is not None:
            self.layout_used = load_template(template, self.original, self.layout)
            self.version += f", template {hashlib.sha256(self.layout_used.encode()).hexdigest()[:12]}"

    def requests(self, limit: int | None) -> Sequence[Prompt]:
        """The items in the published order.  UsageError for a broken row, an id that is there twice, missing data."""
        found: dict[str, Item] = {}
        for index, (where, row) in enumerate(read_items(self.source, self.data_dir, self.pinned)):
            item = self.item(row, index, where)
            if item.id in found:
                places = f"{found[item.id].where} and {where}"
                raise UsageError(f"two items with the id {item.id}", where=places, hint="give each its own id")
            found[item.id] = item
        items = list(found.values())
        if len(items) == self.source.rows and self.source.digest not in (None, digest(items)):
            console.say_once(f"{self.name}: not the published questions and answers, so figures don't compare")
        return [self.prompt(item) for item in items[:limit]]

    @abstractmethod
    def item(self, row: dict[str, Any], index: int, where: str) -> Item:
        """The item of one row of the published set; index: its number in the set, from 0."""

    @abstractmethod
    def grade_answer(self, prompt: Prompt, parsed: Parsed) -> tuple[bool, dict[str, float | None]]:
        """Whether the answer is right, and other graders' grades by name (`aggregate` makes their means)."""

    def grade(self, prompt: Prompt, response: str, model: str | None = None) -> Reward:
        """1 or 0, with {parsed, no_answer, reasoning: characters, also: other graders' grades}.

        A response without an answer is 0.  model: who wrote it, where that is another one than the task's.
        """
        boxed = _boxes(self.model if model is None else model)
        parsed = parse(response, boxed=boxed, empty_is_none=self.empty_is_none)
        right, also = self.grade_answer(prompt, parsed)
        extra: dict[str, Any] = {
            "parsed": without_surrogates(parsed.text[:_SHOWN]) if parsed.found else None,
            "no_answer": not parsed.found,
            "reasoning": parsed.reasoning_length if parsed.found else 0,
        }
        if also:
            extra["also"] = also
        return Reward(float(right), extra)

    def aggregate(self, grades: Sequence[Reward]) -> dict[str, float | None]:
        """Figures beyond the mean, by name: shares of all items in [0, 1], and characters.

        no_answer; reasoning_characters: the mean over the items with an answer, None where there is none;
        acc_NAME for each other grader, with 0 where it could not tell.
        """
        lengths = [grade.extra["reasoning"] for grade in grades if not grade.extra["no_answer"]]
        others = sorted({name for grade in grades for name in grade.extra.get("also", {})})
        return {
            "no_answer": fmean(grade.extra["no_answer"] for grade in grades),
            "reasoning_characters": fmean(lengths) if lengths else None,
            **{f"acc_{name}": fmean(grade.extra["also"][name] or 0.0 for grade in grades) for name in others},
        }

    def prompt(self, item: Item) -> Prompt:
        """One user turn with the question in the layout."""
        choices = "".join(f"- ({letter}) {text}\n" for letter, text in zip(ascii_uppercase, item.choices, strict=False))
        parts = {"question": item.question, "choices": choices}
        text = re.sub(r"\{(question|choices)\}", lambda place: parts[place[1]], self.layout_used)
        return Prompt(item.id, ({"role": "user", "content": text},), item.answer, item.where)


def _boxes(model: str) -> bool:
    """Whether ZeroEval takes a boxed answer from the model of that name."""
    return "Llama-3.1" in model


def load_template(path: Path, name: str, layout: str) -> str:
    """The prompt in a file: its text, or, of a .py file, the string constant of that name (it is read, never run).

    UsageError for an unreadable file or one without the places of `layout`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = _constant(text, name)
    except (OSError, ValueError, SyntaxError, KeyError) as error:
        hint = f'a text file, or a Python file with {name} = """..."""'
        raise UsageError(f"no template in it: {error}", where=str(path), hint=hint) from None
    missing = [place for place in ("{question}", "{choices}") if place in layout and place not in text]
    if missing:
        raise UsageError(
            f"the template has no {missing[0]}", where=str(path), hint=f"put {missing[0]} where it belongs"
        )
    return text


def _constant(code: str, name: str) -> str:
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return str(ast.literal_eval(node.value))
    raise KeyError(name)
