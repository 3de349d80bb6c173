"""Reads a Hugging Face checkpoint's safetensors one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_compile.errors import ModelError, UnsupportedError
from vllm_compile.spec import DUMMY_STD

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


class Checkpoint:
    """The tensors of a model directory, by name.

    A shard is opened for each tensor read and closed again, so that its pages do not
    stay mapped: a compile never holds more than the tensors it works on.

    Raises:
        ModelError: no safetensors, a shard missing, or a file that is not whole.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shard_of: dict[str, Path] = {}
        for shard in self._shards():
            with self._open(shard) as file:
                self._shard_of.update(dict.fromkeys(file.keys(), shard))

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._shard_of.keys()

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, in the dtype it was stored in."""
        if name not in self._shard_of:
            raise ModelError(f"{self.directory}: no tensor named {name!r} in its safetensors")
        with self._open(self._shard_of[name]) as file:
            return file.get_tensor(name).clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor called `name`; nothing else of it is read.

        Raises:
            UnsupportedError: it is not stored as plain floating-point numbers.
        """
        with self._open(self._shard_of[name]) as file:
            stored = file.get_slice(name)
        if stored.get_dtype() not in PLAIN_DTYPES:
            raise UnsupportedError(
                f"{self.directory}: {name} is stored as {stored.get_dtype()}: quantised checkpoints are not "
                "supported yet; compile the original weights"
            )
        return tuple(stored.get_shape())

    def _shards(self) -> list[Path]:
        index = self.directory / INDEX
        if not index.exists():
            if not (self.directory / SINGLE).exists():
                raise ModelError(
                    f"{self.directory}: neither {SINGLE} nor {INDEX} here; save the model as safetensors, "
                    "or pass --dummy-weights"
                )
            return [self.directory / SINGLE]
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            shards = [self.directory / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: not a safetensors index ({error})") from error
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise ModelError(f"{self.directory}: shard missing: {', '.join(missing)} (named in {INDEX})")
        return shards

    @staticmethod
    def _open(shard: Path):
        try:
            return safe_open(shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{shard}: cannot be read as safetensors ({error}); is the file whole?") from error


class DummyCheckpoint:
    """Gaussian weights made from a seed, for models of which only config.json is at hand.

    Matrices are drawn with standard deviation `DUMMY_STD`, vectors are ones (norm scales).
    A tensor depends on its name and the seed alone, never on the order of reads.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
        self._shapes, self._dtype, self._seed = shapes, dtype, seed

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) < 2:
            return torch.ones(shape, dtype=self._dtype)
        order = sorted(self._shapes).index(name)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + order)
        return torch.empty(shape, dtype=self._dtype).normal_(std=DUMMY_STD, generator=generator)
