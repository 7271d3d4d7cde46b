"""Many processes that compute as one: torchrun starts them, one a device, and they tell each other what is here.

For a process alone each of these functions gives what it is given.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from rkd_cli.errors import RunError, first_line
from rkd_cli.runtime import signals
from rkd_cli.runtime.processes import SAYS

TIME_LIMIT = timedelta(minutes=10)  # for an answer of the others: epochs are in step, saving and decoding take seconds
_SECONDS_BETWEEN_LOOKS = 0.05
_LARGE = 1 << 16  # elements, that are worth a message of their own


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those that compute one run.

    All but ``share`` have to be called by every process, in one order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and draws."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """Which rows of ``total`` are this rank's; the shares follow each other and differ by one row at most."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in their order, on each of them.

        A gradient flows to this rank's own rows alone and needs no word of the others: whoever takes a loss of what is
        given has the whole loss on every rank, and the sum over the ranks is its gradient (``sum_gradients``).

        Args:
            rows: (n, ...); n may differ between ranks.
        Returns:
            (N, ...).
        """
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        own, counts = rows.detach(), self.sum(counts)  # on the CPU: some 0.2 ms, and no device waits
        most = int(counts.max())
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        every = [torch.empty_like(padded) for _ in range(self.size)]
        _told(lambda: dist.all_gather(every, padded))
        parts = [part[:count] for part, count in zip(every, counts.tolist(), strict=True)]
        parts[self.rank] = rows
        return torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, without a gradient; the same bits on all."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        _told(lambda: dist.all_reduce(total))
        return total

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Make each the sum over the ranks: large ones where they lie, the many small ones in one buffer.

        Args:
            tensors: without gaps, each with one order of its dimensions in memory on all ranks.
        """
        large = [tensor for tensor in tensors if tensor.numel() >= _LARGE]
        small = [tensor for tensor in tensors if tensor.numel() < _LARGE]
        buffers = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in large]
        if small:
            buffers.append(torch.cat([tensor.flatten() for tensor in small]))

        def tell() -> None:
            for work in [dist.all_reduce(buffer, async_op=True) for buffer in buffers]:
                work.wait()

        _told(tell)
        sums = torch.split(buffers[-1], [tensor.numel() for tensor in small]) if small else ()
        for tensor, total in zip(small, sums, strict=True):
            tensor.copy_(total.view(tensor.shape))

    def mean(self, mean: Tensor, count: int, total: int) -> Tensor:
        """From a mean over this rank's images that over all, whose gradient is this rank's part of it.

        Args:
            mean: () over this rank's ``count``.
            count: of ``total`` images.
        """
        if self.size == 1:
            return mean
        part = mean * (count / total)
        return self.sum(part) + (part - part.detach())  # the same bits on all

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers: how they agree. On the CPU, so that no device waits; some 0.2 ms."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        _told(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether it is so on one of them."""
        return bool(self.largest(flag))

    def stop_requested(self) -> bool:
        """Whether a signal has come to one of them."""
        return signals.heard(self.largest(signals.asked()), self.is_first)

    def wait(self) -> None:
        """Until all are here, however long that takes: one may be decoding images.

        Raises:
            RunError: another process has ended.
        """
        if self.size > 1:
            key = _World.next_key()
            _World.store.add(key, 1)
            _wait_until(lambda: _World.store.add(key, 0) == self.size)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Go through the block alone if this is the first rank, and else after that one has: what it fetches, decodes
        and refuses is there then, and done once.

        Raises:
            RunError: the first one has ended.
        """
        if self.size == 1:
            yield
            return
        key = _World.next_key()
        if not self.is_first:
            _wait_until(lambda: bool(_World.store.check([key])))
        yield
        if self.is_first:
            _World.store.set(key, "")


ALONE = Ranks()


class _World:
    """The store that the processes of one start share, of torchrun's agent, so that it outlives each of them."""

    store: Any = None
    of_all_starts: Any = None  # the same, of those that were started before too
    keys = 0

    @classmethod
    def next_key(cls) -> str:
        cls.keys += 1
        return f"rkd {cls.keys}"


