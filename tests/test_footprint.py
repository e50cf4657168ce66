"""The memory estimate, against torch's own tracker on fake tensors: the real policy, sharding, head and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from bnfctl import footprint
from bnfctl.config import TrainConfig
from bnfctl.footprint import GB, Machine
from bnfctl.model import attention, head, sharding
from bnfctl.model.adapters import add_adapters
from bnfctl.model.policy import Policy, Sequences
from bnfctl.shape import Shape, shape_of
from bnfctl.training import setup

LLAMA3 = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "intermediate_size": 96, "vocab_size": 512,
}  # fmt: skip
CUDA = {"cpu": head.CHUNK_ELEMENTS["cuda"]}


class Peak:
    """Torch's trackers follow the peak of every module too, at a cost that grows with the square of the layers."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, held in self._curr_mem_snap.items():  # type: ignore[attr-defined]
            self._peak_mem[device] = max(self._peak_mem.get(device, 0), held["Total"])  # type: ignore[attr-defined]


class OneGpu(Peak, MemTracker):
    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        # The hooks name what a gradient is, and cannot be put on frozen parameters.
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


class Sharded(Peak, FSDPMemTracker):
    pass


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def tracked_peak(raw: dict[str, Any], config: TrainConfig) -> int:
    """Bytes at the peak of a micro-batch and its optimizer step, with gradients and moments of an earlier one."""
    policy = on_meta(raw, config)
    tokens = config.micro_tokens or 0
    with ExitStack() as stack:
        if config.devices != 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.devices or 1)
            mesh = init_device_mesh("cpu", (config.devices or 1,))
            stack.enter_context(mock.patch.object(sharding, "init_device_mesh", return_value=mesh))
        stack.enter_context(FakeTensorMode())
        # A CPU build cannot hold fake CUDA tensors, so these are on the CPU and say otherwise: all of bnfctl's own
        # code takes its way on a GPU, and sizes are the same.
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
        stack.enter_context(mock.patch.dict(head.CHUNK_ELEMENTS, CUDA))
        materialize(policy)
        if config.activation_checkpointing == "on":
            setup.checkpoint_activations(policy)
        if config.parallel == "fsdp":
            sharding.shard(policy, config.devices or 1, "cpu")
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)  # as setup.make_optimizer
        sequences = packed(tokens, 4)

        def forward() -> torch.Tensor:
            return policy.one_pass(sequences, lambda part, odds: odds * 2)[0]

        forward().backward()
        optimizer.step()
        tracker: Any = Sharded(policy, optimizer) if config.parallel == "fsdp" else OneGpu()
        if config.parallel != "fsdp":
            tracker.track_external(policy, optimizer)
        with tracker:
            forward().backward()
            optimizer.step()
        return int(tracker._peak_mem[torch.device("cpu")])


def on_meta(raw: dict[str, Any], config: TrainConfig) -> Policy:
    attention.register()
    sizes = {name: value for name, value in raw.items() if name != "model_type"}
    made = AutoConfig.for_model(raw["model_type"], **sizes)
    kind = getattr(torch, config.dtype) if config.lora and config.parallel != "fsdp" else torch.float32  # setup.load
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, attn_implementation=attention.NAME, dtype=kind).eval()
    if config.lora:
        add_adapters(model, setup.lora_of(config), 0)
    return Policy(model, getattr(torch, config.dtype))


