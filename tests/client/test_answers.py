"""The file of answers under damage: a byte, a page, the header, half of the file, a full disk; nothing wrong is ever read."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfctl.client import salvage
from bnfctl.client.answers import Answers
from bnfctl.errors import BnfctlError
from tests.client.asking import Asking, asks, expected, question
from tests.conftest import REPOSITORY
from tests.small_disk import on_small_disk
from tests.stub_server import Gate, StubServer

SMALL = 1 << 16
"""Bytes of a reserve."""


def key(number: int) -> str:
    return question(number).key


def answer(number: int) -> dict[str, Any]:
    """Some short, some over several pages; nothing in them repeats, so that packing doesn't make them short."""
    return {
        "choices": [{"text": random.Random(number).randbytes(number * 97 % 7000).hex(), "finish": "stop"}],
        "n": number,
    }


def filled(path: Path, numbers: range = range(60)) -> Path:
    with Answers(path, SMALL) as answers:
        for start in numbers[::10]:
            answers.put([(key(number), answer(number)) for number in range(start, min(start + 10, numbers.stop))])
    return path


def left(path: Path, numbers: range = range(60)) -> set[int]:
    """Which ones are still there; whatever is there must be right."""
    with Answers(path, SMALL) as answers:
        found = {number: kept for number in numbers if (kept := answers.get(key(number))) is not None}
    assert all(kept == answer(number) for number, kept in found.items())
    return set(found)


def asides(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}-damaged-*"))


def test_what_was_kept_is_found_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "a")
    assert left(path) == set(range(60))
    with Answers(path, SMALL) as answers:
        assert answers.get(key(60)) is None
    assert {item.name for item in tmp_path.iterdir()} <= {"a", "a-journal", "a-locks"}


def test_a_process_has_the_file_once(tmp_path: Path) -> None:
    with Answers(tmp_path / "a", SMALL), pytest.raises(BnfctlError, match="this process uses") as caught:
        Answers(tmp_path / "a", SMALL)
    assert caught.value.where == str(tmp_path / "a-locks")
    Answers(tmp_path / "a", SMALL).close()


def test_a_damaged_row_is_dropped_and_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a"
    with StubServer() as stub:
        assert len(list(asks(stub.url, path).ask(map(question, range(20))))) == 20
        with closing(sqlite3.connect(path)) as file, file:
            blob = bytearray(file.execute("SELECT answer FROM answers WHERE key = ?", (key(3),)).fetchone()[0])
            blob[-9] ^= 4
            file.execute("UPDATE answers SET answer = ? WHERE key = ?", (bytes(blob), key(3)))
            file.execute("UPDATE answers SET answer = 'a text' WHERE key = ?", (key(4),))
            file.execute("UPDATE answers SET answer = x'' WHERE key = ?", (key(5),))
            of_another = "(SELECT answer FROM answers WHERE key = ?)"
            file.execute(f"UPDATE answers SET answer = {of_another} WHERE key = ?", (key(7), key(6)))
        for again in ({3, 4, 5, 6}, set[int]()):
            capsys.readouterr()
            client = asks(stub.url, path)
            said = {tag: got["choices"][0]["text"] for tag, got in client.ask(map(question, range(20)))}
            assert said == expected(range(20))
            assert (client.usage["requests"], client.usage["cached"]) == (len(again), 20 - len(again))
            assert capsys.readouterr().err.count("is damaged") == len(again)
        assert sum(stub.asked.values()) == 24
    assert not asides(path)


def test_many_damaged_rows_are_told_in_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path / "a")
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE answers SET answer = x'00'")
    assert left(path) == set()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert "60 kept answers were damaged in all" in lines[-1]


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "zeros": lambda page, dice: bytes(len(page)),
    "noise": lambda page, dice: dice.randbytes(len(page)),
    "one bit": lambda page, dice: flipped(page, dice.randrange(len(page) * 8)),
    "half": lambda page, dice: page[: len(page) // 2] + bytes(len(page) // 2),
}