def ranks() -> Ranks:
    """Who this process is."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


def join() -> None:
    """Come together with the other processes that torchrun has started, whose environment says who this one is.

    Raises:
        RunError: they did not come.
    """
    signals.take_turns()
    # of a tensor on the CPU gloo tells the others, of one on a GPU nccl
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIME_LIMIT))
        # the agent keeps it for those that it starts again, who must not take the addresses of the dead for theirs
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _World.of_all_starts = store
        _World.store = distributed_c10d.PrefixStore(f"rkd {attempt}", store)
        store = distributed_c10d.PrefixStore("process group", _World.store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIME_LIMIT)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes that torchrun started did not come together ({first_line(error)})") from None


def remember_begun(directory: Path) -> None:
    """Have those that torchrun starts in place of these know that a run is theirs."""
    if _World.of_all_starts is not None:
        _World.of_all_starts.set(f"rkd began {directory.resolve()}", "")


def has_begun(directory: Path) -> bool:
    """Whether these processes, or those in whose place they were started, have begun the run."""
    return _World.of_all_starts is not None and bool(_World.of_all_starts.check([f"rkd began {directory.resolve()}"]))


def leave() -> None:
    """The counterpart of ``join``, for a process that has done all it should."""
    if dist.is_initialized():
        dist.destroy_process_group()


def conclude(code: int) -> tuple[int, bool]:
    """How a process that fails ends, so that all end as one.

    Args:
        code: its exit code, not 0.
    Returns:
        The exit code of the one that failed first, and whether that is this one, which is to say why.
    """
    if _World.store is None:
        return code, True
    try:
        if _World.store.add("ended", 1) == 1:
            _World.store.set("exit code", str(code))
            return code, True
        return int(_World.store.get("exit code")), False
    except RuntimeError:  # the agent, and its store with it, is gone
        return code, False


def _told(tell: Callable[[], object]) -> None:
    try:
        tell()
    except RuntimeError as error:  # what gloo and nccl raise
        limit = int(TIME_LIMIT.total_seconds()) // 60
        raise RunError(
            f"another process of this run ended, perhaps killed, or gave no answer in {limit} minutes "
            f"({first_line(error)}): run the command again, a training with --resume"
        ) from None


def _wait_until(it_is_so: Callable[[], bool]) -> None:
    try:
        while not it_is_so():
            if signals.asked():  # by torchrun too, whose other processes were killed
                raise signals.Stopped(signals.asked())
            if _World.store.check(["ended"]):
                raise RunError("another process of this run ended")  # which says itself why
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    except RuntimeError as error:
        raise RunError(f"torchrun, which started this process, is gone ({first_line(error)})") from None


def launch(processes: int, arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Run this program in so many processes of this machine, as torchrun does.

    Args:
        processes: how many.
        arguments: of the command line.
    Returns:
        The exit code, and what the process that failed first had to say; while others draw, it would be lost.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # of the agent: the processes say themselves what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds, for a step and to save it
    with TemporaryDirectory(prefix="rkd-") as scratch:
        says = Path(scratch, "says")
        os.environ[SAYS] = str(says)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            run_id=uuid4().hex,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
        )
        code = 0
        try:
            elastic_launch(config, sys.executable)("-m", "rkd_cli", *arguments)
        except ChildFailedError as error:
            # one that was killed has failed before those that missed it, which torchrun may see at the same moment
            killed = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode < 0]
            rank, failure = killed[0] if killed else error.get_first_failure()
            code = int(failure.exitcode)
            if code < 0:
                line = f"error: process {rank} was killed (signal {-code}), perhaps for memory: run the command again"
                says.write_text(f"{line}, a training with --resume\n", encoding="utf-8")
                code = 128 - code
        except SignalException as stopped:
            code = 128 + int(stopped.sigval)
        return code, says.read_text(encoding="utf-8").splitlines() if says.exists() else []
