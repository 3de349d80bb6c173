"""The machine that a record was measured on, as far as times and kernels depend on it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

from vllm_compile.canonical import canonical, object_of, sha256

# What makes a record stale when it changes: who turns kernels into machine code, who launches them, and the meaning of
# the intrinsics that a trace names.
AGEING = ("driver", "tvm", "intrinsics")


@dataclass(frozen=True)
class Fingerprint:
    """A machine; "" and 0 where a field is unknown or does not apply.

    Attributes:
        kind: the target's name (`cpu`, `cuda`, ...).
        arch: instruction sets, as its compiler names them (`sm_90a`, `x86-64-v4 +avx512bf16`).
        device: what the vendor calls the chip.
        cores: CPU cores that may be used, or multiprocessors.
        core_mhz, memory_mhz: highest clocks.
        driver, toolkit, tvm: versions of the driver, of the compiler of device code, of TVM.
        intrinsics: version of this project's set of tensor intrinsics.
    """

    kind: str
    arch: str
    device: str
    cores: int
    core_mhz: int
    memory_mhz: int
    driver: str
    toolkit: str
    tvm: str
    intrinsics: int

    @cached_property
    def text(self) -> str:
        """Canonical JSON, all of it."""
        return canonical({field.name: getattr(self, field.name) for field in fields(self)})

    @cached_property
    def key(self) -> str:
        """SHA-256 of the text, in hex."""
        return sha256(self.text)

    @staticmethod
    def from_text(text: str) -> Fingerprint:
        """The machine that `text` is the canonical JSON of; ValueError if it is of none."""
        content = object_of(text)
        kinds = {field.name: {"str": str, "int": int}[str(field.type)] for field in fields(Fingerprint)}
        if {name: type(value) for name, value in content.items()} != kinds:
            raise ValueError("not a machine's fingerprint")
        return Fingerprint(**content)

    def summary(self) -> str:
        """For people, all that is known: `cuda sm_90a NVIDIA H200, cores 132, driver 580.82, tvm 0.27.0`."""
        name = [part for part in (self.kind, self.arch, self.device) if part]
        rest = [field.name for field in fields(self) if field.name not in ("kind", "arch", "device")]
        return ", ".join([" ".join(name), *(f"{each} {value}" for each in rest if (value := getattr(self, each)))])

    def describes(self, machine: Fingerprint) -> bool:
        """True if `machine` is this one, as far as this one is known."""
        known = (field.name for field in fields(self) if getattr(self, field.name))
        return all(getattr(self, name) == getattr(machine, name) for name in known)

    def changed_since(self, measured: Fingerprint) -> tuple[str, ...]:
        """Fields that make a record of the machine `measured` stale here; what either side does not know counts not."""
        pairs = ((name, getattr(self, name), getattr(measured, name)) for name in AGEING)
        return tuple(name for name, here, there in pairs if here and there and here != there)
