"""ArmoRM (RLHFlow/ArmoRM-Llama3-8B-v0.1): 19 objectives, mixed by a gate that reads the prompt; no remote code.

The responses of a prompt are packed behind one copy of it, so a prompt is computed once.  The heads
and what they read are float32 whatever the trunk's type: in bfloat16, as public scripts have it, near-equal responses
tie.  Source: the model's own modeling_custom.py and config.json, and the chat format of Llama 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import relu, softmax
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from bnfctl import console
from bnfctl.config import ScoreConfig
from bnfctl.data.chat import context_length, load_tokenizer, read_config, render_conversation
from bnfctl.data.jsonl import without_surrogates
from bnfctl.data.records import Group, Reward
from bnfctl.errors import UsageError
from bnfctl.model.attention import NAME as ROWS_ATTENTION
from bnfctl.model.attention import register, rows_of
from bnfctl.model.pretrained import device, load_pretrained, torch_dtype
from bnfctl.model.source import stored_tensors
from bnfctl.model.threads import keep_freed_memory
from bnfctl.scorers import prompts
from bnfctl.scorers.windows import windows

OBJECTIVES = (
    "helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity",
    "helpsteer-verbosity", "ultrafeedback-overall_score", "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness", "ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe",
    "prometheus-score", "argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style",
    "code-explanation", "code-instruction-following", "code-readability",
)  # fmt: skip
"""In the order of the regression layer's rows."""

ARCHITECTURE = "LlamaForRewardModelWithGating"
_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_END = "<|eot_id|>"
_GATE = [128009, 128006, 78191, 128007, 271]
"""_END + _HEADER.  The gate reads the state at the first of these: the <|eot_id|> that closes the prompt."""
_GATE_FIELDS = ("num_objectives", "gating_temperature", "gating_hidden_dim", "gating_n_hidden")
_HINT = "RLHFlow/ArmoRM-Llama3-8B-v0.1 is the model that this scorer reads"
_SPREAD = 8
"""Places inside attention per token of the budget: what shared prompts may add there."""


