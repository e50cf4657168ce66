"""Checkpoints: what is restored goes on to the same bits, at any number of ranks, and what is torn is not taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from bnfctl import durable
from bnfctl.errors import BnfctlError
from bnfctl.model import sharding
from bnfctl.model.policy import Policy
from bnfctl.training import checkpoint
from bnfctl.training.checkpoint import State
from bnfctl.training.world import World
from tests.model.tiny import tiny_config
from tests.ranks import one_process, run_ranks

CONFIG = {"lr": 1e-3, "betas": [0.9, 0.95]}


def make_policy(seed: int = 0, **overrides: Any) -> Policy:
    """Frozen norms, beside matrices that are trained and a tied head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(tiny_config(**overrides)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    return Policy(model, torch.float32)


def make_optimizer(policy: Policy) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)


def take_steps(policy: Policy, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps with gradients that depend on the step and the parameters alone: the same for any number of ranks."""
    for step in range(first, last):
        for index, parameter in enumerate(p for p in policy.parameters() if p.requires_grad):
            draw = torch.Generator().manual_seed(1000 * step + index)
            whole = torch.randn(parameter.shape, generator=draw)
            local, begin = sharding.local_rows(parameter)
            rows = whole[begin : begin + len(local)] + local
            if isinstance(parameter, DTensor):
                shape, stride = parameter.shape, parameter.stride()
                rows = DTensor.from_local(
                    rows, parameter.device_mesh, parameter.placements, shape=shape, stride=stride
                )  # fmt: skip
            parameter.grad = rows
        optimizer.step()


def everything(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and optimizer slots as whole tensors; collective."""
    found = {}
    for name, parameter in policy.model.named_parameters():
        slots = optimizer.state.get(parameter, {})
        for slot, value in {"": parameter.detach(), **slots}.items():
            found[f"{name}:{slot}"] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def save_at(work: Path, step: int, policy: Policy, optimizer: Any, world: World, keep: int = 1) -> Path:
    metrics = work / "metrics.jsonl"
    if world.main:
        metrics.write_text("x" * step)
    checkpoint.save(work, State(step, step, CONFIG), policy.model, optimizer, metrics, world, keep)
    return work / checkpoint.FOLDER / f"step-{step:06d}"


def restored(work: Path, world: World, shape: Callable[[Policy], None] = lambda policy: None) -> Any:
    """(state, policy, optimizer) of a fresh start that finds the checkpoint."""
    policy = make_policy()
    shape(policy)
    optimizer = make_optimizer(policy)
    return checkpoint.restore(work, CONFIG, policy.model, optimizer, world), policy, optimizer


def steps_in(work: Path) -> list[str]:
    return sorted(path.name for path in (work / checkpoint.FOLDER).iterdir())


def test_the_next_steps_are_bit_equal(tmp_path: Path) -> None:
    policy = make_policy()
    optimizer = make_optimizer(policy)
    take_steps(policy, optimizer, 0, 2)
    save_at(tmp_path, 2, policy, optimizer, one_process())
    take_steps(policy, optimizer, 2, 4)
    state, other, again = restored(tmp_path, one_process())
    assert state == State(2, 2, CONFIG, {"size": 1, "layout": "whole"})
    take_steps(other, again, 2, 4)
    assert_same(everything(other, again), everything(policy, optimizer))


def test_without_a_checkpoint_nothing_changes(tmp_path: Path) -> None:
    state, policy, optimizer = restored(tmp_path, one_process())
    assert state == State(0, 0, CONFIG)
    assert not optimizer.state
    assert_same(everything(policy, optimizer), everything(make_policy(), optimizer))


def test_what_is_frozen_is_not_kept(tmp_path: Path) -> None:
    policy = make_policy()
    folder = save_at(tmp_path, 1, policy, make_optimizer(policy), one_process())
    keys = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            keys += list(opened.keys())
    assert sorted(keys) == sorted(f"{n}:" for n, p in policy.model.named_parameters() if p.requires_grad)
    assert not any("norm" in key or "lm_head" in key for key in keys)


def test_many_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 50_000)
    policy = make_policy()
    optimizer = make_optimizer(policy)
    take_steps(policy, optimizer, 0, 1)
    folder = save_at(tmp_path, 1, policy, optimizer, one_process())
    assert len(list(folder.glob("*.safetensors"))) > 5
    _, other, again = restored(tmp_path, one_process())
    assert_same(everything(other, again), everything(policy, optimizer))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    policy = make_policy()
    optimizer = make_optimizer(policy)
    for step in (1, 2, 3, 4):
        save_at(tmp_path, step, policy, optimizer, one_process(), keep=2)
    assert steps_in(tmp_path) == ["step-000003", "step-000004"]
    before = (tmp_path / checkpoint.FOLDER / "step-000004" / "state.json").stat().st_mtime_ns
    save_at(tmp_path, 4, policy, optimizer, one_process(), keep=2)  # a stop at a step that was just saved
    assert (tmp_path / checkpoint.FOLDER / "step-000004" / "state.json").stat().st_mtime_ns == before