def materialize(policy: Policy) -> None:
    """Fake parameters and buffers in place of those on meta; a tied one stays tied."""
    made: dict[int, nn.Parameter] = {}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype)
                made.setdefault(id(parameter), nn.Parameter(fresh, requires_grad=parameter.requires_grad))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def packed(tokens: int, rows: int) -> Sequences:
    """All tokens trained, no padding, no shared prompt: what the estimate assumes.  To be made under fake tensors."""
    index, none = torch.zeros(tokens, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    places = attention.Rows(index, index, none, none, (rows, tokens // rows))
    return Sequences(index[None], index[None], None, places, index, index)


def training(devices: int, lora: int, again: str, **more: Any) -> TrainConfig:
    return TrainConfig(
        model="m", dtype="bfloat16", devices=devices, parallel="ddp" if devices == 1 else "fsdp", lora=lora,
        activation_checkpointing=again, **{"micro_tokens": 16384, **more},
    )  # fmt: skip


def sized(raw: dict[str, Any]) -> Shape:
    shape = shape_of(raw)
    assert shape is not None
    return shape


def ratio(raw: dict[str, Any], config: TrainConfig) -> float:
    return footprint.footprint(sized(raw), config).total / tracked_peak(raw, config)


@pytest.mark.slow
@pytest.mark.parametrize("again", ["off", "on"])
@pytest.mark.parametrize("lora", [0, 16])
@pytest.mark.parametrize("devices", [1, 4, 8])
def test_llama_3_8b_is_within_15_percent_of_torchs_tracker(devices: int, lora: int, again: str) -> None:
    found = ratio(LLAMA3, training(devices, lora, again))
    print(f"{devices} GPUs, LoRA {lora}, checkpointing {again}: {found:.3f} of the tracker's")
    assert 0.85 < found < 1.15


@pytest.mark.parametrize(
    ("devices", "lora", "again", "layers"), [(1, 0, "off", 4), (1, 16, "on", 4), (4, 0, "on", 4), (4, 16, "off", 4)]
)
def test_a_few_layers_of_it_too(devices: int, lora: int, again: str, layers: int) -> None:
    assert 0.85 < ratio({**LLAMA3, "num_hidden_layers": layers}, training(devices, lora, again)) < 1.15


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("up_proj", "down_proj")])
@pytest.mark.parametrize("again", ["off", "on"])
def test_adapters_of_a_few_modules_keep_what_those_read(targets: tuple[str, ...], again: str) -> None:
    # The first layer keeps nothing before its first adapter, which the estimate counts as in the others.
    raw = {**LLAMA3, "num_hidden_layers": 12, "vocab_size": 32000}
    for devices in (1, 4):
        assert 0.95 < ratio(raw, training(devices, 16, again, lora_targets=targets)) < 1.05


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("devices", [1, 4])
def test_other_families(family: str, devices: int) -> None:
    raw = {**LLAMA3, "model_type": family, "num_hidden_layers": 4, "vocab_size": 32000, "tie_word_embeddings": True,
           "head_dim": 128, "sliding_window": None}  # fmt: skip
    assert 0.85 < ratio(raw, training(devices, 0, "off", micro_tokens=4096)) < 1.15


def test_the_tracker_sees_what_the_estimate_leaves_out() -> None:
    raw = {**LLAMA3, "num_hidden_layers": 2}
    wrong = footprint.footprint(sized(raw), training(1, 0, "off", micro_tokens=1024)).total
    assert wrong / tracked_peak(raw, training(1, 0, "off")) < 0.85


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_transformers(family: str, tied: bool) -> None:
    raw = {**TINY, "model_type": family, "tie_word_embeddings": tied}
    model = on_meta(raw, training(1, 0, "off")).model
    model.tie_weights()
    assert sized(raw).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_lora_parameters_are_those_of_peft() -> None:
    raw = {**TINY, "model_type": "llama"}
    for targets in (("all-linear",), ("q_proj", "v_proj")):
        policy = on_meta(raw, dataclasses.replace(training(1, 5, "off"), lora_targets=targets))
        trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
        assert sized(raw).lora_parameters(5, targets) == trained


def test_what_a_config_leaves_out_is_its_familys_default() -> None:
    assert sized({**TINY, "model_type": "gemma2"}).tied
    assert not sized({**TINY, "model_type": "llama"}).tied
    nested = {"model_type": "gemma3", "text_config": {**TINY, "model_type": "gemma3_text"}}
    assert sized(nested) == sized({**TINY, "model_type": "gemma3_text"})
    assert shape_of({**TINY, "model_type": "mixtral", "num_local_experts": 8}) is None
    assert shape_of({"model_type": "mamba", "hidden_size": 64}) is None


def test_auto_is_the_fastest_that_fits() -> None:
    shape, small = sized(LLAMA3), sized({**LLAMA3, **TINY})
    auto = TrainConfig(model="m", dtype="bfloat16")

    def chosen(shape: Shape | None, machine: Machine, config: TrainConfig = auto) -> tuple[str, str]:
        found = footprint.resolve(shape, config, machine)
        assert (found.devices, found.micro_tokens) == (machine.devices, 16384)
        return found.parallel, found.activation_checkpointing

    assert chosen(small, Machine(4)) == ("ddp", "off")
    assert chosen(shape, Machine(8, 192 * GB)) == ("fsdp", "off")
    assert chosen(shape, Machine(8)) == ("fsdp", "on")
    assert chosen(shape, Machine(8, 288 * GB), dataclasses.replace(auto, micro_tokens=16384)) == ("fsdp", "off")
    assert chosen(shape, Machine(2)) == ("fsdp", "on")  # nothing fits: the smallest
    assert chosen(shape, Machine(8), dataclasses.replace(auto, lora=16)) == ("ddp", "on")
    assert chosen(shape, Machine(8), dataclasses.replace(auto, optimizer="adamw-8bit")) == ("ddp", "on")
    assert chosen(shape, Machine(8), dataclasses.replace(auto, parallel="ddp")) == ("ddp", "on")
    assert chosen(None, Machine(8)) == ("fsdp", "on")


def flags(line: str) -> dict[str, str]:
    words = line.removeprefix("try ").partition(":")[0].split()
    return {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)
    }