class ArmoRM(LlamaPreTrainedModel):
    """The published module tree: a Llama trunk and the heads, of which none is ever narrower than float32."""

    _keep_in_fp32_modules_strict = ["regression_layer", "gating", "reward_transform_matrix"]  # noqa: RUF012

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, config.num_objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(config.num_objectives), requires_grad=False)
        self.gating = _Gating(config)
        self.post_init()

    def heads(self, last: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(score [N], objectives [N, 19], gating [N, 19]) of the states [N, H] at response ends and prompt ends."""
        objectives = self.regression_layer(last.float())
        gating = self.gating(gate.float())
        return (gating * (objectives @ self.reward_transform_matrix)).sum(1), objectives, gating


class _Gating(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.temperature = config.gating_temperature
        sizes = [config.hidden_size, *[config.gating_hidden_dim] * config.gating_n_hidden, config.num_objectives]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            states = relu(layer(states))
        return self.logit_scale * softmax(self.layers[-1](states) / self.temperature, dim=1)


class _Chat:
    """Prompts and responses as ids whose concatenation is the rendered conversation."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        """Raises UsageError where the tokenizer is not Llama 3's, or its template writes something else."""
        self.tokenizer = tokenizer
        if tokenizer.encode(_END + _HEADER, add_special_tokens=False) != _GATE:
            raise UsageError("the tokenizer does not encode Llama 3's assistant header", where=where, hint=_HINT)
        asked = {"role": "user", "content": "a"}
        prompt, bos = self.prompt([asked]), tokenizer.bos_token_id
        if bos is None or prompt.count(bos) != 1 or prompt[0] != bos or prompt[-len(_GATE) :] != _GATE:
            what = "the chat template does not write <|begin_of_text|> once and <|eot_id|> behind every turn"
            raise UsageError(what, where=where, hint=_HINT)
        whole = _finished(render_conversation(tokenizer, [asked, {"role": "assistant", "content": " b "}]))
        self.trims = whole == prompt + self._plain("b")
        if not self.trims and whole != prompt + self._plain(" b "):
            raise UsageError("the chat template does not write a response as Llama 3's does", where=where, hint=_HINT)

    def prompt(self, messages: Iterable[Mapping[str, str]]) -> list[int]:
        """Up to where the response begins, ending with _GATE, whether or not the template writes that header."""
        return _finished(render_conversation(self.tokenizer, messages)) + _GATE[1:]

    def response(self, text: str) -> list[int]:
        """What follows the prompt.  Special tokens written out in the text stay plain, so it cannot forge a turn."""
        text = without_surrogates(text)
        return self._plain(text.strip() if self.trims else text)

    def _plain(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
        return [*ids, _GATE[0]]


def _finished(ids: list[int]) -> list[int]:
    """Without the assistant's header that early Llama-3 templates put behind every conversation."""
    return ids[: 1 - len(_GATE)] if ids[-len(_GATE) :] == _GATE else ids


@dataclass(frozen=True)
class _Sequence:
    """One response behind its prompt."""

    group: int
    prompt: list[int]
    response: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class ArmoRMScorer:
    """The gated score of every candidate; `extra` has the 19 objectives and the gating, by name.

    Equal responses to a prompt get equal rewards, exactly.  A candidate longer than `config.max_length`, or than the
    model has positions for, gets no reward and says its length as {"too_long": tokens}.

    `--dtype auto` is a bfloat16 trunk on a GPU, as the model card has it, and float32 on a CPU; the heads, and what
    they read, are float32 in each.
    """

    def __init__(self, config: ScoreConfig, model_dir: Path, share: bool = True) -> None:
        """share: compute a prompt once for its responses.

        Raises UsageError for a folder that is not laid out as the published model, naming the first difference.
        """
        self.config = config
        self.share = share
        self.version = f"transformers {transformers.__version__}"
        self.limit = min(config.max_length, context_length(model_dir) or config.max_length)
        check_layout(model_dir)
        self._chat = _Chat(load_tokenizer(model_dir, False), str(model_dir))
        register()
        prompts.register()
        keep_freed_memory()
        self._model = load_pretrained(ArmoRM, model_dir, torch_dtype(config.dtype), False).to(device())
        self._attention = _attention(self._model.device, share)
        self.packs = self._packs()
        if not self.packs:
            console.say("packed sequences do not score as they do alone on this machine: one forward per response")

    def score(self, groups: Iterable[Group]) -> Iterator[list[Reward]]:
        """One list per group, in order; reads some batches ahead, to put similar lengths together."""
        encoded = (self._encode(number, group) for number, group in enumerate(groups))
        for window in windows(encoded, lambda group: sum(map(len, group)), self.config.batch_tokens):
            yield from self._rewards(window)

    def _encode(self, number: int, group: Group) -> list[_Sequence]:
        try:
            prompt = self._chat.prompt(group.prompt.messages)
        except UsageError as error:
            raise UsageError(error.what, where=group.prompt.where or group.prompt.id, hint=error.hint) from error
        return [_Sequence(number, prompt, tuple(self._chat.response(one.text))) for one in group.candidates]

    def _rewards(self, window: Sequence[Sequence[_Sequence]]) -> Iterator[list[Reward]]:
        # a response that stands twice is computed once: rounding would make it differ from itself
        found: dict[tuple[int, tuple[int, ...]], Reward] = {}
        unique = {(one.group, one.response): one for group in window for one in group}
        for key, one in unique.items():
            if len(one) > self.limit:
                found[key] = Reward(None, {"too_long": len(one)})
        left = [one for key, one in unique.items() if key not in found]
        for batch in _batches(left, self.config.batch_tokens, self.share) if self.packs else ([one] for one in left):
            for one, reward in zip(batch, self._forward(batch), strict=True):
                found[one.group, one.response] = reward
        for group in window:
            yield [found[one.group, one.response] for one in group]

    def _forward(self, batch: Sequence[_Sequence]) -> Iterator[Reward]:
        outputs = self._packed(batch) if self.packs else self._alone(batch[0])
        for score, objectives, gating in zip(*(output.tolist() for output in outputs), strict=True):
            if not math.isfinite(score):
                # a reward that is no number can be neither stored nor compared
                yield Reward(None, {"not_finite": str(score)})
            else:
                yield Reward(score, {"objectives": _named(objectives), "gating": _named(gating)})

    @torch.inference_mode()
    def _packed(self, batch: Sequence[_Sequence]) -> tuple[Tensor, Tensor, Tensor]:
        """The heads' outputs for sequences one behind the other, in a row without padding."""
        ids: list[int] = []
        places: list[int] = []

        def append(tokens: Sequence[int], place: int) -> range:
            ids.extend(tokens)
            places.extend(range(place, place + len(tokens)))
            return range(len(ids) - len(tokens), len(ids))

        prompt, group = range(0), -1
        before: list[range] = []
        after: list[range] = []
        for one in batch:
            if not self.share or one.group != group:
                prompt, group = append(one.prompt, 0), one.group
            before.append(prompt)
            after.append(append(one.response, len(prompt)))
        more: dict[str, Any] = {"position_ids": self._tensor([places])}
        if self._attention == prompts.NAME:
            more["bnfctl_prompts"] = prompts.prompts_of(before, after)
        else:
            rows = [[*first, *rest] for first, rest in zip(before, after, strict=True)]
            more["bnfctl_rows"] = rows_of(rows, len(ids)).to(self._model.device)
        return self._heads(ids, [row[-len(_GATE)] for row in before], [row[-1] for row in after], **more)

    @torch.inference_mode()
    def _alone(self, one: _Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """The heads' outputs for one sequence, through transformers' own attention."""
        return self._heads([*one.prompt, *one.response], [len(one.prompt) - len(_GATE)], [len(one) - 1])

    def _heads(self, ids: list[int], gates: list[int], ends: list[int], **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        trunk = self._model.model(input_ids=self._tensor([ids]), attention_mask=None, use_cache=False, **more)
        states = trunk.last_hidden_state[0]
        outputs: tuple[Tensor, Tensor, Tensor] = self._model.heads(states[ends], states[gates])
        return outputs

    def _tensor(self, numbers: Any) -> Tensor:
        return torch.tensor(numbers, device=self._model.device)

    def _packs(self) -> bool:
        """Whether responses that share a prompt score as they do alone; leaves the attention that does it on if so."""
        first, second = (self._chat.prompt([{"role": "user", "content": text}]) for text in ("ab", "no, the other"))
        probe = [_Sequence(0, first, (*range(64, 75),)), _Sequence(0, first, (80,)), _Sequence(1, second, (91, 92, 93))]
        self._model.set_attn_implementation("sdpa")
        alone = torch.cat([torch.cat(self._alone(one)[1:]) for one in probe])
        self._model.set_attn_implementation(self._attention)
        narrow = self._model.dtype != torch.float32
        try:
            _, objectives, gating = self._packed(probe)
            packed = torch.stack([objectives, gating], dim=1).flatten(0, 1)
            if not float((packed - alone).norm() / alone.norm().clamp(min=1e-6)) < (0.05 if narrow else 1e-4):
                raise ValueError("packed sequences mix")
        except ValueError:
            self._model.set_attn_implementation("sdpa")
            return False
        return True


def _attention(place: torch.device, share: bool) -> str:
    """The implementation for packed sequences: `prompts` needs a mask, with which a GPU loses its fast kernel."""
    return prompts.NAME if share and place.type == "cpu" else ROWS_ATTENTION


def _batches(sequences: Iterable[_Sequence], budget: int, share: bool) -> Iterator[list[_Sequence]]:
    """Batches of similar lengths, those of a prompt together, at most `budget` packed tokens each (or one sequence)."""
    longest: dict[int, int] = {}
    ordered = list(sequences)
    for one in ordered:
        longest[one.group] = max(longest.get(one.group, 0), len(one))
    ordered.sort(key=lambda one: (longest[one.group], one.group))
    batch: list[_Sequence] = []
    tokens = width = 0
    for one in ordered:
        more = len(one.response) if share and batch and batch[-1].group == one.group else len(one)
        wide = max(width, len(one))
        if batch and (tokens + more > budget or (len(batch) + 1) * wide > _SPREAD * budget):
            yield batch
            batch, tokens, more, wide = [], 0, len(one), len(one)
        batch.append(one)
        tokens, width = tokens + more, wide
    if batch:
        yield batch


def _named(values: list[float]) -> dict[str, float]:
    """By objective; nine digits tell any two float32 apart."""
    return {name: float(f"{value:.9g}") for name, value in zip(OBJECTIVES, values, strict=True)}


def check_layout(folder: Path) -> None:
    """Compare config.json, names, shapes and types with the published ones; UsageError names the first difference."""
    raw = read_config(folder)
    kind = ", ".join(raw.get("architectures") or ()) or "no architecture"
    if ARCHITECTURE not in kind and not all(name in raw for name in _GATE_FIELDS):
        raise UsageError(f"armorm reads {ARCHITECTURE}, this is {kind}", where=str(folder), hint=_HINT)
    for name in _GATE_FIELDS:
        if not isinstance(raw.get(name), int | float) or raw[name] <= 0:
            raise UsageError(f"config.json has {name} {raw.get(name)}", where=str(folder), hint=_HINT)
    if raw["num_objectives"] != len(OBJECTIVES):
        what = f"the model has {raw['num_objectives']} objectives, not {len(OBJECTIVES)}"
        raise UsageError(what, where=str(folder), hint=_HINT)
    with torch.device("meta"):
        expected = ArmoRM(LlamaConfig.from_dict(raw)).state_dict()
    found = stored_tensors(folder)
    difference = next((text for name, tensor in expected.items() if (text := _difference(name, tensor, found))), None)
    if difference is None and (unexpected := sorted(found.keys() - expected.keys())):
        difference = f"the checkpoint has a tensor that ArmoRM lacks: {unexpected[0]}"
    if difference is not None:
        raise UsageError(difference, where=str(folder), hint=_HINT)


def _difference(name: str, tensor: Tensor, found: Mapping[str, Mapping[str, Any]]) -> str | None:
    entry = found.get(name)
    if entry is None:
        return f"the checkpoint lacks {name}"
    if entry["shape"] != list(tensor.shape):
        return f"{name} is {entry['shape']}, expected {list(tensor.shape)}"
    kinds = ("BF16", "F32", "F16") if name.startswith("model.") else ("F32",)
    return None if entry["dtype"] in kinds else f"{name} is stored as {entry['dtype']}, expected {kinds[0]}"
