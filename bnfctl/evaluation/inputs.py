"""What an evaluation needs before it starts: its tasks and the data they read, each pinned by its content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnfctl import tasks
from bnfctl.artifact import Artifact, Pinned, Store
from bnfctl.config import ABOUT_SERVERS, EvalConfig
from bnfctl.data.sources import pin_data
from bnfctl.errors import UsageError
from bnfctl.model.source import model_dir, pin_model
from bnfctl.options import refuse
from bnfctl.tables import TASKS, load
from bnfctl.tasks.judging import CHARACTERS, JudgedTask, LengthUnit, tokens_of
from bnfctl.tasks.shift_prompts import pin_prompts

AnyTask = tasks.Task | JudgedTask

SHIFTS = "shifts"
NO_JUDGE = "--server http://host:8000/v1, or --judge MODEL to serve one here"
_OPTIONS = {
    "data_dir": "data_dir", "template": "template", "mathverify": "mathverify", "crux_grader": "crux_grader",
    "judge_prompt": "judge_prompt", "verdicts": "generation", "length_unit": "unit", "shift_prompts": "shift_prompts",
}  # fmt: skip
"""Config field -> what the tasks that know it call it."""
_JUDGE = ("judge", "judge_temperature", "judge_tokens", "judge_json", "max_calls", *ABOUT_SERVERS)
_SHIFT = ("reference", "shift_responses")


def check(config: EvalConfig) -> None:
    """UsageError for a combination of flags of which one would change nothing, or that says too little."""
    if config.model is None and not config.responses:
        hint = "bnfctl eval MODEL --tasks ..., or --responses FILE with responses made elsewhere"
        raise UsageError("nothing to evaluate", where="MODEL", hint=hint)
    if len(set(config.tasks)) < len(config.tasks):
        raise UsageError("a task is there twice", where="--tasks", hint="each task once")
    known = set().union(*map(tasks.takes, config.tasks))
    unused = [field for field, option in _OPTIONS.items() if option not in known]
    names = ", ".join(config.tasks)
    refuse(config, unused, f"changes nothing here: no task of {names} takes it")
    judged = list(filter(is_judged, config.tasks))
    if judged and config.model is not None and not (config.server or config.judge):
        raise UsageError(f"{judged[0]} needs a judge", where="--server", hint=NO_JUDGE)
    if not judged:
        refuse(config, _JUDGE, f"changes nothing here: no task of {names} has a judge")
    elif config.judge is not None:
        refuse(config, ["served_model", "api_key_env"], "is for --server; with --judge the server is started here")
        if config.server:
            raise UsageError("--judge starts a server here", where="--server", hint="one of --judge and --server")
    if SHIFTS not in config.tasks:
        refuse(config, _SHIFT, "changes nothing here: it is for --tasks shifts")
    if config.responses and (len(config.tasks) > 1 or SHIFTS in config.tasks):
        what = "--responses are of one task, and shifts need a model's own tokens"
        raise UsageError(what, where="--tasks", hint="--tasks with one name, e.g. gsm8k")


def is_judged(name: str) -> bool:
    """Whether a judge grades the task of that name."""
    return hasattr(load(TASKS, name, "task"), "questions")


def pin_items(config: EvalConfig, store: Store) -> dict[str, Pinned]:
    """The data that the tasks read: items-TASK, and items-TASK-NAME where there is more than one file or data set.

    Where responses are imported, items that cannot be had are left out: many files bring their own.
    """
    found: dict[str, Pinned] = {}
    for name in config.tasks:
        task = load(TASKS, name, "task")
        source = getattr(task, "source", None)
        if source is None or (name == SHIFTS and config.shift_prompts is not None):
            continue
        if config.data_dir is not None:
            _existing(config.data_dir, "--data-dir", "folder")
            files_in = getattr(task, "files_in", lambda folder, source=source: {"": source.local(folder)})
            pins = {part: pin_data(str(path), store, "--data-dir") for part, path in files_in(Path(config.data_dir)).items()}  # fmt: skip
        else:
            sets = {"": source.hub, **getattr(task, "more_sources", {})}
            pins = {part: pin_data(hub, store, "--tasks", source.split) for part, hub in sets.items()}
        found |= {
            f"items-{name}-{part}" if part else f"items-{name}": pinned
            for part, pinned in pins.items()
            if pinned.digest is not None or not config.responses
        }
    return found


def hints_for(config: EvalConfig) -> dict[str, str]:
    """Input -> what to type where the hub cannot be reached."""
    found = {}
    for name in config.tasks:
        source = getattr(load(TASKS, name, "task"), "source", None)
        if source is not None:
            other = "--shift-prompts FILE, or " if name == SHIFTS else ""
            found[f"items-{name}"] = f"{other}--data-dir FOLDER with {source.wanted} in it"
    return found


def _existing(path: str, where: str, what: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise UsageError(f"no such {what} '{path}'", where=where, hint="check the path")
    return found


def pin_files(config: EvalConfig, store: Store) -> dict[str, Pinned]:
    """The files and models that flags name, beside the model."""
    found: dict[str, Pinned] = {}
    for field in ("template", "judge_prompt"):
        path = getattr(config, field)
        if path is not None:
            _existing(path, f"--{field.replace('_', '-')}", "file")
            found[field] = pin_data(path, store, f"--{field.replace('_', '-')}")
    if config.shift_prompts is not None:
        found["shift_prompts"] = pin_prompts(config.shift_prompts, store)
    if config.length_unit != CHARACTERS.name:
        found["length_unit"] = pin_model(config.length_unit, store, "--length-unit")
    if config.judge is not None:
        found["judge"] = pin_model(config.judge, store, "--judge")
    for number, ref in enumerate(config.responses):
        artifact = store.search(ref)
        if artifact is not None:
            store.find(ref, "eval", "--responses")
        pinned = pin_data(ref, store, "--responses") if artifact is None else artifact.pinned()
        if pinned.path is None:
            raise UsageError(f"no such file '{ref}'", where="--responses", hint="a file, or an eval artifact")
        found[f"responses-{number}"] = pinned
    return found


def make_tasks(config: EvalConfig, inputs: Mapping[str, Pinned]) -> dict[str, AnyTask]:
    """The tasks of the config on their pinned data, by name."""
    made: dict[str, AnyTask] = {}
    for name in config.tasks:
        given: dict[str, Any] = {option: getattr(config, field) for field, option in _OPTIONS.items()}
        given["data_dir"] = Path(config.data_dir) if config.data_dir is not None else None
        for field in ("template", "judge_prompt"):
            given[field] = Path(str(inputs[field].path)) if field in inputs else None
        given["shift_prompts"] = inputs.get("shift_prompts")
        given["unit"] = _unit(config, inputs)
        given["pinned"] = inputs.get(f"items-{name}")
        given |= {part: inputs.get(f"items-{name}-{part}") for part in getattr(load(TASKS, name, "task"), "more_sources", ())}  # fmt: skip
        made[name] = tasks.make(name, {**given, "model": _origin(inputs["model"]) if "model" in inputs else ""})
    return made


def _origin(pinned: Pinned) -> str:
    """The name of the model that all training started from: an answer of its kind is read alike before and after."""
    while pinned.kind == "artifact" and pinned.path is not None:
        pinned = Pinned(**Artifact(Path(pinned.path)).manifest.inputs["model"])
    return name_of(pinned)


def _unit(config: EvalConfig, inputs: Mapping[str, Pinned]) -> LengthUnit:
    if "length_unit" not in inputs or inputs["length_unit"].digest is None:
        return CHARACTERS
    from transformers import AutoTokenizer

    folder = model_dir(inputs["length_unit"])
    return tokens_of(AutoTokenizer.from_pretrained(folder), config.length_unit)


def name_of(pinned: Pinned) -> str:
    """What a model is called in rows and tables: without the machine's paths, the same wherever it was evaluated."""
    if pinned.kind == "hub-model":
        return pinned.ref.rpartition("@")[0] or pinned.ref
    return Path(pinned.ref).name if pinned.kind == "folder" else pinned.ref
