"""The verbs for the store: list, show, export, report, verify, delete; and what they share with the stages' commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bnfctl import console
from bnfctl.artifact import KINDS, Store
from bnfctl.errors import BnfctlError, UsageError

_HOME_DEFAULT = "artifacts"


def open_store(home: str | None) -> Store:
    """The store of --home, $BNFCTL_HOME or ./artifacts."""
    return Store(Path(home or os.environ.get("BNFCTL_HOME") or _HOME_DEFAULT))


def complete_artifact(stage: str | None) -> Callable[[str], list[str]]:
    """Completion of names and stage/keys."""

    def complete(incomplete: str) -> list[str]:
        store = open_store(None)
        refs = [artifact.ref for artifact in store.artifacts(stage)]
        names = [name for name, ref in store.names().items() if stage is None or ref.startswith(f"{stage}/")]
        return [word for word in (*names, *refs) if word.startswith(incomplete)]

    return complete


Home = Annotated[str | None, typer.Option("--home", help="Artifact store [env BNFCTL_HOME; default ./artifacts].")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and why; load no model.")]
Force = Annotated[bool, typer.Option("--force", help="Make it again even if it is there.")]
Stage = Annotated[str | None, typer.Argument(help="Only this stage, or reference.", autocompletion=lambda: list(KINDS))]
Ref = Annotated[str, typer.Argument(help="Name, stage/key or path.", autocompletion=complete_artifact(None))]
Refs = Annotated[list[str], typer.Argument(help="Names, stage/keys or paths.", autocompletion=complete_artifact(None))]


def ls(stage: Stage = None, home: Home = None, as_json_output: Json = False) -> None:
    """List artifacts: what they are, how large, what they gave."""
    from bnfctl import browse

    if stage is not None and stage not in KINDS:
        raise UsageError(f"unknown stage '{stage}'", where="STAGE", hint=f"one of: {', '.join(KINDS)}")
    rows = browse.ls(open_store(home), stage)
    console.emit(json.dumps(rows, indent=2) if as_json_output else browse.ls_table(rows))


def show(
    ref: Ref,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, metavar="N", help="The first N rows, as JSON lines.")
    ] = None,
    lineage: Annotated[bool, typer.Option("--lineage", help="What it was made from.")] = False,
    home: Home = None,
    as_json_output: Json = False,
) -> None:
    """Show an artifact: config, inputs, result; or its rows; or its lineage."""
    from dataclasses import asdict

    from bnfctl import browse, stages

    store = open_store(home)
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


def export(
    ref: Ref, path: Annotated[Path, typer.Argument(help="FILE.parquet, FILE.jsonl, or a folder for load_dataset.")],
    layout: Annotated[
        str, typer.Option("--format", help="preference: pairs; unpaired: single responses with a label.")
    ] = "preference",
    force: Annotated[bool, typer.Option("--force", help="Replace what an export left there.")] = False,
    home: Home = None, as_json_output: Json = False,
) -> None:  # fmt: skip
    """Write a build as a TRL preference or unpaired set, which `datasets` and `bnfctl build` read."""
    from bnfctl.data import exports

    done = exports.export(open_store(home).find(ref, "build", "REF"), path, layout, force)
    console.say(done.line)
    console.emit(json.dumps(done.__dict__) if as_json_output else done.path)


def verify(refs: Annotated[list[str] | None, typer.Argument(help="Artifacts; default all.")] = None,
           home: Home = None, as_json_output: Json = False) -> None:  # fmt: skip
    """Hash artifacts again: a flipped byte, a missing file, a changed input."""
    from bnfctl import browse

    problems = browse.verify(open_store(home), refs or [])
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


def rm(refs: Refs, force: Annotated[bool, typer.Option("--force", help="Even if others were made from it.")] = False,
       home: Home = None, as_json_output: Json = False) -> None:  # fmt: skip
    """Delete artifacts and their names."""
    from bnfctl import browse

    gone = browse.rm(open_store(home), refs, force)
    console.emit(json.dumps({"removed": gone}) if as_json_output else "\n".join(f"removed {ref}" for ref in gone))


def gc(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Free it without asking.")] = False,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Only old checkpoints; drafts stay resumable.")
    ] = False,
    home: Home = None,
    as_json_output: Json = False,
) -> None:
    """Free unfinished drafts and old checkpoints, after saying what that would free."""
    from bnfctl import browse

    found, busy = browse.waste(open_store(home), checkpoints)
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


def doctor(home: Home = None, as_json_output: Json = False) -> None:
    """Say what this machine can do, and how to install what is missing."""
    from dataclasses import asdict

    from bnfctl import doctor as doctor_

    findings = list(doctor_.examine(open_store(home).home))
    document = json.dumps([asdict(finding) for finding in findings], indent=2)
    console.emit(document if as_json_output else doctor_.as_table(findings))


def report(
    refs: Refs,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for index.html, report.md and tables/*.csv.")],
    title: Annotated[str | None, typer.Option("--title", help="Of the page. Default: what was compared.")] = None,
    home: Home = None,
    as_json_output: Json = False,
) -> None:
    """Write tables, figures, responses and lineage of artifacts, and of what they were made from, as one page."""
    from bnfctl import report as report_

    store = open_store(home)
    written = report_.write([store.find(ref, where="REF") for ref in refs], store, out, title)
    document = {
        "index": str(written.index),
        "markdown": str(written.markdown),
        "tables": [str(path) for path in written.tables],
    }
    console.emit(json.dumps(document, indent=2) if as_json_output else str(written.index))


VERBS: dict[str, Callable[..., None]] = {
    "ls": ls, "show": show, "export": export, "report": report, "verify": verify, "rm": rm, "gc": gc, "doctor": doctor,
}  # fmt: skip
"""Name -> command."""
