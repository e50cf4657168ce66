"""Pipelines: named steps in one YAML file, each run by a child process, each found again when nothing changed.

    name: demo                      # optional: names the artifacts demo.responses, demo.rewards
    vars: {model: lab}
    steps:
      responses: {stage: generate, model: "${vars.model}", prompts: "lab:chat"}
      rewards:   {stage: score, input: responses, rule: lab}
    report: reports/demo            # optional: where the report of all steps goes

A step's input may name an earlier step; everything else is a field of the stage's config.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfctl import console, launch, machine, stages
from bnfctl.artifact import Artifact, Plan, Store
from bnfctl.config import CONFIGS
from bnfctl.errors import BnfctlError, UsageError, nearest
from bnfctl.options import base_type, check_keys, fields, read_yaml, resolve
from bnfctl.recipes import train_recipe

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_TOP = ("name", "vars", "steps", "report")


@dataclass(frozen=True)
class Step:
    """One step: a stage and the config that the file and the variables give it."""

    name: str
    stage: str
    raw: dict[str, Any]
    where: str
    alias: str | None = None
    """The name its artifact gets."""


@dataclass(frozen=True)
class Pipeline:
    """What a file says, variables filled in."""

    steps: list[Step]
    report: Path | None = None
    """Folder for the report of all steps, where one is asked for."""


@dataclass(frozen=True)
class Result:
    """How a step went."""

    step: Step
    artifact: Artifact
    cached: bool
    seconds: float


def read(path: Path, settings: Iterable[str] = ()) -> Pipeline:
    """The pipeline of a file; `settings` are `vars.NAME=VALUE`, as --set gives them."""
    document = read_yaml(path)
    if not isinstance(document, Mapping):
        raise UsageError(
            "expected `vars:` and `steps:`", where=str(path), hint="steps: {NAME: {stage: generate, ...}, ...}"
        )
    for key in document:
        if key not in _TOP:
            raise UsageError(
                f"unknown key '{key}'{nearest(key, _TOP)}", where=str(path), hint=f"known: {', '.join(_TOP)}"
            )
    variables = _variables(document.get("vars") or {}, settings, path)
    steps = document.get("steps")
    if not isinstance(steps, Mapping) or not steps:
        raise UsageError("no steps", where=str(path), hint="steps: {NAME: {stage: generate, ...}, ...}")
    title = document.get("name")
    made = [_step(name, raw, variables, path) for name, raw in steps.items()]
    made = [dataclasses.replace(step, alias=f"{title}.{step.name}") for step in made] if title else made
    folder = _fill(document.get("report"), variables, f"{path}: report")
    if not isinstance(folder, str | None):
        raise UsageError("report names a folder", where=f"{path}: report", hint="report: reports/NAME")
    return Pipeline(made, Path(folder) if folder else None)


def _variables(given: Any, settings: Iterable[str], path: Path) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise UsageError("vars are `name: value` lines", where=str(path), hint="vars: {model: lab}")
    variables = {str(name): value for name, value in given.items()}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.startswith("vars."):
            raise UsageError(f"not a setting: '{setting}'", where="--set", hint="--set vars.NAME=VALUE")
        name = name.removeprefix("vars.")
        if name not in variables:
            known = ", ".join(variables) or "none"
            raise UsageError(
                f"no variable '{name}'{nearest(name, variables)}", where="--set", hint=f"{path} has: {known}"
            )
        variables[name] = value
    return variables


def _step(name: str, raw: Any, variables: Mapping[str, str], path: Path) -> Step:
    where = f"{path}: steps.{name}"
    if not isinstance(raw, Mapping) or "stage" not in raw:
        raise UsageError("a step needs a stage", where=where, hint=f"stage: {' | '.join(CONFIGS)}")
    stage = _fill(raw["stage"], variables, where)
    if stage not in CONFIGS:
        raise UsageError(f"unknown stage '{stage}'{nearest(stage, CONFIGS)}", where=where, hint=", ".join(CONFIGS))
    values = {key: _fill(value, variables, f"{where}.{key}") for key, value in raw.items() if key != "stage"}
    check_keys(CONFIGS[stage], values, where)
    return Step(name, stage, values, where)


def _fill(value: Any, variables: Mapping[str, str], where: str) -> Any:
    if isinstance(value, list):
        return [_fill(item, variables, where) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1).removeprefix("vars.")
        if not match.group(1).startswith("vars.") or name not in variables:
            hint = f"variables: {', '.join(f'${{vars.{known}}}' for known in variables) or 'none'}"
            raise UsageError(f"unknown variable {match.group(0)}", where=where, hint=hint)
        return str(variables[name])

    return _VARIABLE.sub(replace, value)


def _named(step: Step, field: dataclasses.Field[Any]) -> list[str]:
    """What a step gives for an input field: names of steps, references, paths; [] for any other field."""
    value = step.raw.get(field.name)
    if field.metadata["input"] is None or value is None:
        return []
    many = base_type(CONFIGS[step.stage], field.name)[2]
    if many and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    values: list[Any] = value if many and isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        what = "a list of names" if many else "one value"
        raise UsageError(f"{field.name} takes {what}", where=step.where, hint="the name of a step, or a path")
    return values


class Run:
    """One run of a pipeline: its steps in order, and what each of them made."""

    def __init__(self, pipeline: Pipeline, store: Store, *, start: str | None = None, force: bool = False) -> None:
        steps = pipeline.steps
        names = [step.name for step in steps]
        if start is not None and start not in names:
            raise UsageError(
                f"no step '{start}'{nearest(start, names)}", where="--from", hint=f"steps: {', '.join(names)}"
            )
        self.steps, self.store, self.force = steps, store, force
        self.first = names.index(start) if start else 0
        self.made: dict[str, Artifact | None] = {}
        self.results: list[Result] = []
        """Of the steps that are through, whose gates may have failed."""
        self.chosen: list[str] = []
        """What the recipe of a model decided for the step that is being planned."""
        for step in steps:
            self._check_order(step, names)
            self.config(step, placeholders=True)

    def _check_order(self, step: Step, names: list[str]) -> None:
        earlier = {other.name: other.stage for other in self.steps[: names.index(step.name)]}
        for field in fields(CONFIGS[step.stage]):
            wanted = "train" if field.metadata["input"] == "model" else field.metadata["input"]
            for value in _named(step, field):
                if value in names and value not in earlier:
                    raise UsageError(
                        f"{field.name}: step '{value}' does not come before", where=step.where, hint="move it up"
                    )
                if earlier.get(value, wanted) != wanted:
                    raise UsageError(
                        f"{field.name} takes a {wanted} step; '{value}' is a {earlier[value]} step", where=step.where,
                        hint=f"steps that fit: {', '.join(n for n, s in earlier.items() if s == wanted) or 'none yet'}",
                    )  # fmt: skip

    def config(self, step: Step, placeholders: bool = False) -> Any:
        """The step's config, with the names of earlier steps turned into the paths of their artifacts."""
        config: Any
        cls = CONFIGS[step.stage]
        values = dict(step.raw)
        for field in fields(cls):
            named = _named(step, field)
            if named and not placeholders:
                paths = [str(made.path) if (made := self.made.get(name)) else name for name in named]
                values[field.name] = paths if base_type(cls, field.name)[2] else paths[0]
        try:
            config, origin = resolve(cls, values, recipe=train_recipe if step.stage == "train" else None)
        except UsageError as error:
            raise UsageError(error.what, where=f"{step.where} ({error.where})", hint=error.hint) from None
        if not placeholders:
            self.chosen = [f"{name}: {getattr(config, name)} ({by})" for name, by in origin.items() if "recipe" in by]
        return config

    def waits_for(self, step: Step) -> str | None:
        """The earlier step whose artifact this one needs and that is not made yet (in a dry run)."""
        inputs = (name for field in fields(CONFIGS[step.stage]) for name in _named(step, field))
        return next((name for name in inputs if name in self.made and self.made[name] is None), None)

    def plan(self, step: Step, prepare: Any) -> Plan:
        """The step's plan; an error names the step."""
        try:
            return launch.plan(step.stage, self.config(step), self.store, prepare)
        except UsageError as error:
            raise UsageError(error.what, where=f"{step.where} ({error.where})", hint=error.hint) from None

    def dry(self) -> list[tuple[Step, str]]:
        """(step, what would happen) for each step; loads no model, makes nothing."""
        verdicts = []
        for index, step in enumerate(self.steps):
            self.made[step.name], verdict = self._dry_step(index, step)
            verdicts.append((step, verdict))
        return verdicts

    def _dry_step(self, index: int, step: Step) -> tuple[Artifact | None, str]:
        needs = self.waits_for(step)
        if needs is not None:
            return None, f"to be made after {needs}"
        planned = self.plan(step, lambda first: None)
        unresolved = "; ".join(f"{pinned.ref}: {pinned.why}" for pinned in planned.unresolved)
        if unresolved:
            return None, f"to be made; not resolved here: {unresolved}"
        artifact = self.store.get(step.stage, planned.key)
        if artifact is None or (self.force and index >= self.first):
            return None, f"to be made as {step.stage}/{planned.key[:12]}"
        return artifact, f"cached {artifact.ref}"

    def run(self) -> list[Result]:
        """Make or find every step's artifact; the first failure or failed gate ends the run, a rerun resumes there."""
        place = machine.place()
        if place.size > 1:
            hint = "bnfctl run starts its ranks itself, on this machine; for many nodes, give each bnfctl train to the launcher"
            raise UsageError(f"a pipeline under {place.launcher}", where=place.launcher, hint=hint)
        for index, step in enumerate(self.steps):
            result = self._run_step(index, step)
            self.made[step.name] = result.artifact
            self.results.append(result)
            if step.stage == "eval":
                stages.module("eval").check(self.config(step), result.artifact)
        return self.results

    def _run_step(self, index: int, step: Step) -> Result:
        console.check_stop()
        planned = self.plan(step, lambda first: self._prepare(step, first))
        planned.require_resolved(step.where)
        for note in (*planned.notes, *self.chosen):
            console.say(f"[{step.name}] {note}")
        force = self.force and index >= self.first
        found = None if force else self.store.get(step.stage, planned.key)
        if found is not None:
            console.say(f"[{step.name}] cached {found.ref}{launch.engine_note(found)}")
        elif index < self.first:
            raise UsageError(
                f"step '{step.name}' comes before --from and is not made yet", where=step.where,
                hint=f"start earlier: --from {step.name}",
            )  # fmt: skip
        outcome = launch.Outcome(found, True, 0.0) if found is not None else self._make(step, planned, force)
        if step.alias is not None:
            self.store.set_name(step.alias, outcome.artifact.ref)
        return Result(step, outcome.artifact, outcome.cached, outcome.seconds)

    def _make(self, step: Step, planned: Plan, force: bool) -> launch.Outcome:
        console.say(f"[{step.name}] {step.stage} -> {step.stage}/{planned.key[:12]}")
        try:
            return launch.run_child(step.stage, planned.config, planned, self.store, label=step.name, force=force)
        except BnfctlError as error:
            error.where = f"{step.where}; {error.where}" if error.where else step.where
            raise

    def _prepare(self, step: Step, first: stages.Prerequisite) -> Artifact:
        console.say(f"[{step.name}] {first.why}")
        planned = launch.plan(first.stage, first.config, self.store, lambda before: self._prepare(step, before))
        planned.require_resolved(step.where)
        found = self.store.get(first.stage, planned.key)
        return found or self._make(dataclasses.replace(step, stage=first.stage), planned, False).artifact


