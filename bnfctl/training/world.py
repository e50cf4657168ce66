"""The ranks of one training: where they meet, how they add up, and that they are what the launcher promised.

Launchers fail silently: one process where two were asked for, or two trainings that know nothing of each other.
So every rank states what it is before the first collective, and all compare.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from bnfctl import __version__, console, machine
from bnfctl.errors import BnfctlError, Interrupted, UsageError
from bnfctl.machine import Place
from bnfctl.training.heartbeat import Heartbeat

START_SECONDS = 900.0
"""How long the first rank waits for the last: containers and imports from a slow disk take minutes."""
COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""Longer than any save; a dead rank is the heartbeat's business."""
_PEER = re.compile(
    r"connection (closed|reset)|broken pipe|gloo|nccl|process group|remote process|socket", re.IGNORECASE
)
"""How torch says in a RuntimeError that a collective has lost a peer."""


@dataclass(frozen=True, eq=False)
class World:
    """This rank and the way to the others.  Every method with `Collective.` is called by all ranks or by none."""

    place: Place
    device: torch.device
    meeting: _Meeting | None = None
    """None for one process, or where someone else has made the process group."""

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """One line on stderr, from the main rank."""
        if self.main:
            console.say(text)

    def sum(self, values: Tensor) -> Tensor:
        """Add up over the ranks, in place, any shape and dtype on `device`.  Collective."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The largest over the ranks, in place, any shape and dtype on `device`.  Collective."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag: is it set on any rank?  Collective."""
        return tuple(map(bool, self.max(torch.tensor(flags, dtype=torch.int32, device=self.device)).tolist()))

    def check_stop(self, stop: bool | None = None) -> None:
        """Raise the same Interrupted on all ranks if a signal has asked any of them to stop.  Collective.

        stop: what the ranks have agreed on already, by `any`.  Call it where everything done so far is saved.
        """
        if stop is False:
            return
        signum = int(self.max(torch.tensor(console.stop_signal(), device=self.device)))
        if signum or stop:
            raise Interrupted(signum or signal.SIGTERM)

    def barrier(self) -> None:
        """Wait for all ranks.  Collective."""
        self.sum(torch.zeros((), device=self.device)).item()

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value on every rank, as it comes back from JSON.  Collective."""
        mine = self._packed(value if self.main else None)
        if self.size > 1:
            with _named_loss(self.meeting):
                length = torch.tensor(mine.numel(), device=self.device)
                dist.broadcast(length, 0)
                mine = mine if self.main else mine.new_empty(int(length))
                dist.broadcast(mine, 0)
        return _unpacked(mine)

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, as it comes back from JSON, on every rank, in their order.  Collective."""
        mine = self._packed(value)
        if self.size == 1:
            return [_unpacked(mine)]
        with _named_loss(self.meeting):
            lengths = torch.zeros(self.size, dtype=torch.int64, device=self.device)
            lengths[self.rank] = mine.numel()
            dist.all_reduce(lengths)
            longest = int(lengths.max())
            padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
            padded[: mine.numel()] = mine
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded)
        return [_unpacked(part[:length]) for part, length in zip(parts, lengths.tolist(), strict=True)]

    def give_order(self, order: dict[str, Any]) -> None:
        """From rank 0: what `wait_for_order` returns on the others, in the same order of calls.  Not collective."""
        if self.meeting is not None:
            self.meeting.give_order(order)

    def wait_for_order(self) -> dict[str, Any]:
        """On the other ranks: what rank 0 says next.  It may take hours to say it: no timeout while it lives."""
        assert self.meeting is not None
        return self.meeting.wait_for_order()

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        if self.size > 1:
            with _named_loss(self.meeting):
                dist.all_reduce(values, how)
        return values

    def _packed(self, value: Any) -> Tensor:
        """[bytes] a value's JSON on `device`."""
        return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)


