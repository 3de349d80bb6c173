"""Reads an AMDGPU code object as HIP does: ELF, and the metadata note (LLVM, "User Guide for AMDGPU Backend")."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from typing import Any

import msgspec

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
NOTE = struct.Struct("<III")
PT_NOTE, NT_AMDGPU_METADATA, EM_AMDGPU = 4, 32, 224
MACHINES = {0x3F: "gfx90a", 0x4C: "gfx942", 0x4F: "gfx950"}  # EF_AMDGPU_MACH, of e_flags


def image_at(address: int) -> bytes:
    """The ELF file that starts there; its section headers end it."""
    header = HEADER.unpack(ctypes.string_at(address, HEADER.size))
    return ctypes.string_at(address, header[6] + header[11] * header[12])


def machine(elf: bytes) -> str:
    """The processor it is for, as LLVM calls it."""
    magic, _, kind, _, _, _, _, flags, *_ = HEADER.unpack_from(elf)
    assert magic.startswith(b"\x7fELF\x02\x01\x01\x40"), "64 bits, little endian, of HSA"
    assert kind == EM_AMDGPU
    return MACHINES[flags & 0xFF]


def kernels(elf: bytes) -> dict[str, Mapping[str, Any]]:
    """What the metadata says of each kernel, by name."""
    _, _, _, _, _, at, _, _, _, size, count, *_ = HEADER.unpack_from(elf)
    for i in range(count):
        kind, _, offset, _, _, length, _, _ = SEGMENT.unpack_from(elf, at + i * size)
        if kind != PT_NOTE:
            continue
        name_size, description_size, note = NOTE.unpack_from(elf, offset)
        start = offset + NOTE.size + -(-name_size // 4) * 4
        if note == NT_AMDGPU_METADATA:
            assert start + description_size <= offset + length
            metadata = msgspec.msgpack.decode(elf[start : start + description_size])
            return {kernel[".name"]: kernel for kernel in metadata["amdhsa.kernels"]}
    raise AssertionError("a code object has a metadata note")
