"""Tensors that say they are on an AMD GPU: kernels.so takes no others."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import tvm_ffi

ROCM = 10  # kDLROCM of dlpack.h
CODES = {torch.bfloat16: 4, torch.float32: 2, torch.int32: 0, torch.int64: 0, torch.uint8: 1, torch.uint16: 1}


class _Tensor(ctypes.Structure):  # DLManagedTensor
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ]


lent: dict[int, OnGpu] = {}  # by address of what a consumer holds, until it gives it back
_give_back = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda address: lent.pop(address) and None)


class OnGpu:
    """`tensor`, in host memory, as DLPack of GPU `device`."""

    def __init__(self, tensor: torch.Tensor, device: int = 0) -> None:
        axes = ctypes.c_int64 * tensor.dim()
        self._kept = tensor, axes(*tensor.shape), axes(*tensor.stride())
        self._managed = _Tensor(
            data=tensor.data_ptr(),
            device_type=ROCM,
            device_id=device,
            ndim=tensor.dim(),
            code=CODES[tensor.dtype],
            bits=tensor.element_size() * 8,
            lanes=1,
            shape=self._kept[1],
            strides=self._kept[2],
            deleter=_give_back,
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return ROCM, self._managed.device_id

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        address = ctypes.addressof(self._managed)
        lent[address] = self
        return new(address, b"dltensor", None)


def call(kernel: Any, *tensors: torch.Tensor, device: int = 0) -> None:
    """Call a function of kernels.so with host tensors as those of a GPU."""
    kernel(*(tvm_ffi.from_dlpack(OnGpu(tensor, device)) for tensor in tensors))
