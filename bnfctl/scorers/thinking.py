"""`--thinking strip`: a scorer reads what a response says, not what its model thought before."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from bnfctl.client.texts import CLOSE, OPEN, visible
from bnfctl.data.records import Candidate, Group, Reward

if TYPE_CHECKING:
    from bnfctl.scorers import Scorer

UNCLOSED = {"thinking": "unclosed"}
"""`extra` of a response that was still thinking where it ends: nothing of it can be scored."""


class WithoutThinking:
    """Another scorer, which sees every response without its thinking; the candidates themselves stay as they are.

    A response that ends inside a block gets no reward (UNCLOSED), and the other scorer never sees it.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.version = scorer.version

    def score(self, groups: Iterable[Group]) -> Iterator[list[Reward]]:
        """As Scorer."""
        seen: deque[list[str | None]] = deque()

        def shown() -> Iterator[Group]:
            for group in groups:
                texts = visible_texts(group.candidates)
                seen.append(texts)
                if kept := _visible(group.candidates, texts):
                    yield Group(group.prompt, kept)

        def skipped() -> Iterator[list[Reward]]:
            """Of groups of which nothing is visible."""
            while seen and all(text is None for text in seen[0]):
                yield [Reward(None, dict(UNCLOSED)) for _ in seen.popleft()]

        for rewards in self.scorer.score(shown()):
            yield from skipped()
            left = iter(rewards)
            yield [Reward(None, dict(UNCLOSED)) if text is None else next(left) for text in seen.popleft()]
        yield from skipped()


def visible_texts(candidates: Sequence[Candidate]) -> list[str | None]:
    """What each response to a prompt shows; None for one that never ends its thinking.

    Some chat templates open the block in the prompt: responses to it begin inside, with only its end in them.  Where
    one of a prompt's responses does, those that have no end at all never got out.

    The limit of this: where all responses to a prompt were cut off inside such a block, no text tells thinking from an
    answer, and it is kept as one.  A higher --max-tokens avoids it, and `build --drop-cut` leaves such responses out.
    """
    texts = [candidate.text for candidate in candidates]
    inside = any(_begins_inside(text) for text in texts)
    return [None if inside and CLOSE not in text else visible(text) for text in texts]


def _begins_inside(text: str) -> bool:
    return CLOSE in text.split(OPEN, 1)[0]


def _visible(candidates: Sequence[Candidate], texts: Sequence[str | None]) -> tuple[Candidate, ...]:
    """The candidates as a scorer sees them: other texts, so no token ids."""
    return tuple(
        candidate if text == candidate.text else dataclasses.replace(candidate, text=text, token_ids=None)
        for candidate, text in zip(candidates, texts, strict=True)
        if text is not None
    )
