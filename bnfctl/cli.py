"""The command line: one command per stage, made from its config class, and verbs for pipelines and the store.

stdout is one line (the artifact's path) or, with --json, one document; everything else goes to stderr.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any

import typer

from bnfctl import __version__, console, machine
from bnfctl.artifact import KINDS, Store
from bnfctl.config import CONFIGS, train_recipe
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.options import allowed, base_type, fields, flag_name, resolve

app = typer.Typer(
    name="bnfctl",
    help="Align a language model with the Bidirectional Negative Feedback loss, as simply as fine-tuning it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_HOME_DEFAULT = "artifacts"
_TO_STDOUT = {"-h", "--help", "--show-completion", "--install-completion"}
"""What typer itself prints to stdout."""

# Typer carries its own copy of click from 0.26 on: whichever it is, this is its base error.
_ClickError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _store(home: str | None) -> Store:
    return Store(Path(home or os.environ.get("BNFCTL_HOME") or _HOME_DEFAULT))


def _complete_artifact(stage: str | None) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        store = _store(None)
        refs = [artifact.ref for artifact in store.artifacts(stage)]
        names = [name for name, ref in store.names().items() if stage is None or ref.startswith(f"{stage}/")]
        return [word for word in (*names, *refs) if word.startswith(incomplete)]

    return complete


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
        return _complete_artifact(kind)
    return _complete_artifact("train") if kind == "model" else None


_Home = Annotated[str | None, typer.Option("--home", help="Artifact store [env BNFCTL_HOME; default ./artifacts].")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and why; load no model.")]
_Force = Annotated[bool, typer.Option("--force", help="Make it again even if it is there.")]
_Stage = Annotated[
    str | None, typer.Argument(help="Only this stage, or reference.", autocompletion=lambda: list(KINDS))
]
_Ref = Annotated[str, typer.Argument(help="Name, stage/key or path.", autocompletion=_complete_artifact(None))]
_Refs = Annotated[
    list[str], typer.Argument(help="Names, stage/keys or paths.", autocompletion=_complete_artifact(None))
]
_COMMON: dict[str, Any] = {
    "config_file": Annotated[Path | None, typer.Option("--config", help="YAML with any of these fields; flags win.")],
    "name": Annotated[str | None, typer.Option("--name", help="Give the artifact a name.")],
    "home": _Home,
    "dry_run": _DryRun,
    "force": _Force,
    "as_json_output": _Json,
}


def _parameter(cls: type, field: Field[Any]) -> inspect.Parameter:
    """The typer parameter of a config field; its value stays text, to be decoded by the declared type."""
    kind, _, many = base_type(cls, field.name)
    words = allowed(field)
    text = field.metadata["help"]
    if words is not None and len(words) <= 8:
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
    store = _store(home)
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
    home: _Home = None,
    dry_run: _DryRun = False,
    force: _Force = False,
    as_json_output: _Json = False,
) -> None:
    """Run a pipeline: each step in a child process; what is there already is not made again."""
    from bnfctl import pipeline, stages

    work = pipeline.Run(pipeline.read(file, settings or ()), _store(home), start=start, force=force)
    if dry_run:
        verdicts = work.dry()
        document = [{"step": step.name, "stage": step.stage, "verdict": verdict} for step, verdict in verdicts]
        listed = console.table("", ["step", "stage", "verdict"], [list(row.values()) for row in document])
        console.emit(json.dumps(document, indent=2) if as_json_output else listed)
        return
    results = work.run()
    console.say(pipeline.table(results))
    for result in results:
        if result.step.stage == "eval" and "base" in result.artifact.manifest.inputs:
            console.say(f"\n{result.step.name}: gain over the base on the same items")
            console.say(stages.module("eval").table_of(result.artifact))
    last = str(results[-1].artifact.path)
    console.emit(json.dumps(pipeline.as_document(results), indent=2, ensure_ascii=False) if as_json_output else last)


@app.command("ls")
def ls_(stage: _Stage = None, home: _Home = None, as_json_output: _Json = False) -> None:
    """List artifacts: what they are, how large, what they gave."""
    from bnfctl import browse

    if stage is not None and stage not in KINDS:
        raise UsageError(f"unknown stage '{stage}'", where="STAGE", hint=f"one of: {', '.join(KINDS)}")
    rows = browse.ls(_store(home), stage)
    console.emit(json.dumps(rows, indent=2) if as_json_output else browse.ls_table(rows))


@app.command()
def show(
    ref: _Ref,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, metavar="N", help="The first N rows, as JSON lines.")
    ] = None,
    lineage: Annotated[bool, typer.Option("--lineage", help="What it was made from.")] = False,
    home: _Home = None,
    as_json_output: _Json = False,
) -> None:
    """Show an artifact: config, inputs, result; or its rows; or its lineage."""
    from dataclasses import asdict

    from bnfctl import browse, stages

    store = _store(home)
    artifact = store.find(ref, where="REF")
    if rows is not None:
        lines = browse.rows(artifact, rows)
        if as_json_output:
            console.emit(json.dumps([json.loads(line) for line in lines], ensure_ascii=False))
        else:
            for line in lines:
                console.emit(line)
    elif lineage:
        tree = browse.lineage(artifact, store)
        console.emit(json.dumps(tree, indent=2) if as_json_output else "\n".join(browse.lineage_lines(tree)))
    else:
        document, more = asdict(artifact.manifest), ""
        if artifact.manifest.stage == "build":
            from bnfctl.analysis import preferences

            document["report"] = preferences.report(artifact)
            more = "\n\n" + preferences.as_text(document["report"])
        elif artifact.manifest.stage == "eval":
            more = "\n" + stages.module("eval").table_of(artifact)
        text = json.dumps(document, indent=2, ensure_ascii=False) if as_json_output else browse.show(artifact) + more
        console.emit(text)


@app.command()
def export(
    ref: _Ref, path: Annotated[Path, typer.Argument(help="FILE.parquet, FILE.jsonl, or a folder for load_dataset.")],
    layout: Annotated[
        str, typer.Option("--format", help="preference: pairs; unpaired: single responses with a label.")
    ] = "preference",
    force: Annotated[bool, typer.Option("--force", help="Replace what an export left there.")] = False,
    home: _Home = None, as_json_output: _Json = False,
) -> None:  # fmt: skip
    """Write a build as a TRL preference or unpaired set, which `datasets` and `bnfctl build` read."""
    from bnfctl.data import exports

    done = exports.export(_store(home).find(ref, "build", "REF"), path, layout, force)
    console.say(done.line)
    console.emit(json.dumps(done.__dict__) if as_json_output else done.path)


@app.command()
def verify(refs: Annotated[list[str] | None, typer.Argument(help="Artifacts; default all.")] = None,
           home: _Home = None, as_json_output: _Json = False) -> None:  # fmt: skip
    """Hash artifacts again: a flipped byte, a missing file, a changed input."""
    from bnfctl import browse

    problems = browse.verify(_store(home), refs or [])
    bad = {ref: found for ref, found in problems.items() if found}
    if as_json_output:
        console.emit(json.dumps(problems, indent=2))
    else:
        console.emit(
            "\n".join(f"{ref}: {'; '.join(found) or 'ok'}" for ref, found in problems.items()) or "no artifacts"
        )
    if bad:
        hint = f"bnfctl rm {next(iter(bad))} --force, then the command that made it"
        raise BnfctlError(
            f"{len(bad)} of {len(problems)} artifacts are not what they were", where=next(iter(bad)), hint=hint
        )


@app.command()
def rm(refs: _Refs, force: Annotated[bool, typer.Option("--force", help="Even if others were made from it.")] = False,
       home: _Home = None, as_json_output: _Json = False) -> None:  # fmt: skip
    """Delete artifacts and their names."""
    from bnfctl import browse

    gone = browse.rm(_store(home), refs, force)
    console.emit(json.dumps({"removed": gone}) if as_json_output else "\n".join(f"removed {ref}" for ref in gone))


@app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Free it without asking.")] = False,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Only old checkpoints; drafts stay resumable.")
    ] = False,
    home: _Home = None,
    as_json_output: _Json = False,
) -> None:
    """Free unfinished drafts and old checkpoints, after saying what that would free."""
    from bnfctl import browse

    found, busy = browse.waste(_store(home), checkpoints)
    total = browse.human(sum(item.bytes for item in found))
    for name in busy:
        console.say(f"in use: {name}")
    for item in found:
        console.say(f"{browse.human(item.bytes):>10}  {item.what}")
    if not found:
        console.say("nothing to free")
    elif not yes and not (sys.stdin.isatty() and typer.confirm(f"free {total}?", err=True)):
        console.say(f"would free {total}; nothing was freed (--yes frees it)")
        found = []
    freed = browse.free(found)
    console.emit(json.dumps({"freed_bytes": freed}) if as_json_output else f"freed {browse.human(freed)}")


@app.command()
def doctor(home: _Home = None, as_json_output: _Json = False) -> None:
    """Say what this machine can do, and how to install what is missing."""
    from dataclasses import asdict

    from bnfctl import doctor as doctor_

    findings = list(doctor_.examine(_store(home).home))
    document = json.dumps([asdict(finding) for finding in findings], indent=2)
    console.emit(document if as_json_output else doctor_.as_table(findings))


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


def main() -> None:
    """Run the app; every error of ours becomes three lines and an exit code, never a traceback."""
    if "_BNFCTL_COMPLETE" in os.environ or len(sys.argv) == 1 or _TO_STDOUT & set(sys.argv):
        app()
    console.claim_stdout()
    console.catch_signals()
    try:
        code = app(standalone_mode=False) or 0
    except BnfctlError as error:
        code = _fail(error)
    except OSError as error:
        hint = "check the path, its permissions and the free disk; the same command resumes"
        code = _fail(BnfctlError(error.strerror or str(error), where=str(error.filename or "--home"), hint=hint))
    except typer.Abort:
        code = 1
    except _ClickError as error:
        code = _fail(UsageError(error.format_message(), hint="bnfctl --help, or bnfctl COMMAND --help"))
    machine.leave(code)


def _fail(error: BnfctlError) -> int:
    if machine.follows():
        return error.exit_code  # rank 0 says it
    console.report(error)
    if "--json" in sys.argv and not console.has_emitted():
        console.emit(json.dumps(error.as_dict(), ensure_ascii=False))
    return error.exit_code
