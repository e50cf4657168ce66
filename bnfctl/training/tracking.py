"""`--track`: a copy of metrics.jsonl for TensorBoard, Weights & Biases or trackio, through accelerate's trackers.

Nothing here is part of a result: the files lie in log/, and a tracker that fails is left behind while training goes on.
Tests write and read TensorBoard's real event files.  wandb and trackio are tested with a stand-in; by hand they were
run offline (wandb 0.31 with WANDB_MODE=offline, trackio 0.43 with its local store), never against their servers.
No torch at import, so that `check` costs nothing before a training.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bnfctl import console
from bnfctl.errors import UsageError

PROJECT = "bnfctl"
"""Where wandb and trackio list the runs."""
_NAME_FILE = "tracking.json"
_ONE_PROCESS = {
    "local_rank": -1, "pmi_size": 1, "ompi_comm_world_size": 1, "mv2_comm_world_size": 1, "world_size": 1,
    "accelerate_use_sagemaker": "false", "accelerate_cpu_affinity": "false",
}  # fmt: skip
"""What accelerate reads to find out that it is one rank of several."""
_HINTS = {
    "wandb": "`wandb login` first, or WANDB_MODE=offline, or train without --track wandb",
    "tensorboard": "train without --track tensorboard",
    "trackio": "train without --track trackio",
}


def check(names: Iterable[str]) -> None:
    """UsageError unless the package of every tracker is installed; to be asked before anything starts."""
    for name in names:
        try:
            # Not find_spec: wandb leaves a folder `wandb` behind, and Python takes that for a package.
            version(name)
        except PackageNotFoundError:
            hint = f"pip install 'bnfctl[{name}]'"
            raise UsageError(f"{name} is not installed", where=f"--track {name}", hint=hint) from None


class Trackers:
    """The trackers of one training; to be made, used and finished by the main rank alone.

    None of it is collective, and no process group is started, whether one exists already or not.
    """

    def __init__(
        self, names: tuple[str, ...], run_name: str, folder: Path, config: Mapping[str, Any], done: int = 0
    ) -> None:
        """names: as `--track` has them.  folder: of the run's logs, kept when it resumes.

        config: shown with the run; tuples and the like as JSON, nulls left out.
        done: the step that a resumed run starts after; TensorBoard hides what an earlier attempt wrote beyond it.
        Raises UsageError where a tracker cannot start.
        """
        self._started: list[tuple[str, Any]] = []
        if not names:
            return
        run = _lasting_name(folder, run_name)
        settings = {name: _plain(value) for name, value in config.items() if value is not None}
        for name in dict.fromkeys(names):
            try:
                self._started.append((name, _start(name, run, folder, settings, done)))
            except Exception as error:  # every client has errors of its own
                self.finish()
                what = f"{name} does not start: {_first_line(error)}"
                raise UsageError(what, where=f"--track {name}", hint=_HINTS.get(name)) from error

    def log(self, line: Mapping[str, Any]) -> None:
        """The numbers of one line of metrics.jsonl, as train/NAME or test/NAME, at the line's step; nulls left out."""
        values = {f"{line['split']}/{name}": value for name, value in line.items() if name != "step" and _number(value)}
        for name, tracker in list(self._started):
            try:
                tracker.log(values, step=line["step"])
            except Exception as error:  # a lost copy must not end the training
                self._started.remove((name, tracker))
                console.say(f"{name} failed and gets no more: {_first_line(error)}; metrics.jsonl goes on")

    def finish(self) -> None:
        """Hand over what is still buffered; call it at every end of the training, errors and stops included."""
        for name, tracker in self._started:
            try:
                tracker.finish()
            except Exception as error:  # as in `log`
                console.say(f"{name} failed at its end: {_first_line(error)}; metrics.jsonl is whole")
        self._started = []


def _start(name: str, run: str, folder: Path, settings: dict[str, Any], done: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import patch_environment

    if not PartialState._shared_state:
        # The trackers refuse to work without this state.  Told the truth about the ranks, making it could open a
        # process group, set a GPU or change the number of threads; told that there is one process, it does nothing.
        with patch_environment(**_ONE_PROCESS):
            PartialState(cpu=True)
    project, given, fresh = _arguments(name, run, folder, done)
    tracker = LOGGER_TYPE_TO_CLASS[name](project, **given)
    tracker.start()
    if fresh:
        tracker.store_init_configuration(settings)
    return tracker


def _arguments(name: str, run: str, folder: Path, done: int) -> tuple[str, dict[str, Any], bool]:
    """(first argument, the others, whether to store the config) of an accelerate tracker.

    What accelerate calls the run's name is the project of wandb and trackio, and the sub-folder of TensorBoard.
    """
    if name == "tensorboard":
        logs = folder / "tensorboard"
        # It adds a folder for each time that a config is stored.
        fresh = not (logs / run).exists()
        return run, {"logging_dir": logs, **({"purge_step": done + 1} if done else {})}, fresh
    if name == "wandb":
        # Its capture of the console would get in the way of bnfctl's own handling of stdout.
        return PROJECT, {"name": run, "id": run, "resume": "allow", "dir": folder, "settings": {"console": "off"}}, True
    return PROJECT, {"name": run, "resume": "allow"}, True


def _lasting_name(folder: Path, run_name: str) -> str:
    """The run's name with a random end, the same whenever this folder's training resumes.

    The end keeps a training that is made again apart from the first one: servers drop steps they have already.
    """
    file = folder / _NAME_FILE
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError):
        run = f"{run_name.replace('/', '-')}-{uuid.uuid4().hex[:6]}"
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")
        return run


def _plain(value: Any) -> Any:
    """What every tracker can show: a number, a word or a truth value."""
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
