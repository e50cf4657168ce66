"""The command line: one command per stage, made from its config class, and verbs for pipelines and the store.

stdout is one line (the artifact's path) or, with --json, one document; everything else goes to stderr.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any

import typer

from bnfctl import __version__, console, machine, verbs
from bnfctl.config import CONFIGS
from bnfctl.errors import BnfctlError, GateError, UsageError
from bnfctl.options import allowed, base_type, fields, flag_name, resolve
from bnfctl.recipes import train_recipe
from bnfctl.verbs import DryRun, Force, Home, Json, complete_artifact, open_store

app = typer.Typer(
    name="bnfctl",
    help="Align a language model with the Bidirectional Negative Feedback loss, as simply as fine-tuning it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MANY = "--responses"
"""The flag that takes all files that follow it."""
_TO_STDOUT = {"-h", "--help", "--show-completion", "--install-completion"}
"""What typer itself prints to stdout."""

# Typer carries its own copy of click from 0.26 on: whichever it is, this is its base error.
_ClickError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _completion(field: Field[Any]) -> Callable[[str], list[str]] | None:
    words = allowed(field)
    if words is not None:
        listed = words

        def complete(incomplete: str) -> list[str]:
            before, comma, last = incomplete.rpartition(",")
            return [f"{before}{comma}{word}" for word in listed if word.startswith(last)]

        return complete
    kind = field.metadata["input"]
    if kind in CONFIGS:
        return complete_artifact(kind)
    return complete_artifact("train") if kind == "model" else None


_COMMON: dict[str, Any] = {
    "config_file": Annotated[Path | None, typer.Option("--config", help="YAML with any of these fields; flags win.")],
    "name": Annotated[str | None, typer.Option("--name", help="Give the artifact a name.")],
    "home": Home,
    "dry_run": DryRun,
    "force": Force,
    "as_json_output": Json,
}


def _parameter(cls: type, field: Field[Any]) -> inspect.Parameter:
    """The typer parameter of a config field; its value stays text, to be decoded by the declared type."""
    kind, _, many = base_type(cls, field.name)
    words = allowed(field)
    text = field.metadata["help"]
    if words is not None and len(words) <= 12:
        text += f" One of: {', '.join(words)}."
    if field.default not in (MISSING, None, ()):
        text += f" [default: {field.default}]"
    shared: dict[str, Any] = {"help": text, "show_default": False, "autocompletion": _completion(field)}
    hint: Any
    if field.metadata["positional"]:
        hint = Annotated[str | None, typer.Argument(**shared)]
    elif kind is bool:
        hint = Annotated[
            bool | None, typer.Option(f"{flag_name(field.name)}/--no-{flag_name(field.name)[2:]}", **shared)
        ]
    elif many:
        hint = Annotated[list[str] | None, typer.Option(flag_name(field.name), metavar=kind.__name__.upper(), **shared)]
    else:
        hint = Annotated[str | None, typer.Option(flag_name(field.name), metavar=kind.__name__.upper(), **shared)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)


def _add_stage(stage: str, cls: type) -> None:
    def command(**given: Any) -> None:
        common = {name: given.pop(name) for name in _COMMON}
        flags = {name: _joined(cls, name, value) for name, value in given.items() if value not in (None, [])}
        _run_stage(stage, cls, flags, **common)

    parameters = [_parameter(cls, field) for field in fields(cls)]
    for name, hint in _COMMON.items():
        default = False if name in ("dry_run", "force", "as_json_output") else None
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(stage, help=inspect.getdoc(cls))(command)


def _joined(cls: type, name: str, value: Any) -> Any:
    """A repeated flag as one list, each of its values split at commas."""
    if not base_type(cls, name)[2]:
        return value
    return [part.strip() for item in value for part in item.split(",") if part.strip()]


def _run_stage(
    stage: str, cls: type, flags: dict[str, Any], *, config_file: Path | None, name: str | None, home: str | None,
    dry_run: bool, force: bool, as_json_output: bool,
) -> None:  # fmt: skip
    from bnfctl import launch, stages

    recipe = train_recipe if stage == "train" else None
    config: Any
    config, origin = resolve(cls, flags, config_file, recipe)
    store = open_store(home)
    if dry_run and machine.follows():
        return
    if dry_run:
        from bnfctl import dryrun

        document = dryrun.describe(launch.plan(stage, config, store, lambda first: None), origin, store, force)
        console.emit(json.dumps(document, indent=2, ensure_ascii=False) if as_json_output else dryrun.as_text(document))
        return
    if machine.follows():
        launch.follow(config, force=force)
        return
    for field, source in origin.items():
        if source.startswith("recipe"):
            console.say(f"{field}: {getattr(config, field)} ({source})")
    outcome = launch.execute(stage, config, store, force=force, name=name)
    if stage == "eval":
        console.say(stages.module("eval").table_of(outcome.artifact))
    if as_json_output:
        manifest = outcome.artifact.manifest
        console.emit(
            json.dumps(
                {"artifact": str(outcome.artifact.path), "ref": outcome.artifact.ref, "cached": outcome.cached,
                 "key": manifest.key, "digest": manifest.digest, "summary": manifest.summary},
                indent=2, ensure_ascii=False,
            )
        )  # fmt: skip
    else:
        console.emit(str(outcome.artifact.path))
    if stage == "eval":
        stages.module("eval").check(config, outcome.artifact)


for _stage_name, _cls in CONFIGS.items():
    _add_stage(_stage_name, _cls)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="Pipeline YAML.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="vars.NAME=VALUE", help="Change a variable.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Start here; earlier steps must be made.")
    ] = None,
    home: Home = None,
    dry_run: DryRun = False,
    force: Force = False,
    as_json_output: Json = False,
) -> None:
    """Run a pipeline: each step in a child process; what is there already is not made again."""
    from bnfctl import pipeline, stages

    asked, store = pipeline.read(file, settings or ()), open_store(home)
    work = pipeline.Run(asked, store, start=start, force=force)
    if asked.report is not None:  # better now than after hours of work
        from bnfctl import report

        report.check_folder(asked.report)
    if dry_run:
        verdicts = work.dry()
        document = [{"step": step.name, "stage": step.stage, "verdict": verdict} for step, verdict in verdicts]
        listed = console.table("", ["step", "stage", "verdict"], [list(row.values()) for row in document])
        console.emit(json.dumps(document, indent=2) if as_json_output else listed)
        return
    short = None
    try:
        work.run()
    except GateError as error:
        short = error  # all the more reason to look at what was measured
    console.say(pipeline.table(work.results))
    for result in work.results:
        if result.step.stage == "eval" and "base" in result.artifact.manifest.inputs:
            console.say(f"\n{result.step.name}: gain over the base on the same items")
            console.say(stages.module("eval").table_of(result.artifact))
    summary = pipeline.as_document(work.results)
    if asked.report is not None:
        written = report.write([result.artifact for result in work.results], store, asked.report)
        summary["report"] = str(written.index)
        console.say(f"report: {written.index}")
    last = str(work.results[-1].artifact.path)
    console.emit(json.dumps(summary, indent=2, ensure_ascii=False) if as_json_output else last)
    if short is not None:
        raise short


for _verb_name, _verb in verbs.VERBS.items():
    app.command(_verb_name)(_verb)


def _version(value: bool) -> None:
    if value:
        console.emit(__version__)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "train" and machine.follows():
        raise typer.Exit  # only training is for many ranks: rank 0 does everything else


def spelled_out(words: Sequence[str]) -> list[str]:
    """The command line with a flag of its own for each file of `--responses *.json`, which a shell makes many words."""
    found: list[str] = []
    many = False
    for word in words:
        if word.startswith("-"):
            many = word.partition("=")[0] == _MANY
        elif many and found[-1] != _MANY and Path(word).is_file():
            found.append(_MANY)
        found.append(word)
    return found


def main() -> None:
    """Run the app; every error of ours becomes three lines and an exit code, never a traceback."""
    if "_BNFCTL_COMPLETE" in os.environ or len(sys.argv) == 1 or _TO_STDOUT & set(sys.argv):
        app()
    console.claim_stdout()
    console.catch_signals()
    try:
        code = app(spelled_out(sys.argv[1:]), standalone_mode=False) or 0
    except BnfctlError as error:
        code = _fail(error)
    except OSError as error:
        hint = "check the path, its permissions and the free disk; the same command resumes"
        code = _fail(BnfctlError(error.strerror or str(error), where=str(error.filename or "--home"), hint=hint))
    except typer.Abort:
        code = 1
    except _ClickError as error:
        command = next((word for word in sys.argv[1:2] if word in {*CONFIGS, *verbs.VERBS, "run"}), None)
        code = _fail(
            UsageError(error.format_message(), hint=f"bnfctl {command} --help" if command else "bnfctl --help")
        )
    machine.leave(code)


def _fail(error: BnfctlError) -> int:
    if machine.follows():
        return error.exit_code  # rank 0 says it
    console.report(error)
    if "--json" in sys.argv and not console.has_emitted():
        console.emit(json.dumps(error.as_dict(), ensure_ascii=False))
    return error.exit_code