def _unpacked(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


class _Meeting:
    """The rendezvous store as one rank sees it: the roll call, rank 0's orders, the heartbeat."""

    def __init__(self, place: Place, lost: Callable[[BnfctlError], None]) -> None:
        self.place = place
        host, port = machine.meeting_point()
        # torchrun's agent keeps the store itself, also over restarts of the ranks: each has names of its own.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        prefix = f"bnfctl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

        def connect(serve: bool) -> Store:
            store = TCPStore(
                host, port, is_master=serve, timeout=timedelta(seconds=START_SECONDS), wait_for_workers=False
            )
            return PrefixStore(prefix, store)

        serves = place.rank == 0 and not agent
        try:
            self.store = connect(serves)
            keeper = "the launcher of rank 0" if agent else "rank 0"
            self.heart = Heartbeat(connect(False), place.rank, place.size, host=serves, keeper=keeper, lost=lost)
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
            hint = "MASTER_ADDR and MASTER_PORT must name a free port that all nodes reach"
            raise BnfctlError(f"rank {place.rank} finds no meeting point: {reason}", where=f"{host}:{port}", hint=hint) from None  # fmt: skip
        self.heart.start()
        self._given = 0

    def roll_call(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank says of itself; BnfctlError names those that did not come, or came twice."""
        ranks = range(self.place.size)
        if self.store.add(f"came/{self.place.rank}", 1) > 1:
            hint = "is another training using this port? give each its own MASTER_PORT"
            raise UsageError(f"two processes are rank {self.place.rank}", where=self.place.launcher, hint=hint)
        self.store.set(f"state/{self.place.rank}", json.dumps(state))
        end = time.monotonic() + START_SECONDS
        missing = list(ranks)
        while missing := [rank for rank in missing if not self.store.check([f"state/{rank}"])]:
            if time.monotonic() > end:
                listed = ", ".join(map(str, missing))
                what = f"of {self.place.size} ranks, these did not come within {START_SECONDS:.0f} s: {listed}"
                raise BnfctlError(what, where=self.place.launcher, hint="was the command started on every node?")
            time.sleep(0.05)
        return [json.loads(self.store.get(f"state/{rank}")) for rank in ranks]

    def give_order(self, order: dict[str, Any]) -> None:
        self._given += 1
        self.store.set(f"order/{self._given}", json.dumps(order))

    def wait_for_order(self) -> dict[str, Any]:
        self._given += 1
        key, pause = f"order/{self._given}", 0.01
        with _named_loss(self):
            while not self.store.check([key]):
                time.sleep(pause)
                pause = min(1.2 * pause, 0.5)
            order: dict[str, Any] = json.loads(self.store.get(key))
        return order


_current: World | None = None


@contextmanager
def joined(asked: str | None = None, lost: Callable[[BnfctlError], None] = console.report) -> Iterator[World]:
    """The ranks of this training, met and compared; within another `joined`, the same World again.

    asked: a digest of what this rank was asked to do, the same on all.  lost: gets the error when another rank's end
    ends this process, which may be stuck in a collective.  UsageError where the ranks are not what the launcher
    promised; LostRank, or the other rank's own error, where another one ends.
    """
    global _current
    if _current is not None:
        with _named_loss(_current.meeting):
            yield _current
        return
    place = machine.place()
    if place.size == 1:
        _current = World(place, _device(place))
        try:
            yield _current
        finally:
            _current = None
        return
    meeting = _Meeting(place, lost)
    error: BaseException | None = None
    try:
        with _named_loss(meeting):
            _current = _meet(meeting, asked)
            yield _current
    except BaseException as raised:
        error = raised
        raise
    finally:
        _current = None
        _leave(meeting, error)


def _meet(meeting: _Meeting, asked: str | None) -> World:
    """Compare the ranks, then make the process group and prove that it is theirs."""
    place = meeting.place
    world = World(place, _device(place), meeting)
    state = {"rank": place.rank, "size": place.size, "version": __version__, "torch": torch.__version__,
             "asked": asked, "kind": world.device.type, "gpu": _gpu(world.device)}  # fmt: skip
    compare(meeting.roll_call(state), place)
    gpu = world.device.type == "cuda"
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=PrefixStore("group", meeting.store), rank=place.rank,
        world_size=place.size, timeout=COLLECTIVE_TIMEOUT, device_id=world.device if gpu else None,
    )  # fmt: skip
    ranks = world.gather_json(place.rank)
    if dist.get_world_size() != place.size or ranks != list(range(place.size)):
        what = f"{place.launcher} promised {place.size} ranks; the process group has {dist.get_world_size()}: {ranks}"
        raise UsageError(what, where=place.launcher, hint="start them with torchrun or srun")
    return world


def compare(states: list[dict[str, Any]], place: Place) -> None:
    """UsageError where the ranks do not belong to one training; the same one on every rank."""
    differs = {
        "size": ("other numbers of ranks", "the same --nnodes and --nproc-per-node on every node"),
        "version": ("other versions of bnfctl", "install the same one on every node"),
        "torch": ("other versions of torch", "install the same one on every node"),
        "asked": ("other configs", "the same command on every node"),
        "kind": ("other kinds of device", "all on GPUs or all on CPUs"),
    }
    for name, (what, hint) in differs.items():
        for state in states:
            if state[name] != states[0][name]:
                both = "" if name == "asked" else f" ({states[0][name]} and {state[name]})"
                raise UsageError(f"rank 0 and rank {state['rank']} have {what}{both}", where=place.launcher, hint=hint)
    users: dict[str, int] = {}
    for state in states:
        if state["gpu"] is not None and users.setdefault(state["gpu"], state["rank"]) != state["rank"]:
            what = f"rank {users[state['gpu']]} and rank {state['rank']} share one GPU ({state['gpu']})"
            raise UsageError(what, where=place.launcher, hint="one rank for each GPU")


def _leave(meeting: _Meeting, error: BaseException | None) -> None:
    """Say that this rank is gone, and why; take the process group down where no one can be waiting in it."""
    told: BnfctlError | None = None
    if error is not None:
        told = error if isinstance(error, BnfctlError) else BnfctlError(f"{type(error).__name__}: {error}")
    meeting.heart.leave(told)
    # Taking NCCL down with a dead peer may wait for it.
    if dist.is_initialized() and (error is None or dist.get_backend() == "gloo"):
        dist.destroy_process_group()


@contextmanager
def _named_loss(meeting: _Meeting | None) -> Iterator[None]:
    """Turn torch's error of a collective that has lost a peer into one that names the peer."""
    try:
        yield
    except RuntimeError as error:
        if meeting is None or not (isinstance(error, dist.DistError) or _PEER.search(str(error))):
            raise
        raise meeting.heart.who() from error


def _device(place: Place) -> torch.device:
    """This rank's own GPU, made current; or the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return torch.device("cpu")
    # srun can bind each task to a GPU of its own, which is then the only one it sees.
    index = 0 if count == 1 and place.launcher == "srun" else place.local_rank
    if index >= count:
        what = f"{place.local_size} ranks on {platform.node()}, which has {count} visible GPUs"
        raise UsageError(what, where=place.launcher, hint=f"start at most {count} ranks on this node")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _gpu(device: torch.device) -> str | None:
    """Which GPU, for all nodes: two ranks on one is a mistake."""
    if device.type != "cuda":
        return None
    return f"{platform.node()}: {getattr(torch.cuda.get_device_properties(device), 'uuid', device.index)}"
