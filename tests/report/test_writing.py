"""The folder of a report: what is in it, what it may replace, and that a crash or a full disk leaves no half page."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnfctl import durable
from bnfctl.artifact import Artifact, Store
from bnfctl.errors import BnfctlError, UsageError
from bnfctl.report import Written, write
from bnfctl.report.writing import MARK
from tests.conftest import Done
from tests.report.evals import graded, publish
from tests.report.page_world import HOSTILE, publish_build, publish_train


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and is no matter of the folder."""
    from bnfctl.report import figures

    monkeypatch.setattr(figures, "figures", lambda sources: [])


@pytest.fixture
def evals(store: Store) -> list[Artifact]:
    """A base and a policy whose responses try to break out of the page."""
    base = publish(store, graded("gsm8k", [1.0, 0.0, 1.0]))
    rows = [{**row, "response": HOSTILE} for row in graded("gsm8k", [1.0, 1.0, 1.0])]
    store.set_name("evil", base.ref)
    return [
        publish(store, rows, publish_train(store, publish_build(store, records=20), "bnf", 0, 3).pinned(), base=base)
    ]


def test_a_report_is_a_page_a_text_and_tables(store: Store, evals: list[Artifact], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    written = write(evals, store, out, "My <b>report</b>")
    tables = ("main", "against-base", "lengths", "training", "builds", "lineage")
    paths = tuple(out / "tables" / f"{name}.csv" for name in tables)
    assert written == Written(out / "index.html", out / "report.md", paths)
    assert {path for path in out.rglob("*") if path.is_file()} == {written.index, written.markdown, *paths}
    text = written.markdown.read_text()
    assert text.startswith(MARK) and "# My &lt;b&gt;report&lt;/b&gt;" in text
    assert evals[0].ref in text and evals[0].manifest.digest in text and "bnfctl eval" in text
    assert "<script" not in text
    page = written.index.read_text()
    assert "My &lt;b&gt;report&lt;/b&gt;" in page and "<b>report" not in page
    with open(out / "tables" / "main.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["GSM8K: Acc (%)"] for row in rows] == ["66.66666666666666", "100.0"]


def test_the_command_says_where_the_report_is(
    store: Store, evals: list[Artifact], tmp_path: Path, bnfctl: Callable[..., Done]
) -> None:
    base = store.find("evil").ref  # alone it has no figures, which take seconds
    done = bnfctl("report", base, "-o", tmp_path / "said", "--title", "My <b>title</b>", "--json")
    assert done.code == 0, done.err
    index, markdown = tmp_path / "said" / "index.html", tmp_path / "said" / "report.md"
    tables = [str(tmp_path / "said" / "tables" / f"{name}.csv") for name in ("main", "lengths", "lineage")]
    assert done.json == {"index": str(index), "markdown": str(markdown), "tables": tables}
    assert all(map(os.path.isfile, tables))
    assert "<title>My &lt;b&gt;title&lt;/b&gt;</title>" in index.read_text()
    assert "\n# My &lt;b&gt;title&lt;/b&gt;\n" in markdown.read_text()


@pytest.mark.usefixtures("no_figures")
def test_an_earlier_report_is_replaced_whole(store: Store, evals: list[Artifact], tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()
    write(evals, store, out)
    (out / "tables" / "of-another-time.csv").write_text("x")
    (out / ".report.md.1.tmp").write_text("torn")
    base = store.find("evil")
    written = write([base], store, out)
    assert {path.name for path in (out / "tables").iterdir()} == {path.name for path in written.tables}
    assert "main.csv" in {path.name for path in written.tables} and "training.csv" not in {
        p.name for p in written.tables
    }


@pytest.mark.usefixtures("no_figures")
def test_half_of_a_surrogate_pair_is_written_as_its_escape(store: Store, tmp_path: Path) -> None:
    """A judge's answer or a command line may hold one; UTF-8 has no bytes for it."""
    rows = [{**row, "extra": json.dumps({"said": "half \ud83d"})} for row in graded("gsm8k", [1.0, 0.0])]
    written = write([publish(store, rows)], store, tmp_path / "report", "title \udcff")
    page = written.index.read_text(encoding="utf-8")
    assert "half \\ud83d" in page and "<title>title \\udcff</title>" in page
    assert "# title \\\\udcff" in written.markdown.read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_figures")
def test_the_files_that_another_report_is_writing_are_left_to_it(
    store: Store, evals: list[Artifact], tmp_path: Path
) -> None:
    torn = tmp_path / "report" / "tables" / ".main.csv.1.tmp"
    write(evals, store, tmp_path / "report")
    torn.write_text("half of")
    write(evals, store, tmp_path / "report")
    assert torn.read_text() == "half of"


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("other", ["notes.txt", "index.html", "tables/data.parquet", "report.md"])
def test_a_folder_with_other_things_is_left_alone(
    store: Store, evals: list[Artifact], tmp_path: Path, other: str
) -> None:
    (tmp_path / "mine" / other).parent.mkdir(parents=True)
    (tmp_path / "mine" / other).write_text("mine")
    with pytest.raises(UsageError, match="holds other things") as refused:
        write(evals, store, tmp_path / "mine")
    assert other in refused.value.what and str(refused.value.where).startswith("-o ")
    assert [path.read_text() for path in (tmp_path / "mine").rglob("*") if path.is_file()] == ["mine"]


@pytest.mark.usefixtures("no_figures")
def test_other_things_beside_a_report_are_left_alone(store: Store, evals: list[Artifact], tmp_path: Path) -> None:
    write(evals, store, tmp_path / "report")
    (tmp_path / "report" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.txt"):
        write(evals, store, tmp_path / "report")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="a file is in the report's place"):
        write(evals, store, tmp_path / "file")


@pytest.mark.usefixtures("no_figures")
def test_a_report_that_could_not_be_finished_is_replaced_by_the_next(
    store: Store, evals: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "report", durable.write_bytes
    write([store.find("evil")], store, out)
    before = (out / "index.html").read_bytes()

    def full(path: Path, data: bytes) -> None:
        if path.name == "index.html":
            raise OSError(28, "No space left on device")
        kept(path, data)

    monkeypatch.setattr(durable, "write_bytes", full)
    with pytest.raises(BnfctlError, match="No space left") as failed:
        write(evals, store, out)
    assert failed.value.exit_code == 1 and failed.value.where == str(out)
    assert (out / "index.html").read_bytes() == before
    monkeypatch.setattr(durable, "write_bytes", kept)
    assert write(evals, store, out).index.read_bytes() != before


def test_nothing_is_written_for_artifacts_that_cannot_be_reported_on(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write([], store, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_changed_row_is_an_error(store: Store, evals: list[Artifact], tmp_path: Path) -> None:
    shard: Any = next((evals[0].path / "rows").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BnfctlError, match="corrupted artifact"):
        write(evals, store, tmp_path / "report")
    assert not (tmp_path / "report").exists()
