"""Where candidates run: how tensors lie in a device's memory, and how long calls take there."""

from __future__ import annotations

import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from vllm_compile.bandwidth import read_bandwidth
from vllm_compile.runtime.executor import load_kernels, torch_stream
from vllm_compile.runtime.memory import allocate

from ..database.fingerprint import Fingerprint
from ..database.machine import with_gpu

Kernel = Callable[..., Any]
Call = partial[Any]  # of a kernel, with its arguments
GRAPH_CALLS = 64  # of a graph at least: what its start takes, some 10 us, is then little beside them
BROKEN = 70  # exit code of a process whose device answers no more


class Device(ABC):
    """Attributes:
    where: what torch calls it.
    """

    where: torch.device

    @property
    @abstractmethod
    def name(self) -> str:
        """What the vendor calls it."""

    def load(self, library: Path) -> Callable[[str], Kernel]:
        """The kernels of a library, by symbol."""
        return load_kernels(library)

    @abstractmethod
    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in memory of its own, as the runtime would have a weight."""

    def argument(self, tensor: torch.Tensor) -> Any:
        """What kernels take for an input."""
        return tvm_ffi.from_dlpack(tensor)

    def output(self, tensor: torch.Tensor) -> Any:
        """What kernels take for an output; see `read`."""
        return tvm_ffi.from_dlpack(tensor)

    def read(self, output: Any, tensor: torch.Tensor) -> None:
        """What a kernel has written to `output(tensor)` is in `tensor` when this returns: here it always is."""
        return

    @abstractmethod
    def run(self, call: Call) -> None:
        """Make a call; it has ended when this returns."""

    @abstractmethod
    def timer(self, calls: Sequence[Call]) -> Callable[[int], float]:
        """A clock: microseconds of one of these calls, which read weights of their own, at a turn of this number."""

    def bandwidth(self) -> float:
        """Bytes a second that it reads from its memory."""
        return read_bandwidth(self.where) * 1e9

    @abstractmethod
    def machine(self, built_for: Fingerprint) -> Fingerprint:
        """This machine, as far as the one that kernels were built on did not know it."""

    @abstractmethod
    def check(self) -> None:
        """End the process if the device answers no more: after a kernel's fault it does not, until then."""


class Cpu(Device):
    """This machine's own cores."""

    where = torch.device("cpu")

    @property
    def name(self) -> str:
        return platform.processor() or platform.machine()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """In huge pages, as the runtime maps weights."""
        memory = allocate(tensor.nbytes, self.where)
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def run(self, call: Call) -> None:
        call()

    def timer(self, calls: Sequence[Call]) -> Callable[[int], float]:
        """One call a turn, one after the other."""

        def taken(turn: int) -> float:
            began = time.perf_counter()
            calls[turn % len(calls)]()
            return (time.perf_counter() - began) * 1e6

        return taken

    def machine(self, built_for: Fingerprint) -> Fingerprint:
        return built_for

    def check(self) -> None:
        """A CPU's faults end the process by themselves."""


class Cuda(Device):
    """An NVIDIA GPU; calls are timed in a CUDA graph of all, several times over: they overlap as in a decode step."""

    where = torch.device("cuda")

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.where)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.where, copy=True)

    def run(self, call: Call) -> None:
        with torch_stream(self.where):
            call()
        torch.cuda.synchronize(self.where)

    def timer(self, calls: Sequence[Call]) -> Callable[[int], float]:
        graph, rounds = torch.cuda.CUDAGraph(), -(-GRAPH_CALLS // len(calls))
        with torch.cuda.graph(graph), torch_stream(self.where):
            for call in list(calls) * rounds:
                call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def taken(turn: int) -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e3 / (rounds * len(calls))

        return taken

    def machine(self, built_for: Fingerprint) -> Fingerprint:
        return with_gpu(built_for)

    def check(self) -> None:
        try:
            torch.cuda.synchronize(self.where)
        except RuntimeError:
            os._exit(BROKEN)


DEVICES: dict[str, type[Device]] = {"cpu": Cpu, "cuda": Cuda}  # by target