@pytest.mark.parametrize("machine", [Machine(1), Machine(2), Machine(1, 24 * GB), Machine(1, 200 * GB)])
def test_advice_fits_and_can_be_typed(machine: Machine) -> None:
    auto = TrainConfig(model="m", dtype="bfloat16", activation_checkpointing="off", micro_tokens=32768)
    lines = footprint.report(LLAMA3, auto, machine)
    assert any("does not fit" in line for line in lines)
    tried = [line for line in lines if line.startswith("try ")]
    assert tried
    for line in tried:
        values: dict[str, Any] = dict(flags(line))
        wider = dataclasses.replace(machine, devices=int(values.get("devices", machine.devices)))
        decoded: dict[str, Any] = {field.name: int(values[field.name]) if values[field.name].isdigit() else values[field.name]
                   for field in dataclasses.fields(TrainConfig) if field.name in values}  # fmt: skip
        after = footprint.report(LLAMA3, dataclasses.replace(auto, **decoded), wider)
        assert not any("does not fit" in text for text in after), (line, after)
        assert after[0].startswith(line.rpartition(": ")[2])


@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_advice_says_nothing_twice_and_nothing_that_is_so(quantize: str) -> None:
    auto = TrainConfig(
        model="m", dtype="bfloat16", lora=16, quantize=quantize, lora_save="adapter", activation_checkpointing="off",
    )  # fmt: skip
    found = footprint.advice(sized(LLAMA3), auto, Machine(1, 40 * GB))
    assert found and len(set(found)) == len(found)
    assert not any("--parallel ddp" in line or "--lora " in line for line in found)
    least = dataclasses.replace(auto, quantize="4bit", activation_checkpointing="on", micro_tokens=2048)
    assert footprint.advice(sized(LLAMA3), least, Machine(1, 4 * GB)) == []


def test_a_frozen_base_needs_a_much_smaller_gpu() -> None:
    """Two bytes a parameter, half a byte in NF4, against sixteen of a training of all parameters."""
    auto = TrainConfig(model="m", dtype="bfloat16", lora=16)
    four = dataclasses.replace(auto, quantize="4bit", lora_save="adapter")
    assert any("does not fit" in line for line in footprint.report(LLAMA3, auto, Machine(1, 24 * GB)))
    assert footprint.report(LLAMA3, auto, Machine(1, 40 * GB))[-1] == "fits a GPU of 40.0 GB"
    assert footprint.report(LLAMA3, four, Machine(1, 24 * GB))[-1] == "fits a GPU of 24.0 GB"


def test_an_unknown_model_has_no_estimate() -> None:
    assert footprint.report({"model_type": "mamba"}, TrainConfig(model="m"), Machine()) == [
        "no estimate for a mamba of this shape: it is not a plain decoder"
    ]