def headline(artifact: Artifact) -> str:
    """What a step gave, in a few words."""
    summary = artifact.manifest.summary
    if artifact.manifest.stage == "eval":
        return str(stages.module("eval").headline_of(artifact))
    shown = [
        "prompts",
        "candidates",
        "mean_reward",
        "null_rewards",
        "responses",
        "records",
        "train",
        "test",
        "steps",
        "tokens",
    ]
    return ", ".join(f"{name} {summary[name]}" for name in shown if isinstance(summary.get(name), (int, float)))


def table(results: list[Result]) -> str:
    """The table at the end of a run."""
    rows = [
        [
            r.step.name,
            r.step.stage,
            "cached" if r.cached else f"{r.seconds:.1f} s",
            r.artifact.ref,
            headline(r.artifact),
        ]
        for r in results
    ]
    return console.table("", ["step", "stage", "time", "artifact", "result"], rows, right=(2,))


def as_document(results: list[Result]) -> dict[str, Any]:
    """The run as one JSON document."""
    return {
        "steps": [
            {"step": r.step.name, "stage": r.step.stage, "cached": r.cached, "seconds": round(r.seconds, 2),
             "artifact": str(r.artifact.path), "digest": r.artifact.manifest.digest, "summary": r.artifact.manifest.summary}
            for r in results
        ]
    }  # fmt: skip
