"""A run that was stopped, killed or cut anywhere ends with the bytes of an undisturbed one."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bnfctl import console, durable
from bnfctl.config import TrainConfig
from bnfctl.errors import BnfctlError, Interrupted
from bnfctl.training import loop, reference
from bnfctl.training.loop import train
from tests.training.data import make_records

CONFIG = TrainConfig(model="m", lr=2e-3, batch_size=4, epochs=2, save_every=2, eval_every=3, micro_tokens=64)
RECORDS, TEST_SET = make_records(11), make_records(3, seed=4)
STEPS = 6


class Killed(BaseException):
    """Stands for `kill -9`: nothing in bnfctl catches it."""


def content(work: Path) -> dict[str, str]:
    """SHA-256 of everything that the artifact's digest covers."""
    files = [work / "metrics.jsonl", *(work / "model").rglob("*")]
    return {str(p.relative_to(work)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("undisturbed")
    train(CONFIG, model_dir, RECORDS, TEST_SET, work)
    return work


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGTERM that arrives while `step` runs."""
    original = loop.take_step

    def stepping(run: loop.Run, positions: list[int], number: int, log: bool) -> dict[str, object]:
        if number == step:
            monkeypatch.setattr(console, "_signal", signal.SIGTERM)
        return original(run, positions, number, log)

    monkeypatch.setattr(loop, "take_step", stepping)


@pytest.mark.parametrize("step", [1, 3, 4, STEPS])
def test_a_stop_saves_and_the_resumed_run_has_the_same_bytes(
    step: int, model_dir: Path, tmp_path: Path, undisturbed: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Interrupted) as caught:
            train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    assert caught.value.exit_code == 143
    assert [p.name for p in (tmp_path / "scratch" / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    summary = train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    assert summary["provenance"]["resumed_from_step"] == step
    assert content(tmp_path) == content(undisturbed)


def test_the_summary_of_a_resumed_run_is_the_same(model_dir: Path, tmp_path: Path) -> None:
    whole = train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(STEPS, patch)
        with pytest.raises(Interrupted):
            train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path / "b")
    resumed = train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path / "b")
    whole.pop("provenance")
    resumed.pop("provenance")
    assert resumed == whole


def boundaries(body: Callable[[], object], kill_at: int | None) -> int:
    """How many durable steps `body` passes; it dies at number `kill_at`."""
    passed = 0

    def boundary(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == kill_at:
            raise Killed(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "boundary", boundary)
        body()
    return passed


def test_killed_along_the_durable_steps(model_dir: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Before and after fsyncs and renames of the reference, checkpoints and the model: every third of them."""
    total = boundaries(lambda: train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path / "count"), None)
    assert total > 20
    for kill_at in range(1, total + 1, 3):
        work = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            boundaries(lambda work=work: train(CONFIG, model_dir, RECORDS, TEST_SET, work), kill_at)  # type: ignore[misc]
        train(CONFIG, model_dir, RECORDS, TEST_SET, work)
        assert content(work) == content(undisturbed), kill_at


def test_lines_after_the_checkpoint_are_cut(model_dir: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Dying between two checkpoints leaves lines that the resumed run writes again."""
    original = loop.take_step

    def stepping(run: loop.Run, positions: list[int], number: int, log: bool) -> dict[str, object]:
        if number == 4:
            raise Killed
        return original(run, positions, number, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", stepping)
        with pytest.raises(Killed):
            train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text().count('"split": "train"') == 3
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "spl')
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    assert content(tmp_path) == content(undisturbed)


def test_without_checkpoints_a_run_starts_again(model_dir: Path, tmp_path: Path, undisturbed: Path) -> None:
    plain = TrainConfig(**{**vars(CONFIG), "save_every": 0})
    train(plain, model_dir, RECORDS, TEST_SET, tmp_path)
    assert not (tmp_path / "scratch" / "checkpoints").exists()
    train(plain, model_dir, RECORDS, TEST_SET, tmp_path)
    assert content(tmp_path) == content(undisturbed)


def test_the_stored_reference_is_used_again(model_dir: Path, tmp_path: Path) -> None:
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "compute", lambda *args: calls.append(args))
        train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
        assert not calls
    (tmp_path / "scratch" / "checkpoints").rename(tmp_path / "gone")
    before = (tmp_path / "scratch" / "reference.safetensors").read_bytes()
    train(CONFIG, model_dir, RECORDS[:-1], TEST_SET, tmp_path)
    assert (tmp_path / "scratch" / "reference.safetensors").read_bytes() != before


def test_a_checkpoint_of_another_configuration_is_refused(model_dir: Path, tmp_path: Path) -> None:
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    other = TrainConfig(**{**vars(CONFIG), "lr": 1e-3})
    with pytest.raises(BnfctlError, match="another configuration"):
        train(other, model_dir, RECORDS, TEST_SET, tmp_path)
