"""Asking the judge: the servers that are named, or one that is started here for the time of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bnfctl import console, machine, pool
from bnfctl.artifact import Draft, Store
from bnfctl.client.endpoint import Client
from bnfctl.client.local import KEY_ENV, serving
from bnfctl.client.served import Served, connect, served
from bnfctl.config import EvalConfig
from bnfctl.errors import UsageError
from bnfctl.evaluation.inputs import NO_JUDGE, name_of
from bnfctl.model.source import model_dir
from bnfctl.model.vllm import server_command
from bnfctl.tasks.imports import Answered
from bnfctl.tasks.judging import Fingerprint, Judge, Judged, JudgedTask, fingerprint, judge

NO_ENGINE = "--server http://host:8000/v1, of a judge that runs elsewhere"
_SHOWN = 12
"""Characters of a judge's digest in its name."""


def answers_file(store: Store) -> Path:
    """One file for all evaluations of a store, so that no question is paid for twice."""
    return store.home / ".answers" / "judges.sqlite"


class Asker:
    """The judge of a run: connected (or started) for the first question, ended with the context."""

    def __init__(self, config: EvalConfig, draft: Draft) -> None:
        self.config, self.draft = config, draft
        self._open = ExitStack()
        self._judge: tuple[Client, Served] | None = None

    def ask(self, task: JudgedTask, answered: Sequence[Answered]) -> tuple[list[Judged], Fingerprint]:
        """The judged rows, in the order of the responses, and who judged.

        Raises what `judge` raises; answers so far are kept, and the same command goes on after them.
        """
        client, model = self._connected()
        who = Judge.of(
            model, temperature=self.config.judge_temperature, max_tokens=self.config.judge_tokens,
            json_mode=self.config.judge_json,
        )  # fmt: skip
        before = dict(client.usage)
        found: dict[tuple[str, str], Judged] = {}
        with console.Progress(len(answered), f"responses of {task.name} judged") as progress:
            for row in judge(task, answered, client, who):
                found[row.answered.model, row.answered.item.id] = row
                progress.advance(1)
        self.draft.provenance.update(usage=dict(client.usage), judge=model.version)
        spent = {name: count - before[name] for name, count in client.usage.items()}
        console.say(f"{task.name}: {_said(spent)}")
        rows = [found[one.model, one.item.id] for one in answered]
        return rows, fingerprint(task, who, rows)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        """End the server that was started, if one was; where it died, that is the error that is raised."""
        return self._open.__exit__(*error)

    def _connected(self) -> tuple[Client, Served]:
        if self._judge is None:
            config = dataclasses.replace(self.config, server=tuple(self._open.enter_context(self._servers())))
            if config.judge is not None:
                config = dataclasses.replace(config, api_key_env=KEY_ENV)
            answers = answers_file(self.draft.store)
            answers.parent.mkdir(parents=True, exist_ok=True)
            client = connect(config, answers)
            self._judge = client, served(client, config.served_model)
        return self._judge

    @contextmanager
    def _servers(self) -> Iterator[Sequence[str]]:
        config = self.config
        if config.judge is None:
            if not config.server:
                raise UsageError("the responses wait for a judge", where="--server", hint=NO_JUDGE)
            yield config.server
            return
        pinned = self.draft.inputs["judge"]
        # Kept answers are found by the name that was asked: another model in a folder of that name is another judge.
        folder, name = model_dir(pinned), f"{name_of(pinned)}@{str(pinned.digest)[:_SHOWN]}"
        command, environment = server_command(
            folder, name, dtype=config.dtype, gpu_memory=config.gpu_memory, trust_remote_code=config.trust_remote_code,
            instead=NO_ENGINE, tensor_parallel=config.tensor_parallel,
        )  # fmt: skip
        replicas = pool.processes(config.devices, config.tensor_parallel) if machine.visible_gpus() else 1
        log = self.draft.path / "log" / "judge.log"
        with serving(command, environment, name, log=log, replicas=replicas, gpus_each=config.tensor_parallel) as urls:
            yield urls


def _said(usage: dict[str, int]) -> str:
    """What a task's judge cost, for people."""
    parts = [f"{usage['requests']} calls", f"{usage['cached']} answered before"]
    parts += [f"{usage['retries']} retries"] if usage["retries"] else []
    tokens = f"{usage['prompt_tokens']} tokens of prompts and {usage['completion_tokens']} of answers"
    return f"{', '.join(parts)}; {tokens} in all of them"


def calls_ahead(calls: dict[str, Any], exact: bool) -> str:
    """The line of a dry run about what a judge will be asked; exact: the responses are known."""
    more = "" if exact else ", plus the responses to be judged"
    least = "" if exact else "at most "
    return (
        f"{least}{calls['calls']} calls, about {calls['prompt_tokens']} tokens{more}, "
        f"and at most {calls['response_tokens_at_most']} tokens of answers; what was answered before costs nothing"
    )
