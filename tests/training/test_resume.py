"""A run that was stopped, killed or cut anywhere ends with the bytes of an undisturbed one."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bnfctl import console, durable
from bnfctl.artifact import Artifact, Store
from bnfctl.config import TrainConfig
from bnfctl.errors import BnfctlError, Interrupted
from bnfctl.training import loop, reference
from tests.model.tiny import write_model
from tests.training.data import make_records, train

CONFIG = TrainConfig(model="m", lr=2e-3, batch_size=4, epochs=2, save_every=2, eval_every=3, micro_tokens=40)
RECORDS, TEST_SET = make_records(11), make_records(3, seed=4)
STEPS = 6


class Killed(BaseException):
    """Stands for `kill -9`: nothing in bnfctl catches it."""


def content(work: Path) -> dict[str, str]:
    """SHA-256 of everything that the artifact's digest covers."""
    files = [work / "metrics.jsonl", *(work / "model").rglob("*")]
    return {str(p.relative_to(work)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "UNITS_PER_PART", 1)


def reference_of(work: Path) -> Artifact:
    """The one that a run with a store of its own has made."""
    (artifact,) = Store(work / "home").artifacts("reference")
    assert not artifact.verify() and not list((work / "home" / ".drafts").glob("reference-*/"))
    return artifact


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
    assert (
        resumed == whole
        and reference_of(tmp_path / "a").manifest.digest == reference_of(tmp_path / "b").manifest.digest
    )


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
        assert reference_of(work).manifest.digest == reference_of(undisturbed).manifest.digest, kill_at


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


def test_lost_lines_are_an_error(model_dir: Path, tmp_path: Path) -> None:
    """Not filled up with NUL bytes."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Interrupted):
            train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(lines[:-1])
    with pytest.raises(BnfctlError, match=f"has {len(lines) - 1} bytes, and had {len(lines)} when") as caught:
        train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    assert "--force" in str(caught.value.hint)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines[:-1] and not (tmp_path / "model").exists()


def test_without_checkpoints_a_run_starts_again(model_dir: Path, tmp_path: Path, undisturbed: Path) -> None:
    plain = replace(CONFIG, save_every=0)
    train(plain, model_dir, RECORDS, TEST_SET, tmp_path)
    assert not (tmp_path / "scratch" / "checkpoints").exists()
    train(plain, model_dir, RECORDS, TEST_SET, tmp_path)
    assert content(tmp_path) == content(undisturbed)


def killed_in_the_reference(
    model_dir: Path, work: Path, monkeypatch: pytest.MonkeyPatch, parts: int = 2, **fields: Any
) -> list[str]:
    """Dies when that many parts are there; their names."""
    with monkeypatch.context() as patch:
        original, written = reference.Maker._unit, []

        def unit(*args: Any) -> None:
            if len(written) == parts:
                raise Killed
            original(*args)
            written.append(1)

        patch.setattr(reference.Maker, "_unit", unit)
        with pytest.raises(Killed):
            train(replace(CONFIG, **fields), model_dir, RECORDS, TEST_SET, work)
    return sorted(path.name for path in (work / "home" / ".drafts").rglob("*.parquet"))


def counted_units(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The parts that are made from here on."""
    made: list[list[int]] = []
    original = reference.Maker._unit

    def unit(*args: Any) -> None:
        made.append(args[-1])
        original(*args)

    monkeypatch.setattr(reference.Maker, "_unit", unit)
    return made


def test_a_killed_reference_goes_on_where_it_stopped(
    model_dir: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed_in_the_reference(model_dir, tmp_path, monkeypatch) == ["0000000.parquet", "0000001.parquet"]
    made = counted_units(monkeypatch)
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    assert len(made) >= 3 and made == [[unit] for unit in range(2, 2 + len(made))]
    assert content(tmp_path) == content(undisturbed)
    assert reference_of(tmp_path).manifest.digest == reference_of(undisturbed).manifest.digest


@pytest.mark.parametrize("fields", [{"micro_tokens": 25}, {"share_prompt": False}, {"micro_tokens": 80}])
def test_an_unfinished_reference_of_another_budget_or_layout_is_no_part_of_it(
    fields: dict[str, Any], model_dir: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is in any key, so the draft is the same, but its units are cut otherwise."""
    killed_in_the_reference(model_dir, tmp_path, monkeypatch, **fields)
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    stored = {row["response"]: row["log_odds"] for row in reference_of(tmp_path).rows()}
    exact = {row["response"]: row["log_odds"] for row in reference_of(undisturbed).rows()}
    assert stored.keys() == exact.keys()
    assert all(stored[key] == pytest.approx(exact[key], abs=1e-5) for key in exact)


def test_a_stop_in_the_reference_comes_after_a_part(
    model_dir: Path, tmp_path: Path, undisturbed: Path, stop_signal: Callable[[int], None]
) -> None:
    stop_signal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    assert caught.value.exit_code == 143 and not (tmp_path / "metrics.jsonl").exists()
    assert [p.name for p in (tmp_path / "home" / ".drafts").rglob("*.parquet")] == ["0000000.parquet"]
    console._signal = None
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    assert content(tmp_path) == content(undisturbed)


def test_a_checkpoint_of_another_configuration_is_refused(model_dir: Path, tmp_path: Path) -> None:
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    other = replace(CONFIG, lr=1e-3)
    with pytest.raises(BnfctlError, match="another configuration"):
        train(other, model_dir, RECORDS, TEST_SET, tmp_path)


def test_a_checkpoint_of_another_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """The key has the model's digest, so only a work folder that was put in another's place can hold one."""
    train(CONFIG, model_dir, RECORDS, TEST_SET, tmp_path)
    other = write_model(tmp_path / "wider", intermediate_size=80)
    before = content(tmp_path)
    with pytest.raises(BnfctlError, match="the checkpoint is of another model") as caught:
        train(CONFIG, other, RECORDS, TEST_SET, tmp_path)
    assert "step-000004" in str(caught.value.where) and "remove" in str(caught.value.hint)
    assert content(tmp_path) == before
