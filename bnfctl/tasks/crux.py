"""CRUX: predict the output of a Python function (CRUXEval-O; Gu et al. 2024).  No code is ever run."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnfctl.artifact import Pinned
from bnfctl.data.records import Prompt
from bnfctl.errors import UsageError, nearest
from bnfctl.tasks.items import Source, text_column
from bnfctl.tasks.zeroeval import Item, Parsed, ZeroEvalTask

LONGEST = 10_000
"""Characters of a text that is read as a literal."""
DEEPEST = 100
"""Brackets inside brackets of one."""

_QUESTION = """Here are a Python function and an assertion with an input of it. Complete the assertion: put the output of the function for that input in place of ??, as a literal, without function calls and without anything left to compute. Take the code as it is, even where it is wrong or incomplete.

[PYTHON]
{code}
assert f({input}) == ??
[/PYTHON]"""


def as_of_20240801(answer: str, gold: str) -> bool:
    """ZeroEval's first grader, of its published table: the texts without outer quotes, and two empty ones differ."""
    bare = answer.strip("'\"")
    return bool(bare) and bare == gold.strip("'\"")


def as_of_20240922(answer: str, gold: str) -> bool:
    r"""ZeroEval's grader since 2024-09-22: a newline in the answer is \n, and two empty texts are equal."""
    return answer.strip("'\"").replace("\n", "\\n") == gold.strip("'\"")


def literal(answer: str, gold: str) -> bool:
    """The texts, as above, or else equal Python literals of the same types: then spaces and kinds of quotes don't matter.

    Models leave out the quotes of a string, which alone is no literal, so both are tried.
    """
    if as_of_20240922(answer, gold):
        return True
    try:
        return _same(_literal(answer), _literal(gold))
    except ValueError:
        return False


GRADERS: dict[str, Callable[[str, str], bool]] = {
    "zeroeval-20240922": as_of_20240922,
    "zeroeval-20240801": as_of_20240801,
    "literal": literal,
}


class Crux(ZeroEvalTask):
    """800 items.  The chosen grader gives the grade; the others' means are `acc_NAME`."""

    name = "crux"
    source = Source(
        "flydust/zero-eval", "crux", "test", 800, ("crux", "cruxeval"),
        "ec3fe329b262f8a4c84123db11d9ae05a703b44ad96abf2aec0fb655b852e495",
    )  # fmt: skip
    columns = (("question", "prompt"), ("answer",))

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        pinned: Pinned | None = None,
        template: Path | None = None,
        model: str = "",
        crux_grader: str = "zeroeval-20240922",
    ) -> None:
        """crux_grader: one of GRADERS; UsageError for another."""
        super().__init__(data_dir, pinned=pinned, template=template, model=model)
        if crux_grader not in GRADERS:
            what = f"no grader '{crux_grader}'{nearest(crux_grader, GRADERS)}"
            raise UsageError(what, where="--crux-grader", hint=f"one of {', '.join(GRADERS)}")
        self.grader = crux_grader
        self.version += f", {crux_grader}"

    def item(self, row: dict[str, Any], index: int, where: str) -> Item:
        """Of ZeroEval's rows (question, answer), or of CRUXEval's own (code, input, output)."""
        if "code" in row:
            parts = {name: text_column(row, (name,), where) for name in ("code", "input", "output")}
            question = _QUESTION.replace("{input}", parts["input"]).replace("{code}", parts["code"])
            return Item(f"crux-test-#{index}", question, parts["output"], where)
        item_id = str(row.get("id", f"crux-test-#{index}"))
        gold = text_column(row, ("answer",), where)
        return Item(item_id, text_column(row, self.columns[0], where), gold, where)

    def grade_answer(self, prompt: Prompt, parsed: Parsed) -> tuple[bool, dict[str, float | None]]:
        gold = prompt.answer or ""
        found = {name: parsed.found and grader(parsed.text, gold) for name, grader in GRADERS.items()}
        return found.pop(self.grader), {name: float(right) for name, right in found.items()}


def _literal(text: str) -> Any:
    """The value of a literal; ValueError where it is none, or too long or too deep."""
    depth = deepest = 0
    for character in text if len(text) <= LONGEST else ():
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if len(text) > LONGEST or deepest > DEEPEST:
        raise ValueError("too long or too deep")
    try:
        with warnings.catch_warnings():  # of escapes that Python does not know
            warnings.simplefilter("ignore")
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no literal: {type(error).__name__}") from None


def _same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down: 1, 1.0 and True differ."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (set, dict)):
        if len(one) != len(other):
            return False
        theirs = {key: key for key in other}
        same_keys = all(key in theirs and _same(key, theirs[key]) for key in one)
        return same_keys and (isinstance(one, set) or all(_same(one[key], other[key]) for key in one))
    return bool(one == other)