def flipped(page: bytes, bit: int) -> bytes:
    changed = bytearray(page)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_page_costs_no_more_than_the_rows_on_it(kind: str, tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole", range(36)).read_bytes()
    dice = random.Random(kind)
    for start in range(0, len(whole), 4096):
        path = tmp_path / f"at-{start}"
        damaged = whole[:start] + KINDS[kind](whole[start : start + 4096], dice) + whole[start + 4096 :]
        path.write_bytes(damaged)
        there = left(path, range(36))
        if start == 0:
            assert [copy.read_bytes() for copy in asides(path)] == [damaged]
        assert len(there) >= 36 - 25, start  # a leaf holds some twenty short answers
        assert start > 0 or there == set(range(36))  # the first page only says what is in the file
        missing = sorted(set(range(36)) - there)
        with Answers(path, SMALL) as answers:
            answers.put([(key(number), answer(number)) for number in missing])
        assert left(path, range(36)) == set(range(36)), start
        with closing(sqlite3.connect(path)) as file:
            found = [row[0] for row in file.execute("PRAGMA integrity_check")]
        assert found == ["ok"], start
        for copy in asides(path):  # nothing is deleted
            assert len(copy.read_bytes()) >= len(whole)


@pytest.mark.parametrize("share", [0.03, 0.5, 0.97])
def test_a_file_that_was_cut_off_keeps_what_is_left(
    share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(tmp_path / "a")
    os.truncate(path, int(path.stat().st_size * share))
    there = left(path)
    assert (share > 0.1) == bool(there)
    assert len(there) < 60
    assert f"kept as {asides(path)[0].name}, {len(there)} answers recovered" in capsys.readouterr().err


def test_a_file_that_is_no_file_of_answers_is_put_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a"
    for number in (1, 2):
        path.write_bytes(b"no database" * 200)
        with StubServer() as stub:
            client = asks(stub.url, path)
            assert {tag: got["choices"][0]["text"] for tag, got in client.ask([question(0)])} == expected([0])
        assert asides(path)[-1].read_bytes() == b"no database" * 200
        assert len(asides(path)) == number
        assert "file is not a database" in capsys.readouterr().err


def test_other_tables_are_an_error(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a")) as file, file:
        file.execute("CREATE TABLE answers (something TEXT)")
    with pytest.raises(BnfctlError, match="cannot keep") as caught:
        Answers(tmp_path / "a", SMALL)
    assert caught.value.where == str(tmp_path / "a")
    assert not asides(tmp_path / "a")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BnfctlError, match="cannot keep"):
        Answers(tmp_path / "no" / "a", SMALL)


REPAIR = """
import pathlib, sys
from bnfctl.client.answers import Answers
Answers(pathlib.Path(sys.argv[1]), 65536).close()
"""


def test_a_run_goes_on_in_the_file_that_another_one_has_repaired(tmp_path: Path) -> None:
    path = filled(tmp_path / "a")
    with Answers(path, SMALL) as answers:
        with open(path, "r+b") as file:
            file.write(b"\0" * 4096)
        subprocess.run([sys.executable, "-c", REPAIR, str(path)], check=True, cwd=REPOSITORY)
        assert len(asides(path)) == 1
        answers.put([(key(60), answer(60))])
        assert answers.get(key(59)) == answer(59)
    assert left(path, range(61)) == set(range(61))


def test_a_file_that_is_damaged_in_the_middle_of_a_run_is_repaired_there(tmp_path: Path) -> None:
    path, gate = filled(tmp_path / "a"), Gate(30)  # nothing is written while it is closed
    with StubServer(gate) as stub:
        said = {}
        for tag, got in asks(stub.url, path).ask(map(question, range(100, 200))):
            said[tag] = got["choices"][0]["text"]
            if len(said) == 30:
                with open(path, "r+b") as file:
                    file.write(b"\0" * 4096)
                gate.open.set()
        assert said == expected(range(100, 200))
        assert len(asides(path)) == 1
        again = asks(stub.url, path)
        assert len(list(again.ask(map(question, range(100, 200))))) == 100
        assert (again.usage["requests"], again.usage["cached"]) == (0, 100)
        assert set(stub.asked.values()) == {1}
    assert left(path) == set(range(60))
    assert len(asides(path)) == 1


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_in_the_middle_of_a_repair_loses_nothing(step: int, tmp_path: Path) -> None:
    path = filled(tmp_path / "a")
    with open(path, "r+b") as file:
        file.write(b"\0" * 4096)
    done = subprocess.run(
        [sys.executable, "-c", REPAIR, str(path)], check=False, cwd=REPOSITORY,
        env={**os.environ, "BNFCTL_FAULT_AT": str(step)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert left(path) == set(range(60))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 20000), min_size=1, max_size=40))
def test_every_row_of_a_whole_file_is_made_out(sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("salvage") / "a"
    rows = [(f"{number:064x}", os.urandom(size)) for number, size in enumerate(sizes)]
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, answer BLOB NOT NULL)")
        file.executemany("INSERT INTO answers VALUES (?, ?)", rows)
    found = {(row[0].decode(), row[1]) for row in salvage.rows(path) if len(row) == 2}
    assert found >= set(rows)


@settings(max_examples=80, deadline=None)
@given(noise=st.binary(max_size=300), at=st.integers(0, 8000), kind=st.sampled_from([b"", b"\x0d"]))
def test_any_bytes_are_read_or_left(
    noise: bytes, at: int, kind: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("salvage") / "a"
    content = bytearray(random.Random(at).randbytes(3 * 4096))
    content[at : at + len(noise)] = noise
    for start in (100, 4096, 8192) if kind else ():
        content[start : start + 1] = kind
    path.write_bytes(content)
    assert all(isinstance(part, bytes) for row in salvage.rows(path) for part in row)


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    """As where a quota is used up, for any file that this process writes (bytes)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_even_without_the_reserve_is_an_error_that_loses_nothing_kept(tmp_path: Path) -> None:
    path = filled(tmp_path / "a")
    with Answers(path, SMALL) as answers:
        with (
            no_file_grows_beyond(path.stat().st_size + 8192),
            pytest.raises(BnfctlError, match="cannot keep") as caught,
        ):
            answers.put([(key(number), answer(number)) for number in range(60, 120)])
        assert caught.value.where == str(path)
        assert "free some space" in str(caught.value.hint)
        assert not (tmp_path / "a-reserve").exists(), "it was not tried without it"
        assert answers.get(key(60)) is None
        answers.put([(key(60), answer(60))])
    assert left(path, range(61)) == set(range(61))
    assert not asides(path)


def test_too_little_room_at_the_start_is_an_error_before_anything_is_asked(tmp_path: Path) -> None:
    with StubServer() as stub, Asking(stub.url, tmp_path / "a", range(3), file_size=1 << 20) as child:
        said, usage, _ = child.end()
        assert usage["error"] == "less than 32 MB are free to keep the servers' answers"
        assert not said
        assert not stub.asked
    assert not (tmp_path / "a-reserve").exists()


FULL = """
import json, pathlib, sys
from bnfctl.errors import BnfctlError
from tests.client.asking import asks, long_text, question
from tests.small_disk import grow
from tests.stub_server import StubServer, slow
disk = pathlib.Path(sys.argv[1])
with StubServer(slow(0.01), say=long_text) as stub:
    ends = []
    for more in (False, True):
        if more:
            grow(disk, "64m")
        said, client, error = 0, asks(stub.url, disk / "a"), {}
        try:
            for _ in client.ask(map(question, range(500))):
                said += 1
        except BnfctlError as failure:
            error = failure.as_dict()
        ends.append({"said": said, "error": error, **client.usage})
    print(json.dumps({"ends": ends, "asked": max(stub.asked.values()), "questions": len(stub.asked)}))
"""


def test_a_full_disk_stops_the_asking_but_what_is_in_flight_is_kept_and_nothing_paid_twice(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    found = on_small_disk(disk, "33200k", FULL, str(disk))
    first, second = found["ends"]
    assert first["error"]["error"] == "the disk is full; all answers so far are kept"
    assert first["error"]["where"] == str(disk / "a")
    assert "free some space" in first["error"]["hint"]
    assert 20 < first["said"] == first["requests"] < 400
    assert (second["error"], second["said"], second["cached"]) == ({}, 500, first["said"])
    assert (found["asked"], found["questions"]) == (1, 500)
