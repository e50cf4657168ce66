"""Rows over ranks: the same numbers as in one process, from disk, in gradients and in what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from bnfctl.errors import UsageError
from bnfctl.model import sharding
from bnfctl.model.policy import Policy, Sequences
from bnfctl.training.setup import checkpoint_activations
from bnfctl.training.world import World
from tests.model.tiny import VOCABULARY, write_model
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def whole_policy(folder: Path, compute: torch.dtype = torch.float32) -> Policy:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return Policy(model.eval(), compute)


def sharded_policy(folder: Path, world: World, compute: torch.dtype = torch.float32) -> Policy:
    policy = Policy(sharding.empty_policy_model(folder), compute)
    sharding.shard(policy, world.size, "cpu")
    sharding.load_rows(policy, folder, CPU)
    return policy


def sequence(seed: int, length: int, trained: bool = True) -> Sequences:
    """One document; nothing of it is trained where `trained` is False."""
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(length - 1 if trained else 0)
    return Sequences(ids[None], torch.arange(length)[None], None, None, places, ids[places + 1])


PARTS = {0: [sequence(0, 9), sequence(1, 5), sequence(4, 4)], 1: [sequence(2, 7), sequence(3, 6, trained=False)]}
"""The micro-batches of each rank; rank 1 has one less, and fills up with one that trains nothing."""
PARTS[1].append(PARTS[1][-1])


def objective(policy: Policy, part: Sequences, one_pass: bool) -> Tensor:
    """A sum over tokens that is differentiable in every parameter."""
    if one_pass:
        return policy.one_pass(part, lambda _, odds: torch.full_like(odds, 0.5))[0].sum()
    return policy.logps(part)[0].sum()


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def check_loaded(policy: Policy, exact: Policy) -> None:
    """Parameters bit for bit, buffers too, so the logits: and an evaluation leaves the rows where they are."""
    whole = dict(exact.named_parameters())
    for name, parameter in policy.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert torch.equal(parameter.full_tensor(), whole[name]), name
    assert len(list(policy.parameters())) == len(whole)
    buffers = dict(policy.named_buffers())
    assert buffers
    assert all(torch.equal(buffers[name], value) for name, value in exact.named_buffers())
    ids = PARTS[0][0].input_ids
    with torch.no_grad():
        logits = policy(lambda p: (p.model(input_ids=ids, use_cache=False).logits,))[0]
        assert torch.equal(logits, exact.model(input_ids=ids, use_cache=False).logits)
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())


def check_saved(policy: Policy, exact: Policy, main: bool, folder: Path) -> None:
    state = sharding.full_state(policy.model, main)
    if not main:
        assert state == {}
        return
    expected = exact.model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    policy.model.save_pretrained(folder / "rows", state_dict=state)
    exact.model.save_pretrained(folder / "whole")
    ours, theirs = (load_file(folder / kind / "model.safetensors") for kind in ("rows", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def check_gradients(
    policy: Policy, exact: Policy, world: World, tolerance: float, *, one_pass: bool = False, late: bool = False
) -> None:
    """Rank by rank and micro-batch by micro-batch, against all of them in one process."""
    for part in PARTS[0] + PARTS[1]:
        objective(exact, part, one_pass).backward()
    for index, part in enumerate(PARTS[world.rank]):
        policy.set_requires_gradient_sync(not late or index == len(PARTS[world.rank]) - 1)  # type: ignore[operator]
        objective(policy, part, one_pass).backward()
    for (name, parameter), other in zip(policy.named_parameters(), exact.parameters(), strict=True):
        if not other.requires_grad:
            assert parameter.grad is None, name
            continue
        gradient = parameter.grad.full_tensor() * world.size  # reduced to the mean over ranks
        assert gradient.dtype == torch.float32
        assert relative(gradient, other.grad) < tolerance, name
    for each in (policy, exact):
        each.zero_grad(set_to_none=True)


def checkpoint_layers(policy: Policy, calls: list[int]) -> None:
    """Activation checkpointing, with each forward of a layer counted."""

    def counting(*args: Any, forward: Callable[..., Any], **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    for layer in sharding.layers(policy.model):
        layer.forward = partial(counting, forward=layer.forward)
    checkpoint_activations(policy)


def on_two_ranks(world: World, folders: list[Path], work: Path) -> None:
    for folder in folders:
        exact = whole_policy(folder)
        policy = sharded_policy(folder, world)
        check_loaded(policy, exact)
        check_saved(policy, exact, world.main, work / folder.name)
        for one_pass in (False, True):
            for late in (False, True):
                check_gradients(policy, exact, world, 1e-5, one_pass=one_pass, late=late)
        check_half_precision(folder, world)
        calls: list[int] = []
        checkpoint_layers(policy, calls)
        check_gradients(policy, exact, world, 1e-5)
        assert len(calls) == 2 * 2 * len(PARTS[0])  # two layers, computed twice
    check_frozen(folders[0], world)


def check_half_precision(folder: Path, world: World) -> None:
    exact, policy = whole_policy(folder), sharded_policy(folder, world, torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
    check_gradients(policy, exact, world, 0.1)


def check_frozen(folder: Path, world: World) -> None:
    """What is frozen stays so, beside parameters of the same unit that are trained."""
    exact = whole_policy(folder)
    policy = Policy(sharding.empty_policy_model(folder), torch.float32)
    for each in (exact, policy):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("q_proj" in name)
    sharding.shard(policy, world.size, "cpu")
    sharding.load_rows(policy, folder, CPU)
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in exact.named_parameters()}
    check_gradients(policy, exact, world, 1e-5)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Tied in one file, untied in several."""
    tied = write_model(tmp_path / "tied")
    untied = write_model(tmp_path / "untied", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.bfloat16)
    (untied / "model.safetensors").unlink()
    model.save_pretrained(untied, max_shard_size="60KB")
    assert len(list(untied.glob("model-*.safetensors"))) >= 2
    run_ranks(on_two_ranks, 2, [tied, untied], tmp_path)
    assert (tmp_path / "untied" / "rows").is_dir()


