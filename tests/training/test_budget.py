"""Out of memory: tried before step 0, and halved by the next start after it happens later."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bnfctl.config import TrainConfig
from bnfctl.errors import BnfctlError
from bnfctl.footprint import Machine
from bnfctl.training import budget, loop, memory, reference, setup
from bnfctl.training.batches import MicroBatch
from bnfctl.training.world import World
from tests.ranks import run_ranks
from tests.training.data import ALONE, at_reference, make_records, moved_run, train

CONFIG = TrainConfig(
    model="m", lr=2e-3, batch_size=6, epochs=2, save_every=1, micro_tokens=128, save_dtype="float32", seed=3
)
RECORDS = make_records(12)


def tokens(batch: MicroBatch) -> int:
    return batch.sequences.input_ids.numel()


def full_above(size: int, original: Callable[..., Any], kind: type[BaseException] = torch.OutOfMemoryError) -> Any:
    """`original`, on a device that takes micro-batches of at most `size` tokens."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        (batch,) = (arg for arg in args if isinstance(arg, MicroBatch))
        if tokens(batch) > size:
            raise kind("CUDA out of memory. Tried to allocate 1 GiB\nand more")
        return original(*args, **kwargs)

    return limited


def test_the_largest_is_tried_and_halved(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = at_reference(model_dir, tmp_path, RECORDS, micro_tokens=512)
    assert budget.probe(run) == 512
    largest = tokens(run.splits["train"].largest())
    monkeypatch.setattr(budget, "backward", full_above(60, budget.backward))
    found = budget.probe(run)
    assert found in (32, 64, 128, 256) and found < 512
    assert tokens(run.splits["train"].largest()) <= 60 < largest
    assert {split.budget for split in run.splits.values()} == {found}
    assert f"out of memory: trying {found} tokens per micro-batch" in capsys.readouterr().err
    assert all(p.grad is None for p in run.policy.parameters()) and not run.optimizer.state
    # It was no smaller than it had to be: twice as much did not fit.
    budget.set_budget(run, 2 * found)
    assert tokens(run.splits["train"].largest()) > 60


def test_a_loss_of_whole_responses_and_one_without_reference_are_tried_too(model_dir: Path, tmp_path: Path) -> None:
    for loss in ("kto", "dpo", "sft", "simpo"):
        run = at_reference(model_dir, tmp_path, RECORDS, loss=loss, micro_tokens=64)
        assert budget.probe(run) == 64 and all(p.grad is None for p in run.policy.parameters())


def test_a_record_that_does_not_fit_alone(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = at_reference(model_dir, tmp_path, RECORDS)
    monkeypatch.setattr(budget, "backward", full_above(5, budget.backward))
    with pytest.raises(BnfctlError, match="longest record does not fit") as caught:
        budget.probe(run)
    assert "--activation-checkpointing on" in str(caught.value.hint) and "--lora" in str(caught.value.hint)


def test_another_error_is_not_taken_for_it(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = at_reference(model_dir, tmp_path, RECORDS)
    monkeypatch.setattr(budget, "backward", full_above(5, budget.backward, RuntimeError))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        budget.probe(run)
    with pytest.raises(RuntimeError, match="CUDA out of memory"), halved(64, tmp_path):
        budget.backward(run.splits["train"].largest())
    assert budget.stored(tmp_path) is None


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (MemoryError("Unable to allocate 2 GiB"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("no"), False),
    ],
)
def test_what_out_of_memory_looks_like(error: Exception, full: bool) -> None:
    assert memory.is_out_of_memory(error) == full


def parameters(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "model" / "model.safetensors")


def test_the_same_command_resumes_with_half(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calm = train(CONFIG, model_dir, RECORDS, [], tmp_path / "calm")
    original, sizes = loop.take_step, []

    def limited_from_step_3(run: setup.Run, positions: list[int], step: int, log: bool) -> dict[str, Any]:
        sizes.append(run.splits["train"].budget)
        if step == 3:
            patch.setattr(loop, "backward", full_above(70, loop.backward))
        return original(run, positions, step, log)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", limited_from_step_3)
        with pytest.raises(BnfctlError, match="out of memory while training on rank 0: CUDA out of memory") as caught:
            train(CONFIG, model_dir, RECORDS, [], tmp_path / "full")
        assert caught.value.exit_code == 1
        assert "the same command resumes, with 64 tokens per micro-batch instead of 128" in str(caught.value.hint)
        assert budget.stored(tmp_path / "full") == 64 and not (tmp_path / "full" / "model").exists()
        assert sizes == [128] * 3
        resumed = train(CONFIG, model_dir, RECORDS, [], tmp_path / "full")
    assert sizes[3:] == [64, 64], "steps 3 and 4"
    assert resumed["provenance"]["resumed_from_step"] == 2
    assert resumed["final"]["objective"] == pytest.approx(calm["final"]["objective"], rel=1e-4)
    found, exact = parameters(tmp_path / "full"), parameters(tmp_path / "calm")
    for name, value in exact.items():
        # AdamW divides a gradient by its own size: where that is 0 but for roundings, they decide the step's sign.
        away = (found[name] - value).abs()
        assert float(away.norm() / value.norm()) < 1e-6, name


def test_a_second_time_halves_again(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "backward", full_above(40, loop.backward))
    for left in (64, 32):
        with pytest.raises(BnfctlError, match="out of memory"):
            train(CONFIG, model_dir, RECORDS, [], tmp_path)
        assert json.loads((tmp_path / budget.FILE).read_text()) == {"micro_tokens": left}
    assert train(CONFIG, model_dir, RECORDS, [], tmp_path)["steps"] == 4


def halved(tokens: int, work: Path) -> AbstractContextManager[None]:
    return budget.halved_when_full(tokens, work, ALONE, "here")


def test_the_budget_never_becomes_nothing(tmp_path: Path) -> None:
    """0 would read as "as configured"."""
    with pytest.raises(BnfctlError, match="out of memory here on rank 0: full"), halved(1, tmp_path):
        raise torch.OutOfMemoryError("full")
    assert budget.stored(tmp_path) == budget.first(tmp_path, CONFIG, ALONE) == 1


def test_the_reference_pass_counts_too(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "forward", full_above(70, reference.forward))
    with pytest.raises(BnfctlError, match="out of memory before step 0 on rank 0") as caught:
        train(CONFIG, model_dir, RECORDS, [], tmp_path)
    assert caught.value.exit_code == 1 and budget.stored(tmp_path) == 64
    assert train(CONFIG, model_dir, RECORDS, [], tmp_path)["steps"] == 4


def test_a_rank_takes_the_budget_of_the_smallest(model_dir: Path, tmp_path: Path) -> None:
    """Everything fits here, but another rank was full, twice."""

    answers = iter([True, True, False])

    class Others(World):
        def any(self, *flags: bool) -> tuple[bool, ...]:
            assert flags == (False,)
            return (next(answers),)

    run = at_reference(model_dir, tmp_path, RECORDS, micro_tokens=256)
    world = Others(run.world.place, run.world.device)
    assert budget.probe(replace(run, world=world)) == 64
    assert next(answers, None) is None and {split.budget for split in run.splits.values()} == {64}


def test_an_error_of_memory_leaves_no_half_line(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "forward", full_above(5, loop.forward))
    with pytest.raises(BnfctlError, match="out of memory while training"):
        train(replace(CONFIG, eval_every=2), model_dir, RECORDS, make_records(3, seed=9), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_the_smaller_of_the_stored_budget_and_the_one_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BnfctlError), halved(64, tmp_path):
        raise torch.OutOfMemoryError("full")
    for asked, first in ((16, 16), (32, 32), (128, 32), (None, 32)):
        assert budget.first(tmp_path, replace(CONFIG, micro_tokens=asked), ALONE) == first
        assert ("32 tokens per micro-batch, not" in capsys.readouterr().err) == (first != asked), asked


@pytest.mark.parametrize("kind", ["cached", "live"])
def test_a_model_that_does_not_fit_is_not_a_matter_of_the_budget(
    kind: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, loaded = setup.load, []

    def full(*args: Any, **kwargs: Any) -> Any:
        loaded.append(1)
        if len(loaded) == (2 if kind == "live" else 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")
        return original(*args, **kwargs)

    monkeypatch.setattr(setup, "load", full)
    with pytest.raises(BnfctlError, match="the model does not fit into memory on rank 0: CUDA out of memory") as caught:
        train(replace(CONFIG, reference=kind), model_dir, RECORDS, [], tmp_path)
    assert caught.value.exit_code == 1 and caught.value.where == str(model_dir)
    assert "--lora 16" in str(caught.value.hint) and "\n" not in str(caught.value)
    assert budget.stored(tmp_path) is None


def test_what_to_do_for_a_model_that_does_not_fit(model_dir: Path) -> None:
    """As --dry-run says it where its estimate agrees; another process may have the memory where it does not."""
    assert memory.remedy(CONFIG, model_dir, Machine(1, 10**6)).startswith("try --")
    assert memory.remedy(CONFIG, model_dir, Machine(1, 10**11)).startswith("free the memory that other processes hold")


def full_on_one_rank(world: World, model: str, home: str, count: int) -> None:
    """Sharded: rank 1 is out of memory in a layer, and rank 0 waits for it in there: rank 1's error must come out."""
    run = moved_run(
        Path(model), Path(home), RECORDS[:count], home=Path(home), world=world, parallel="fsdp", micro_tokens=512
    )[0]
    assert run.sharded and budget.probe(run) == 512
    if not world.main:
        budget.backward = full_above(0, budget.backward)
    kind = BnfctlError if count == 1 else torch.OutOfMemoryError
    with pytest.raises(kind, match="longest record does not fit" if count == 1 else "CUDA out of memory"):
        budget.probe(run)
    raise RuntimeError(f"came out on rank {world.rank}")


@pytest.mark.parametrize("count", [6, 1])
def test_one_full_rank_of_a_sharded_model_does_not_leave_the_others_waiting(
    count: int, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="came out on rank 1"):
        run_ranks(full_on_one_rank, 2, str(model_dir), str(tmp_path / "home"), count, timeout=90)
