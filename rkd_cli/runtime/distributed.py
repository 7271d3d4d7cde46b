"""Communication between the processes that torchrun starts, one per device.

In a single process each function returns its argument.
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
from rkd_cli.runtime.processes import ERRORS_FILE

TIME_LIMIT = timedelta(minutes=10)  # to wait for other processes, which are seconds apart at most
_POLL_SECONDS = 0.05
_LARGE = 1 << 16  # elements from which a tensor is reduced on its own


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes.

    Every process must call the methods in the same order, except ``own_rows``.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the main process, which writes files and prints."""
        return self.rank == 0

    def own_rows(self, total: int) -> slice:
        """The rows of ``total`` that belong to this rank: consecutive slices whose sizes differ by at most one."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def gather(self, rows: Tensor) -> Tensor:
        """(N, ...) rows of all ranks from (n, ...) rows of each; n may differ.

        The gradient flows only to this rank's own rows. A loss of the result is the whole loss on every rank, and its
        gradient is the sum over the ranks.
        """
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        own, counts = rows.detach(), self.sum(counts)  # on the CPU: 0.2 ms without synchronizing the GPU
        most = int(counts.max())
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        every = [torch.empty_like(padded) for _ in range(self.size)]
        _communicate(lambda: dist.all_gather(every, padded))
        parts = [part[:count] for part, count in zip(every, counts.tolist(), strict=True)]
        parts[self.rank] = rows
        return torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, without gradient, bit-identical on all."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        _communicate(lambda: dist.all_reduce(total))
        return total

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; small ones are reduced in one buffer.

        Tensors must be dense, with the same strides on all ranks.
        """
        large = [tensor for tensor in tensors if tensor.numel() >= _LARGE]
        small = [tensor for tensor in tensors if tensor.numel() < _LARGE]
        buffers = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in large]
        if small:
            buffers.append(torch.cat([tensor.flatten() for tensor in small]))

        def reduce() -> None:
            for work in [dist.all_reduce(buffer, async_op=True) for buffer in buffers]:
                work.wait()

        _communicate(reduce)
        sums = torch.split(buffers[-1], [tensor.numel() for tensor in small]) if small else ()
        for tensor, total in zip(small, sums, strict=True):
            tensor.copy_(total.view(tensor.shape))

    def mean(self, mean: Tensor, count: int, total: int) -> Tensor:
        """The () mean over all ``total`` images from the mean over this rank's ``count``, with this rank's part of the
        gradient."""
        if self.size == 1:
            return mean
        part = mean * (count / total)
        return self.sum(part) + (part - part.detach())  # bit-identical on all ranks

    def largest(self, number: int) -> int:
        """The maximum over the ranks. On the CPU: 0.2 ms without synchronizing the GPU."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        _communicate(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank."""
        return bool(self.largest(flag))

    def stop_requested(self) -> bool:
        """Whether any rank has received a signal."""
        return signals.agree(self.largest(signals.received()), self.is_first)

    def wait(self) -> None:
        """Wait for all ranks without a time limit, because one may be decoding images."""
        if self.size > 1:
            key = _World.next_key()
            _World.store.add(key, 1)
            _wait_until(lambda: _World.store.add(key, 0) == self.size)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Run the block in the main process first, then in the others, so that downloads and caches are made once."""
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
    """The key-value store of torchrun's agent, which outlives the processes."""

    store: Any = None  # of the processes of one start
    all_starts: Any = None  # also of earlier starts
    keys = 0

    @classmethod
    def next_key(cls) -> str:
        cls.keys += 1
        return f"rkd {cls.keys}"


def ranks() -> Ranks:
    """The ``Ranks`` of this process."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


def join() -> None:
    """Join the process group of the processes that torchrun started."""
    signals.set_distributed()
    # gloo for tensors on the CPU, nccl for those on a GPU
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIME_LIMIT))
        # the store survives a restart by the agent, and must not give the new processes the addresses of the old
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _World.all_starts = store
        _World.store = distributed_c10d.PrefixStore(f"rkd {attempt}", store)
        store = distributed_c10d.PrefixStore("process group", _World.store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIME_LIMIT)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes that torchrun started cannot connect ({first_line(error)})") from None


def remember_begun(directory: Path) -> None:
    """Record for a restart by torchrun that these processes have started the run."""
    if _World.all_starts is not None:
        _World.all_starts.set(f"rkd began {directory.resolve()}", "")


def has_begun(directory: Path) -> bool:
    """Whether these processes, or those before a restart by torchrun, have started the run."""
    return _World.all_starts is not None and bool(_World.all_starts.check([f"rkd began {directory.resolve()}"]))


def leave() -> None:
    """Leave the process group after success."""
    if dist.is_initialized():
        dist.destroy_process_group()


def conclude(code: int) -> tuple[int, bool]:
    """The exit code of the process that failed first, and whether that is this one, which prints the error.

    ``code`` is the exit code of this process, not 0.
    """
    if _World.store is None:
        return code, True
    try:
        if _World.store.add("ended", 1) == 1:
            _World.store.set("exit code", str(code))
            return code, True
        return int(_World.store.get("exit code")), False
    except RuntimeError:  # the agent and its store are gone
        return code, False


def _communicate(call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:  # from gloo and nccl
        limit = int(TIME_LIMIT.total_seconds()) // 60
        raise RunError(
            f"another process of this run was killed, failed, or did not answer within {limit} minutes "
            f"({first_line(error)}). Run the command again, with --resume for a training."
        ) from None


def _wait_until(condition: Callable[[], bool]) -> None:
    try:
        while not condition():
            if signals.received():  # torchrun also sends one after another process was killed
                raise signals.Stopped(signals.received())
            if _World.store.check(["ended"]):
                raise RunError("another process of this run failed")  # that one prints why
            time.sleep(_POLL_SECONDS)
    except RuntimeError as error:
        raise RunError(f"torchrun, which started this process, has exited ({first_line(error)})") from None


def launch(processes: int, arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Run ``rkd ARGUMENTS`` in several processes of this machine, as torchrun does.

    Returns the exit code and the error lines of the process that failed first, which the live screen would overwrite.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # of the agent: the processes print their own errors
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds, to finish a step and save
    with TemporaryDirectory(prefix="rkd-") as scratch:
        errors = Path(scratch, "errors")
        os.environ[ERRORS_FILE] = str(errors)
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
            # a killed process failed first, even if torchrun sees those that lost contact with it at the same time
            killed = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode < 0]
            rank, failure = killed[0] if killed else error.get_first_failure()
            code = int(failure.exitcode)
            if code < 0:
                reason = f"error: process {rank} was killed (signal {-code}), perhaps because memory ran out."
                line = f"{reason} Run the command again, with --resume for a training."
                errors.write_text(f"{line}\n", encoding="utf-8")
                code = 128 - code
        except SignalException as stopped:
            code = 128 + int(stopped.sigval)
        return code, errors.read_text(encoding="utf-8").splitlines() if errors.exists() else []