def missing(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def shortened(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])


def stateless(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 3, "conf')


@pytest.mark.parametrize("tear", [missing, shortened, stateless])
def test_a_torn_one_is_passed_over_and_written_again(tear: Callable[[Path], None], tmp_path: Path) -> None:
    policy = make_policy()
    optimizer = make_optimizer(policy)
    for step in (2, 3):
        take_steps(policy, optimizer, step, step + 1)
        folder = save_at(tmp_path, step, policy, optimizer, one_process(), keep=2)
    tear(folder)
    shutil.copytree(folder, folder.with_name(".step-000004.tmp"))
    state, other, again = restored(tmp_path, one_process())
    assert state.step == 2
    assert steps_in(tmp_path) == ["step-000002"]
    take_steps(other, again, 3, 4)
    assert_same(everything(other, again), everything(policy, optimizer))
    save_at(tmp_path, 3, other, again, one_process(), keep=2)
    assert restored(tmp_path, one_process())[0].step == 3


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    policy = make_policy()
    save_at(tmp_path, 1, policy, make_optimizer(policy), one_process())
    with pytest.raises(BnfctlError, match="another configuration") as caught:
        checkpoint.restore(tmp_path, {**CONFIG, "lr": 1}, policy.model, make_optimizer(policy), one_process())
    assert str(tmp_path) in str(caught.value.hint)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "has model.layers.1.* besides"),
        ({"intermediate_size": 80}, r"\[96, 64\] there and \[80, 64\] here"),
    ],
)
def test_another_model_is_refused(overrides: dict[str, int], what: str, tmp_path: Path) -> None:
    policy = make_policy()
    save_at(tmp_path, 1, policy, make_optimizer(policy), one_process())
    other = make_policy(seed=1, **overrides)
    with pytest.raises(BnfctlError, match=what):
        checkpoint.restore(tmp_path, CONFIG, other.model, make_optimizer(other), one_process())
    assert_same(
        everything(other, make_optimizer(other)), everything(make_policy(1, **overrides), make_optimizer(other))
    )


def test_slots_of_any_kind_come_back(tmp_path: Path) -> None:
    """As 8-bit AdamW has them: bytes of the parameter's shape, scales of another, a shared table, a plain number."""
    model = nn.Linear(6, 4, bias=False)
    table = torch.linspace(-1, 1, 256)
    slots = {
        "state1": torch.randint(0, 255, (4, 6), dtype=torch.uint8), "absmax1": torch.rand(3),
        "qmap1": table, "qmap2": table, "step": 7, "wide": torch.rand(4, 6, dtype=torch.float64),
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight].update(slots)
    (tmp_path / "metrics.jsonl").touch()
    state = State(1, 0, CONFIG)
    checkpoint.save(tmp_path, state, model, optimizer, tmp_path / "metrics.jsonl", one_process(), 1)
    fresh = nn.Linear(6, 4, bias=False)
    again = torch.optim.SGD(fresh.parameters())
    checkpoint.restore(tmp_path, CONFIG, fresh, again, one_process())
    found = again.state[fresh.weight]
    assert torch.equal(fresh.weight, model.weight)
    assert found.keys() == slots.keys()
    assert found.pop("step") == slots.pop("step")
    for name, value in slots.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_a_crash_at_any_durable_step_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    policy = make_policy()
    optimizer = make_optimizer(policy)
    passed: list[str] = []
    for number in range(100):
        work = tmp_path / str(number)
        work.mkdir()
        monkeypatch.setattr(durable, "boundary", lambda name: None)
        save_at(work, 1, policy, optimizer, one_process())
        passed.clear()

        def boundary(name: str, number: int = number) -> None:
            if len(passed) == number:
                raise Killed
            passed.append(name)

        monkeypatch.setattr(durable, "boundary", boundary)
        try:
            save_at(work, 2, policy, optimizer, one_process())
        except Killed:
            monkeypatch.setattr(durable, "boundary", lambda name: None)
            renamed = "before rename step-000002" in passed
            assert restored(work, one_process())[0].step == (2 if renamed else 1)
            assert not [name for name in steps_in(work) if name.startswith(".")]
            continue
        break
    assert number == len(passed) >= 8
    assert restored(work, one_process())[0].step == 2


