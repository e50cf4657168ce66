"""The store: key and digest, drafts, publishing, locks, names, verification."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from bnfctl import browse, console
from bnfctl.artifact import Artifact, Pinned, Plan, Store
from bnfctl.config import BuildConfig
from bnfctl.errors import BnfctlError, Interrupted, UsageError

Make = Callable[..., Artifact]


def plan_of(seed: int = 0, digest: str = "d") -> Plan:
    return Plan("build", 1, BuildConfig(input="x", seed=seed), {"input": Pinned("file", "x", digest)})


def test_key_depends_on_what_was_asked() -> None:
    base = plan_of()
    assert base.key == plan_of().key
    assert base.key != plan_of(seed=1).key
    assert base.key != plan_of(digest="e").key
    assert base.key != dataclasses.replace(base, version=2).key
    renamed = dataclasses.replace(base, config=BuildConfig(input="another spelling"))
    assert renamed.key == base.key, "an input counts by its digest, not by its name"


def test_published_artifact_is_found_and_reads_back(store: Store, make_build: Make) -> None:
    made = make_build()
    found = store.get("build", made.manifest.key)
    assert found is not None
    assert found.manifest == made.manifest
    assert [row["chosen_text"] for row in found.rows()] == ["hi"]
    assert json.loads((found.path / "config.json").read_text())["seed"] == 0
    assert not (found.path / "scratch").exists()
    assert not list((store.home / ".drafts").glob("build-*[0-9a-f]"))


def test_same_content_same_digest_whatever_the_key(make_build: Make) -> None:
    assert make_build(seed=1).manifest.digest == make_build(seed=2).manifest.digest


@pytest.mark.parametrize("ref", ["build/{key}", "{key}", "build/{short}", "{path}", "pairs.v1"])
def test_find_by_any_reference(store: Store, make_build: Make, ref: str) -> None:
    made = make_build()
    store.set_name("pairs.v1", made.ref)
    text = ref.format(key=made.manifest.key[:12], short=made.manifest.key[:5], path=made.path)
    assert store.find(text).ref == made.ref


def test_find_complains_helpfully(store: Store, make_build: Make) -> None:
    made = make_build()
    store.set_name("pairs", made.ref)
    with pytest.raises(UsageError, match="did you mean 'pairs'"):
        store.find("pars")
    with pytest.raises(UsageError, match="is a build artifact; this takes score"):
        store.find("pairs", "score", "INPUT")
    with pytest.raises(UsageError, match="can't be a name"):
        store.set_name("a/b", made.ref)


def test_ambiguous_key(store: Store, make_build: Make) -> None:
    refs = [make_build(seed=seed) for seed in range(40)]
    by_first: dict[str, list[Artifact]] = {}
    for artifact in refs:
        by_first.setdefault(artifact.manifest.key[0], []).append(artifact)
    two = next(found for found in by_first.values() if len(found) > 1)
    for artifact in two:  # give both a common beginning of four
        artifact.path.rename(artifact.path.with_name("abcd" + artifact.path.name[4:]))
    with pytest.raises(UsageError, match="could be any of"):
        store.find("build/abcd")


def test_verify_sees_every_kind_of_damage(store: Store, make_build: Make) -> None:
    artifact = make_build()
    assert artifact.verify() == []
    shard = artifact.path / "rows" / "00000.parquet"
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    assert artifact.verify() == ["changed file rows/00000.parquet"]
    shard.unlink()
    assert artifact.verify() == ["missing file rows/00000.parquet"]
    shard.write_bytes(good)
    (artifact.path / "rows" / "00001.parquet").write_bytes(b"")
    assert artifact.verify() == ["unexpected file rows/00001.parquet"]


def test_verify_sees_a_changed_input(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text("one")
    plan = Plan(
        "build", 1, BuildConfig(input="x"), {"input": Pinned("file", "x", store.digests.file(source), str(source))}
    )
    with store.draft(plan) as draft:
        draft.open()
        artifact = draft.publish({})
    assert artifact.verify() == []
    source.write_text("two")
    assert artifact.verify() == [f"input input has changed since: {source}"]


def test_corrupted_rows_and_manifest_are_clear_errors(store: Store, make_build: Make) -> None:
    artifact = make_build()
    (artifact.path / "rows" / "00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(BnfctlError, match="corrupted artifact") as caught:
        list(artifact.rows())
    assert "bnfctl verify" in str(caught.value.hint)
    (artifact.path / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="not a readable artifact"):
        store.find(str(artifact.path))
    assert any("unreadable" in problem for found in browse.verify(store, []).values() for problem in found)


def test_newer_schema_is_refused(make_build: Make) -> None:
    artifact = make_build()
    manifest = artifact.path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 99}))
    with pytest.raises(UsageError, match="schema version 99"):
        Artifact(artifact.path)


def test_two_processes_on_one_draft(store: Store) -> None:
    with store.draft(plan_of()):
        with (
            pytest.raises(UsageError, match=f"another process .pid {os.getpid()}. is making build/"),
            store.draft(plan_of()),
        ):
            pass
        with store.draft(plan_of(seed=1)):
            pass
    with store.draft(plan_of()):
        pass


def test_waiting_for_another_process(
    store: Store, stop_signal: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so once, gets its turn, and can be stopped."""
    turns: list[float] = []
    with ExitStack() as other:
        other.enter_context(store.draft(plan_of()))

        def wait() -> None:
            turns.append(time.monotonic())
            if len(turns) == 2:
                other.close()

        with store.draft(plan_of(), wait=wait):
            assert len(turns) == 2 and 0.4 < turns[1] - turns[0] < 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"another process (pid {os.getpid()}) is making build/" in lines[0]
    assert lines[0].endswith(": waiting for it")
    stop_signal(signal.SIGINT)
    with store.draft(plan_of()), pytest.raises(Interrupted), store.draft(plan_of(), wait=console.check_stop):
        pass