def refused(folder: Path) -> str:
    policy = Policy(sharding.empty_policy_model(folder), torch.float32)
    with pytest.raises(UsageError) as caught:
        sharding.load_rows(policy, folder, CPU)
    assert all(parameter.is_meta for parameter in policy.parameters())  # nothing was read yet
    assert caught.value.hint
    return caught.value.what


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["model.final.weight"] = tensors.pop("model.norm.weight")


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.more.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (rename, "lacks model.norm.weight and holds model.final.weight besides"),
        (drop, "lacks model.layers.1.mlp.up_proj.weight and 1 more"),
        (add, "the checkpoint holds model.more.weight besides"),
    ],
)
def test_names_have_to_match_one_to_one(change: Callable[[dict[str, Tensor]], None], what: str, tmp_path: Path) -> None:
    assert refused(rewrite(write_model(tmp_path / "a"), change)).endswith(what)


def test_shapes_have_to_match(tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].clone()

    assert "[300, 64] in the checkpoint and [307, 64]" in refused(rewrite(write_model(tmp_path / "a"), cut))


def test_a_tied_head_stored_twice_has_to_agree(tmp_path: Path) -> None:
    """Which one transformers would take depends on its version, so neither is taken."""

    def split(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    assert "tied" in refused(rewrite(write_model(tmp_path / "a"), split))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_what_old_checkpoints_hold_besides_is_no_reason(name: str, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors["model.embed_tokens.weight"].clone()

    folder = rewrite(write_model(tmp_path / "a"), add)
    policy = Policy(sharding.empty_policy_model(folder), torch.float32)
    sharding.load_rows(policy, folder, CPU)
    assert torch.equal(policy.model.lm_head.weight, whole_policy(folder).model.lm_head.weight)
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    assert "no safetensors" in refused(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002" in refused(folder)


def test_an_empty_model_has_buffers_and_ties(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a")
    model = sharding.empty_policy_model(folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(module.training for module in model.modules())
    buffers = dict(model.named_buffers())
    expected = dict(whole_policy(folder).model.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[name], value) for name, value in expected.items())


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(UsageError, match="cannot build"):
        sharding.empty_policy_model(tmp_path)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(9))


def test_layers_are_the_outer_list(tmp_path: Path) -> None:
    body = nn.Module()
    body.extra = nn.ModuleList([nn.Linear(1, 1)])
    body.layers = nn.ModuleList(Experts() for _ in range(3))
    assert sharding.layers(body) == list(body.layers)
    model = sharding.empty_policy_model(write_model(tmp_path / "a"))
    assert sharding.layers(model) == list(model.model.layers)
    with pytest.raises(UsageError, match="no list of layers"):
        sharding.layers(nn.Linear(1, 1))


def test_adapters_stay_and_the_rest_is_read(tmp_path: Path) -> None:
    """peft wraps the names; what is real already is no row of the checkpoint."""
    peft = pytest.importorskip("peft")
    folder = write_model(tmp_path / "a")
    model = peft.get_peft_model(
        sharding.empty_policy_model(folder), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    for module in model.modules():
        if hasattr(module, "lora_A"):
            for part in (module.lora_A, module.lora_B):  # peft puts them where the base is: on meta
                part.to_empty(device="cpu")
                nn.init.ones_(part["default"].weight)
    policy = Policy(model.eval(), torch.float32)
    assert len(sharding.layers(policy.model)) == 2
    sharding.load_rows(policy, folder, CPU)
    adapters = [parameter for name, parameter in policy.named_parameters() if "lora_" in name]
    assert len(adapters) == 4
    assert all(bool((parameter == 1).all()) and parameter.requires_grad for parameter in adapters)
    with model.disable_adapter():
        logits = policy.model(input_ids=PARTS[0][0].input_ids).logits
    assert torch.equal(logits, whole_policy(folder).model(input_ids=PARTS[0][0].input_ids).logits)