def on_two_ranks(world: World, work: Path) -> None:
    """Both layouts on two ranks: from one process and from each other, and on to the same bits."""

    def rows(policy: Policy) -> None:
        sharding.shard(policy, world.size, "cpu")

    def whole(policy: Policy) -> None:
        pass

    expected = everything(*trained(4))
    for source in ("one", "rows", "whole"):
        for shape in (rows, whole):
            state, policy, optimizer = restored(work / source, world, shape)
            assert state.step == 2, source
            assert any(isinstance(p, DTensor) for p in policy.parameters()) == (shape is rows)
            assert_same(everything(policy, optimizer), everything(*trained(2)))
            take_steps(policy, optimizer, 2, 4)
            assert_same(everything(policy, optimizer), expected)
            if source == "one":
                target = work / shape.__name__
                if world.main:
                    target.mkdir()
                world.barrier()
                _, policy, optimizer = restored(work / source, world, shape)
                save_at(target, 2, policy, optimizer, world)
                save_at(target, 2, policy, optimizer, world)
    failing(world, work)


def trained(steps: int) -> tuple[Policy, torch.optim.Optimizer]:
    policy = make_policy()
    optimizer = make_optimizer(policy)
    take_steps(policy, optimizer, 0, steps)
    return policy, optimizer


def failing(world: World, work: Path) -> None:
    """One rank that cannot write, or wrote where the others can't see it, fails all; nothing is published."""
    policy = make_policy()
    sharding.shard(policy, world.size, "cpu")
    optimizer = make_optimizer(policy)
    target = work / "failing"
    if world.main:
        target.mkdir()
    world.barrier()

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if not world.main:
            patch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises((OSError, BnfctlError), match="No space left") as caught:
            save_at(target, 1, policy, optimizer, world)
        assert isinstance(caught.value, OSError) != world.main
    with pytest.MonkeyPatch.context() as patch:
        if not world.main:
            patch.setattr(checkpoint, "_write_rows", lambda *args: {"rank-00001-00000.safetensors": 10})
        with pytest.raises(BnfctlError, match="rank-00001-00000"):
            save_at(target, 1, policy, optimizer, world)
    assert not list((target / checkpoint.FOLDER).glob("step-*"))
    save_at(target, 1, policy, optimizer, world)
    assert steps_in(target) == ["step-000001"]


def test_two_ranks_and_one_process_go_on_from_each_other(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    save_at(tmp_path / "one", 2, *trained(2), one_process())
    run_ranks(on_two_ranks, 2, tmp_path)
    for layout in ("rows", "whole"):
        folder = tmp_path / layout / checkpoint.FOLDER / "step-000002"
        record = json.loads((folder / "state.json").read_text())
        assert record["world"] == {"size": 2, "layout": layout}
        ranks = {name.split("-")[1] for name in record["files"]}
        assert ranks == ({"00000", "00001"} if layout == "rows" else {"00000"})
        state, policy, optimizer = restored(tmp_path / layout, one_process())
        assert state.world["layout"] == layout
        take_steps(policy, optimizer, 2, 4)
        assert_same(everything(policy, optimizer), everything(*trained(4)))
