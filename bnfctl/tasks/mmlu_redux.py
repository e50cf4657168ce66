"""MMLU-redux: 30 subjects of MMLU with its wrong answers put right (Gema et al. 2024), as ZeroEval selected them."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from bnfctl.data.records import Prompt
from bnfctl.errors import UsageError
from bnfctl.tasks.items import Source, text_column
from bnfctl.tasks.zeroeval import CHOICE, Item, Parsed, ZeroEvalTask


class MMLURedux(ZeroEvalTask):
    """2,778 questions with choices; `answer` of an item is the letter of the right one."""

    name = "mmlu-redux"
    # ZeroEval's data set under its organisation's name.
    source = Source(
        "WildEval/ZeroEval@a100ff81ecec0ed983dd3f0038d6d6bb2ab3dc1c", "mmlu-redux", "test", 2778, ("mmlu-redux",)
    )
    layout = CHOICE
    original = "MCQA"
    columns = (("question",), ("choices",), ("correct_answer",))
    empty_is_none = True

    def item(self, row: dict[str, Any], index: int, where: str) -> Item:
        choices = row.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UsageError("choices is not a list of texts", where=where, hint='"choices": ["...", "..."]')
        right = row.get("correct_answer")
        if right not in choices or choices.index(right) >= len(ascii_uppercase):
            raise UsageError(
                "correct_answer is none of the choices", where=where, hint="it is the text of the right one"
            )
        # of equal texts the first one counts, as in ZeroEval
        letter = ascii_uppercase[choices.index(right)]
        item_id = str(row.get("id", f"mmlu-redux-#{index}"))
        return Item(item_id, text_column(row, ("question",), where), letter, where, choices)

    def grade_answer(self, prompt: Prompt, parsed: Parsed) -> tuple[bool, dict[str, float | None]]:
        """Right is the letter alone, or a text with the letter and ")" anywhere in it; of a list, an entry "B)"."""
        letter = prompt.answer or ""
        held = isinstance(parsed.answer, (str, list, dict)) and f"{letter})" in parsed.answer
        return parsed.found and (parsed.answer == letter or held), {}
