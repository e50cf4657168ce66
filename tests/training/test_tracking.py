"""Trackers: real event files, one process and one rank of two; wandb and trackio by a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState, tracking

from bnfctl.errors import UsageError
from bnfctl.training import tracking as ours
from bnfctl.training.tracking import Trackers, check
from bnfctl.training.world import World
from tests.ranks import run_ranks

CONFIG = {"lr": 5e-7, "loss": "simpo", "loss_arg": ("beta=10",), "lora_alpha": None, "share_prompt": True}


def train_line(step: int, objective: float) -> dict[str, Any]:
    return {"step": step, "split": "train", "objective": objective, "margin": None, "tokens": 12}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) of the one run in a folder of logs, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [run] = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def no_state() -> Iterator[None]:
    """As in a new process: accelerate knows nothing yet."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


class Recorder(tracking.GeneralTracker):
    """In the place of wandb or trackio: keeps what it is given, and fails on demand."""

    name, requires_logging_directory = "wandb", False
    made: list[Recorder]
    broken: str = ""

    def __init__(self, project: str, **given: Any) -> None:
        super().__init__()
        self.project, self.given, self.lines = project, given, []
        self.config: dict[str, Any] = {}
        self.ended = False

    def __init_subclass__(cls) -> None:
        cls.made = []

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.fail("start")
        self.made.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.fail("log")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.fail("finish")
        self.ended = True

    def fail(self, where: str) -> None:
        if self.broken == where:
            raise ConnectionError("no way\nthrough")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    class Fresh(Recorder):
        pass

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Fresh)
    return Fresh


def test_event_files_hold_every_number_at_its_step(tmp_path: Path, no_state: None) -> None:
    trackers = Trackers(("tensorboard",), "train/abc", tmp_path, CONFIG)
    trackers.log(train_line(1, 0.5))
    trackers.log(train_line(2, 0.25))
    trackers.log({"step": 2, "split": "test", "objective": 0.75, "margin": -1.5})
    trackers.finish()
    assert scalars(tmp_path) == {
        "train/objective": [(1, 0.5), (2, 0.25)],
        "train/tokens": [(1, 12.0), (2, 12.0)],
        "test/objective": [(2, 0.75)],
        "test/margin": [(2, -1.5)],
    }
    [stored] = tmp_path.rglob("hparams.yml")
    assert "simpo" in stored.read_text() and "lora_alpha" not in stored.read_text()


def test_a_resumed_run_goes_on_in_the_same_place_and_hides_what_it_repeats(tmp_path: Path, no_state: None) -> None:
    first = Trackers(("tensorboard",), "train/abc", tmp_path, CONFIG)
    for step in (1, 2, 3):
        first.log(train_line(step, 1.0))
    first.finish()
    second = Trackers(("tensorboard",), "train/abc", tmp_path, CONFIG, done=2)
    second.log(train_line(3, 0.5))
    second.finish()
    assert scalars(tmp_path)["train/objective"] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert len(list(tmp_path.rglob("hparams.yml"))) == 1


def test_one_rank_under_a_launcher_starts_no_process_group(
    tmp_path: Path, no_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    # Joining would wait for the other rank until a timeout.
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **given: pytest.fail("a process group was started"))
    threads = torch.get_num_threads()
    Trackers(("tensorboard",), "run", tmp_path, {}).finish()
    assert torch.get_num_threads() == threads
    assert {name: os.environ.get(name) for name in told} == told
    assert "PMI_SIZE" not in os.environ


def only_the_main_rank_tracks(world: World, folder: str) -> None:
    os.environ.update(RANK=str(world.rank), LOCAL_RANK=str(world.rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    if world.main:
        trackers = Trackers(("tensorboard",), "run", Path(folder), CONFIG)
    for step in (1, 2):
        total = torch.tensor([float(world.rank + step)])
        dist.all_reduce(total)
        if world.main:
            trackers.log(train_line(step, total.item()))
    if world.main:
        trackers.finish()
    dist.barrier()
    assert dist.get_world_size() == 2 and dist.get_backend() == "gloo"


def test_the_main_rank_of_two_tracks_without_the_other(tmp_path: Path) -> None:
    run_ranks(only_the_main_rank_tracks, 2, str(tmp_path), timeout=120)
    assert scalars(tmp_path)["train/objective"] == [(1, 3.0), (2, 5.0)]


def test_wandb_and_trackio_get_a_name_that_lasts_as_long_as_the_logs(tmp_path: Path, recorder: type[Recorder]) -> None:
    for logs in ("one", "one", "two"):
        trackers = Trackers(("wandb", "trackio"), "train/abc", tmp_path / logs, CONFIG)
        trackers.log(train_line(7, 0.5))
        trackers.finish()
    wandb, trackio, resumed, _, other, _ = recorder.made
    assert wandb.project == trackio.project == "bnfctl"
    assert wandb.given["id"] == wandb.given["name"] == trackio.given["name"]
    assert wandb.given["id"].startswith("train-abc-")
    assert wandb.given["resume"] == trackio.given["resume"] == "allow"
    assert wandb.given["dir"] == tmp_path / "one"
    assert resumed.given["id"] == wandb.given["id"] != other.given["id"]
    assert wandb.lines == trackio.lines == [(7, {"train/objective": 0.5, "train/tokens": 12})]
    assert wandb.config == {"lr": 5e-7, "loss": "simpo", "loss_arg": '["beta=10"]', "share_prompt": True}
    assert wandb.ended and trackio.ended


def test_a_tracker_that_does_not_start_ends_the_run_before_it_begins(tmp_path: Path, recorder: type[Recorder]) -> None:
    class Offline(recorder):  # type: ignore[misc, valid-type]
        broken = "start"

    tracking.LOGGER_TYPE_TO_CLASS["wandb"] = Offline
    with pytest.raises(UsageError, match=r"wandb does not start: no way$") as caught:
        Trackers(("trackio", "wandb"), "run", tmp_path, {})
    assert caught.value.where == "--track wandb" and "wandb login" in str(caught.value.hint)
    assert [started.ended for started in recorder.made] == [True]


@pytest.mark.parametrize("moment", ["log", "finish"])
def test_a_tracker_that_fails_later_is_left_behind(
    tmp_path: Path, recorder: type[Recorder], capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    class Flaky(recorder):  # type: ignore[misc, valid-type]
        broken = moment

    tracking.LOGGER_TYPE_TO_CLASS["trackio"] = Flaky
    trackers = Trackers(("trackio", "wandb"), "run", tmp_path, {})
    for step in (1, 2):
        trackers.log(train_line(step, 0.5))
    trackers.finish()
    [steady] = recorder.made
    assert [step for step, _ in steady.lines] == [1, 2] and steady.ended
    assert capsys.readouterr().err.count("trackio failed") == 1


def test_no_trackers_touch_nothing(tmp_path: Path) -> None:
    trackers = Trackers((), "run", tmp_path / "log", CONFIG)
    trackers.log(train_line(1, 0.5))
    trackers.finish()
    assert not (tmp_path / "log").exists()


def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "wandb":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(ours, "version", version)
    (tmp_path / "wandb").mkdir()  # wandb's own folder of logs is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    check(("tensorboard", "trackio"))
    with pytest.raises(UsageError, match="wandb is not installed") as caught:
        check(("tensorboard", "wandb"))
    assert caught.value.hint == "pip install 'bnfctl[wandb]'"


def test_check_loads_neither_torch_nor_accelerate() -> None:
    code = (
        "import sys\nfrom bnfctl.training.tracking import check\ncheck(['tensorboard'])\n"
        "assert not {'torch', 'accelerate', 'tensorboard'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
