"""PairRM: every response to a prompt compared with every other one, in both orders.

A reward is relative to the other responses of its prompt: it says which is better, and by how much among these;
rewards of different prompts cannot be compared.  Source: yuchenlin/LLM-Blender (Apache-2.0), `tokenize_pair` and
`get_pair_from_conv` of llm_blender/blender/blender_utils.py, policy max_logits of llm_blender/gpt_eval/utils.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from bnfctl.config import ScoreConfig
from bnfctl.data.jsonl import without_surrogates
from bnfctl.data.records import Group, Message, Reward
from bnfctl.errors import UsageError
from bnfctl.model.pretrained import device, torch_dtype
from bnfctl.scorers.deberta_pairs import HINT, MARKERS, Layout, load_pairs, read_layout
from bnfctl.scorers.windows import batches, windows

_BASE = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
_AROUND = 3
"""Tokens of a segment that are no text: [CLS], marker, [SEP]."""
_CONVERSATION = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
"""LLM-Blender's sentence in front of a conversation; its misspelling is what the model was shown."""


class PairRMScorer:
    """The mean over all N responses j of logit(i, j) - logit(j, i), 0 for j = i: `Blender.rank`, policy max_logits.

    Responses that read the same, also because they differ only where they were cut, have exactly the same reward.  A
    single response has none: {"compared_with": 0}.  `extra` says how many tokens were cut from a response ("cut")
    and from its prompt ("prompt_cut"): no length makes a reward null.

    `--dtype auto` is bfloat16 on a GPU, and float32 on a CPU, with a float32 head.  LLM-Blender itself takes float16
    on a GPU: `--dtype float16` does that.
    """

    def __init__(self, config: ScoreConfig, model_dir: Path) -> None:
        self.config = config
        self.version = f"transformers {transformers.__version__}"
        self.device = device()
        layout = read_layout(model_dir)
        self.encoder = Encoder(model_dir, layout)
        self._model = load_pairs(model_dir, layout, torch_dtype(config.dtype)).to(self.device)

    def score(self, groups: Iterable[Group]) -> Iterator[list[Reward]]:
        """One list per group, in order; reads some batches ahead, to put similar lengths together."""
        contests = map(self.encoder.contest, groups)
        for window in windows(contests, lambda contest: contest.tokens, self.config.batch_tokens):
            yield from self._rewards(window)

    def _rewards(self, window: Sequence[Contest]) -> Iterator[list[Reward]]:
        work = [(number, i, j) for number, contest in enumerate(window) for i, j in contest.pairs()]
        lengths = [window[number].length(i, j) for number, i, j in work]
        logits: list[dict[tuple[int, int], float]] = [{} for _ in window]
        for batch in batches(lengths, self.config.batch_tokens):
            inputs = [window[work[index][0]].input(*work[index][1:]) for index in batch]
            for index, value in zip(batch, self._forward(inputs), strict=True):
                number, i, j = work[index]
                logits[number][i, j] = value
        for contest, found in zip(window, logits, strict=True):
            yield contest.rewards(found)

    @torch.inference_mode()
    def _forward(self, batch: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The logit of each (ids, places of the markers)."""
        width = max(len(ids) for ids, _ in batch)
        pad = _BASE["[PAD]"]
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch], device=self.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch], device=self.device)
        places = torch.tensor([places for _, places in batch], device=self.device)
        logits: list[float] = self._model(ids, mask, places).tolist()
        return logits


@dataclass(frozen=True)
class Contest:
    """The responses to one prompt as text tokens, without what stands around them."""

    around: Encoder
    source: list[int]
    texts: list[list[int]]
    """The distinct responses."""
    which: list[int]
    """For every candidate, its place in `texts`."""
    extra: list[dict[str, int]]

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Every two distinct responses, in both orders."""
        return permutations(range(len(self.texts)), 2)

    @property
    def tokens(self) -> int:
        """What this contest holds in memory until it is scored."""
        return len(self.source) + sum(self.length(i, j) for i, j in self.pairs())

    def length(self, i: int, j: int) -> int:
        return len(self.source) + len(self.texts[i]) + len(self.texts[j]) + 3 * _AROUND

    def input(self, i: int, j: int) -> tuple[list[int], list[int]]:
        """Token ids of the comparison of i with j, and where its three markers are."""
        ids: list[int] = []
        places = []
        for marker, text in zip(MARKERS[:3], (self.source, self.texts[i], self.texts[j]), strict=True):
            places.append(len(ids) + 1)
            ids += self.around.segment(marker, text)
        return ids, places

    def rewards(self, logits: dict[tuple[int, int], float]) -> list[Reward]:
        """One per candidate.  A response is as good as its equals: their difference is 0, not what rounding leaves."""
        if len(self.which) == 1:
            return [Reward(None, {"compared_with": 0, **self.extra[0]})]
        found = []
        for mine, extra in zip(self.which, self.extra, strict=True):
            others = [other for other in self.which if other != mine]
            differences = [logits[mine, other] - logits[other, mine] for other in others]
            value = math.fsum(differences) / len(self.which) if all(map(math.isfinite, differences)) else math.nan
            # a reward that is no number can be neither stored nor compared
            found.append(
                Reward(value, dict(extra)) if math.isfinite(value) else Reward(None, {"not_finite": str(value)})
            )
        return found


class Encoder:
    """Texts to token ids by the folder's own tokenizer.json.

    transformers 5 rebuilds DeBERTa tokenizers with a normalizer of its own, so the file is read without it.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        self._where = str(folder / "tokenizer.json")
        if not Path(self._where).is_file():
            raise UsageError("no tokenizer.json", where=str(folder), hint=f"{HINT}; spm.model alone is not enough")
        self._tokenizer = _read(Path(self._where).read_text(encoding="utf-8"), self._where)
        kind = type(self._tokenizer.model).__name__
        if kind != "Unigram":
            raise UsageError(f"a tokenizer of type {kind}, expected Unigram", where=self._where, hint=HINT)
        self.ids = {**_BASE, **layout.markers}
        for token, number in self.ids.items():
            if self._tokenizer.token_to_id(token) != number:
                raise UsageError(
                    f"{token} is {self._tokenizer.token_to_id(token)}, expected {number}", where=self._where, hint=HINT
                )
        added = self._tokenizer.get_added_tokens_decoder()
        self._reserved = ({*self.ids.values(), *added}) - {_BASE["[UNK]"]}
        for marker in MARKERS:
            ids = self._tokenizer.encode(f"{marker}a").ids
            if self._text(marker, ids) is None:
                raise UsageError(
                    f"{marker}a is {ids}, expected {self.segment(marker, ids[2:-1])}", where=self._where, hint=HINT
                )
        self._keep_end = _truncation_side(folder / "tokenizer_config.json") == "left"

    def segment(self, marker: str, text: list[int]) -> list[int]:
        """[CLS] marker text [SEP]"""
        return [self.ids["[CLS]"], self.ids[marker], *text, self.ids["[SEP]"]]

    def text_ids(self, marker: str, text: str) -> list[int]:
        """The tokens of `text` behind `marker`; a token of the format that is written out in it is plain characters."""
        text = without_surrogates(text)
        ids = self._text(marker, self._tokenizer.encode(marker + text).ids)
        return self._plain.encode(text).ids if ids is None else ids

    def contest(self, group: Group) -> Contest:
        """Prompt and responses, cut to the published lengths: the response's depends on its own prompt alone."""
        turns = group.prompt.messages
        source = self.text_ids(MARKERS[0], source_text(turns))
        room = self.layout.source_limit - _AROUND
        while len(source) > room and sum(turn["role"] == "user" for turn in turns) > 1:
            turns = _without_oldest(turns)  # the last question matters most
            source = self.text_ids(MARKERS[0], source_text(turns))
        extra = {"prompt_cut": len(source) - room} if len(source) > room else {}
        source = self._cut(source, room)
        room = (self.layout.total - len(source) - _AROUND) // 2 - _AROUND
        texts: dict[tuple[int, ...], int] = {}
        which, extras = [], []
        for candidate in group.candidates:
            ids = self.text_ids(MARKERS[1], response_text(turns, candidate.text))
            extras.append({**extra, "cut": len(ids) - room} if len(ids) > room else extra)
            which.append(texts.setdefault(tuple(self._cut(ids, room)), len(texts)))
        return Contest(self, source, [list(ids) for ids in texts], which, extras)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        return ids if len(ids) <= room else ids[-room:] if self._keep_end else ids[:room]

    def _text(self, marker: str, ids: list[int]) -> list[int] | None:
        """What is inside `[CLS] marker ... [SEP]`; None where it is not that, or holds another token of the format."""
        text = ids[2:-1]
        return text if ids == self.segment(marker, text) and self._reserved.isdisjoint(text) else None

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer without its special tokens; also their spellings in the vocabulary match no text."""
        spec: dict[str, Any] = json.loads(self._tokenizer.to_str())
        spec["added_tokens"], spec["post_processor"] = [], None
        pieces = spec["model"]["vocab"]
        for number in self._reserved:
            if number < len(pieces):
                pieces[number][0] += " "  # spaces are spelled another way in pieces
        return _read(json.dumps(spec), self._where)


def source_text(turns: Sequence[Message]) -> str:
    """What PairRM reads as the prompt: one user turn as it is, a system turn in front of it on its own line.

    A longer conversation is written as LLM-Blender writes one, but with the earlier responses, which all candidates
    share, in their places.  LLM-Blender has no such case: it compares conversations in which every response differs.
    """
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    talk = [turn for turn in turns if turn["role"] != "system"]
    if len(talk) == 1:
        return "\n".join([*system, talk[0]["content"]])
    names = {"user": "USER", "assistant": "Assistant"}
    lines = [f"{names.get(turn['role'], turn['role'])}: {turn['content']}" for turn in talk]
    asked = _CONVERSATION + "\n".join([*lines, f"Assistant: {_slot(talk)}"])
    return "\n".join([*system, asked])


def response_text(turns: Sequence[Message], response: str) -> str:
    """What PairRM reads as a response: the response, behind the name of its slot in a conversation."""
    talk = [turn for turn in turns if turn["role"] != "system"]
    return response if len(talk) == 1 else f"{_slot(talk)}: {response}"


def _slot(talk: Sequence[Message]) -> str:
    return f"<Response {sum(turn['role'] == 'user' for turn in talk)}>"


def _without_oldest(turns: Sequence[Message]) -> tuple[Message, ...]:
    """Without what precedes the second user turn, except system turns."""
    users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    return tuple(turn for number, turn in enumerate(turns) if turn["role"] == "system" or number >= users[1])


def _truncation_side(options: Path) -> str | None:
    try:
        return json.loads(options.read_text(encoding="utf-8")).get("truncation_side") if options.is_file() else None
    except ValueError as error:
        raise UsageError(f"broken JSON: {error}", where=str(options), hint="fetch the model again") from None


def _read(text: str, where: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for a broken file
        raise UsageError(f"cannot load the tokenizer: {error}", where=where, hint="fetch the model again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
