"""What a target is: the facts about a machine that passes and kernels decide by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
        name: what `--target` says.
        tvm: configuration of TVM's target of the same machine.
        features: instruction sets that compiled code may use, in the words of /proc/cpuinfo;
            an artifact refuses to load where one of them is missing.
        vector_lanes: float32 lanes of one vector register.
        l1_bytes, l2_bytes: data cache per core.
    """

    name: str
    tvm: tuple[tuple[str, object], ...]
    features: frozenset[str]
    vector_lanes: int
    l1_bytes: int
    l2_bytes: int

    @property
    def resolved_by(self) -> str:
        """The name that `resolve` gives this target for."""
        return self.name

    def tvm_config(self) -> dict[str, object]:
        """The dictionary that `tvm.target.Target` takes."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.tvm}

    def described(self) -> dict[str, object]:
        """What an artifact's manifest says of it."""
        return {"name": self.name, "features": sorted(self.features), "tvm": self.tvm_config()}

    def has(self, feature: str) -> bool:
        return feature in self.features

    def attention_tile(self, columns: int, dtype_bytes: int) -> int:
        """Cached tokens whose K and V, so many `columns` together, fill half of the L1 cache: an online softmax's tile.

        The other half holds the scores and the accumulators.  A power of two between 16 and 128.
        """
        tokens = self.l1_bytes // 2 // (columns * dtype_bytes)
        return max(16, min(128, 1 << (tokens.bit_length() - 1)))