def test_the_lock_of_a_dead_process_is_free(store: Store, tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        from bnfctl.artifact import Plan, Pinned, Store
        from bnfctl.config import BuildConfig
        plan = Plan("build", 1, BuildConfig(input="x"), {{"input": Pinned("file", "x", "d")}})
        with Store(Path({str(store.home)!r})).draft(plan) as draft:
            draft.open()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -9
    with store.draft(plan_of()) as draft:
        assert draft.path.exists(), "the draft is taken over"


@pytest.mark.parametrize("limit", [200, 2_000])
def test_a_full_disk_leaves_no_artifact_and_a_draft_that_resumes(store: Store, make_build: Make, limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            make_build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(store.artifacts()) == []
    assert not list(store.home.rglob("*.tmp"))
    assert make_build().verify() == []


def test_rm_protects_what_others_were_made_from(store: Store, make_build: Make) -> None:
    build = make_build()
    plan = Plan("train", 1, BuildConfig(input="y"), {"data": build.pinned()})
    with store.draft(plan) as draft:
        draft.open()
        train = draft.publish({})
    with store.draft(Plan("eval", 1, BuildConfig(input="z"), {"model": train.pinned()})) as draft:
        draft.open()
        graded = draft.publish({})
    store.set_name("mine", build.ref)
    with pytest.raises(UsageError, match=f"{train.ref}, {graded.ref} were made of it") as raised:
        browse.rm(store, [build.ref], force=False)
    assert raised.value.hint == f"bnfctl rm {build.ref} {train.ref} {graded.ref}, or --force"
    everything = [build.ref, train.ref, graded.ref]
    assert browse.rm(store, everything, force=False) == sorted(everything)
    assert store.names() == {}
    assert list(store.artifacts()) == []


def test_lineage_and_gc(store: Store, make_build: Make) -> None:
    build = make_build()
    tree = browse.lineage(build, store)
    assert tree["ref"] == build.ref
    with store.draft(plan_of()) as draft:
        draft.open()
        for step in ("step-000001", "step-000002"):
            (draft.scratch / "checkpoints" / step).mkdir(parents=True)
            (draft.scratch / "checkpoints" / step / "x").write_bytes(b"0" * 1000)
        _, busy = browse.waste(store, checkpoints_only=False)
        assert busy == [draft.path.name]
    old, _ = browse.waste(store, checkpoints_only=True)
    assert [item.path.name for item in old] == ["step-000001"] and old[0].bytes == 1000
    found, _ = browse.waste(store, checkpoints_only=False)
    browse.free(found)
    assert not draft.path.exists()
    assert build.verify() == []


def test_forced_remake_replaces_in_one_step(store: Store, make_build: Make) -> None:
    first = make_build(extra=1)
    again = make_build(extra=2)
    assert first.path == again.path
    found = store.get("build", again.manifest.key)
    assert found is not None and found.manifest.summary["extra"] == 2
    assert not list((store.home / ".drafts").glob("*replaced*"))


def test_folders_that_are_not_ours_are_left_alone(store: Store, make_build: Make, tmp_path: Path) -> None:
    make_build()
    for path in (
        store.home / "models" / "llama",
        store.home / "src" / "lib" / "scratch",
        store.home / "build" / "notes",
    ):
        path.mkdir(parents=True)
    assert browse.waste(store, checkpoints_only=False) == ([], [])
    foreign = tmp_path / "extension"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"manifest_version": 3}')
    with pytest.raises(UsageError, match="no artifact"):
        browse.rm(store, [str(foreign)], force=True)
    other = Store(tmp_path / "other")
    with other.draft(plan_of()) as draft:
        draft.open()
        elsewhere = draft.publish({})
    with pytest.raises(UsageError, match="not an artifact of this store"):
        browse.rm(store, [str(elsewhere.path)], force=True)
    assert foreign.exists() and elsewhere.path.exists()


def test_gc_leaves_a_draft_that_a_run_has_taken_meanwhile(store: Store) -> None:
    with store.draft(plan_of()) as draft:
        draft.open()
    found, _ = browse.waste(store, checkpoints_only=False)
    with store.draft(plan_of()):
        assert browse.free(found) == 0
    assert draft.path.exists()
    assert browse.free(found) > 0
    assert not draft.path.exists()


def test_an_interrupted_forced_run_is_resumed(store: Store) -> None:
    with store.draft(plan_of()) as draft:
        draft.open()
        (draft.scratch / "old").write_text("x")
        draft.start_over()
        assert not (draft.scratch / "old").exists()
        (draft.scratch / "new").write_text("x")
        draft.start_over()
        assert (draft.scratch / "new").exists(), "the second call is the same forced run, resumed"


def test_a_moved_store_and_a_gone_input(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text("one")
    pinned = Pinned("file", str(source), store.digests.file(source), str(source))
    with store.draft(Plan("build", 1, BuildConfig(input="x"), {"input": pinned})) as draft:
        draft.open()
        build = draft.publish({})
    with store.draft(Plan("train", 1, BuildConfig(input="y"), {"data": build.pinned()})) as draft:
        draft.open()
        train = draft.publish({})
    moved = Store(store.home.rename(tmp_path / "moved"))
    assert browse.verify(moved, [train.ref]) == {train.ref: []}
    source.unlink()
    assert browse.verify(moved, [build.ref]) == {build.ref: [f"input input is gone: {source}"]}


def test_broken_names_are_a_clear_error(store: Store) -> None:
    store.home.mkdir()
    (store.home / "names.json").write_text("{")
    with pytest.raises(UsageError, match="broken JSON"):
        store.search("anything")
