"""What a training refuses before its first step, with the record or parameter that is to blame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bnfctl import console
from bnfctl.config import TrainConfig
from bnfctl.data.chat import read_config
from bnfctl.data.records import Record
from bnfctl.errors import UsageError
from bnfctl.losses import Loss
from bnfctl.model.policy import Policy
from bnfctl.model.sharding import local_rows


def check_records(
    config: TrainConfig, loss: Loss, train_set: Sequence[Record], test_set: Sequence[Record], folder: Path
) -> list[Record]:
    """The training records that the loss can use; UsageError where it cannot work with the data at all."""
    vocabulary = _vocabulary(folder)
    for record in [*train_set, *(test_set if config.eval_every else [])]:
        where = f"record {record.id}"
        if not record.prompt_ids or not record.sides or not all(side.ids for side in record.sides):
            raise UsageError("a record needs a prompt and responses of at least one token", where=where)
        longest = len(record.prompt_ids) + max(len(side.ids) for side in record.sides)
        if longest > config.max_length:
            what = f"prompt + response has {longest} tokens; --max-length is {config.max_length}"
            raise UsageError(what, where=where, hint="raise --max-length or drop the record")
        for ids in (record.prompt_ids, *(side.ids for side in record.sides)):
            if min(ids) < 0 or (vocabulary is not None and max(ids) >= vocabulary):
                wrong = min(ids) if min(ids) < 0 else max(ids)
                what = f"token {wrong} is not in the model's vocabulary of {vocabulary}"
                raise UsageError(what, where=where, hint="--retokenize tokenizes the texts with this model")
        if loss.needs_pairs and sorted(side.label for side in record.sides) != [-1, 1]:
            raise UsageError(
                f"the loss '{config.loss}' needs both sides of every record",
                where=where,
                hint="use --loss bnf, or build again with --pairing-ratio 1",
            )
    kept = [record for record in train_set if any(side.label in loss.labels for side in record.sides)]
    if not kept:
        wanted = "chosen" if loss.labels == (1,) else "chosen or rejected"
        raise UsageError(
            f"the loss '{config.loss}' finds no {wanted} response in the training split",
            where="--data",
            hint="check what the build stage kept: bnfctl show",
        )
    if len(kept) < len(train_set):
        console.say(f"{len(train_set) - len(kept)} records have no response for the loss '{config.loss}': left out")
    return kept


def _vocabulary(folder: Path) -> int | None:
    """How many token ids the model knows; None where its config does not say."""
    config = read_config(folder)
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def longest_sequence(records: Sequence[Record], crossed: int = 0) -> int:
    """Tokens of the longest prompt + response; crossed: of any prompt with any response, cut there, as KTO needs it."""
    prompts = [len(record.prompt_ids) for record in records]
    responses = [max(len(side.ids) for side in record.sides) for record in records]
    longest = max(map(sum, zip(prompts, responses, strict=True)))
    return max(longest, min(crossed, max(prompts) + max(responses)))


def check_positions(folder: Path, longest: int) -> None:
    """UsageError where rotary frequencies would depend on what else is in a micro-batch.

    LongRoPE (Phi-3 with 128k positions) has one set for short and one for long inputs, and transformers chooses it for
    the whole micro-batch by the largest position in it.
    """
    config = read_config(folder)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    short = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind in ("longrope", "su") and isinstance(short, int) and longest > short:
        what = f"sequences of {longest} tokens need this model's long rotary frequencies, shorter ones its short ones"
        raise UsageError(what, where="--max-length", hint=f"--max-length {short}")


@torch.no_grad()
def check_parameters(policy: Policy, folder: Path) -> None:
    """UsageError where a parameter that this rank holds has a NaN or an infinity, which would spread to all."""
    for name, parameter in policy.model.named_parameters():
        local, _ = local_rows(parameter)
        if local.is_floating_point() and not bool(local.isfinite().all()):
            hint = "the checkpoint is damaged: fetch it again, or take the one before it"
            raise UsageError(f"{name} has numbers that are not finite", where=str(folder), hint=hint)
