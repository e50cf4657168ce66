"""Equal artifacts give equal bytes, whatever order sets and hashes have in a process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bnfctl.artifact import Artifact, Store
from bnfctl.report import Written
from tests.conftest import Done


def test_the_same_artifacts_give_the_same_bytes_in_any_process(
    made_run: tuple[Store, list[Artifact], Written], tmp_path: Path, bnfctl: Callable[..., Done]
) -> None:
    store, evals, written = made_run
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    refs = [one.ref for one in evals]
    done = bnfctl("report", *refs, "-o", tmp_path / "again", "--home", store.home, env={"PYTHONHASHSEED": seed})
    assert (done.code, done.out) == (0, f"{tmp_path / 'again' / 'index.html'}\n"), done.err
    first, again = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (written.index.parent, tmp_path / "again")
    )
    assert [name for name in first | again if first.get(name) != again.get(name)] == []
