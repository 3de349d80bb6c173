"""A compiled model, loaded: the callable that an engine drives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_compile import lossless
from vllm_compile.cache import user_cache
from vllm_compile.errors import ArtifactError
from vllm_compile.file_digests import FileDigests
from vllm_compile.spec import DUMMY_STD, TensorSpec
from vllm_compile.targets import cuda, gaudi, resolve, rocm

from . import manifest as artifact
from . import tpc_kernels
from .bind import Kernel
from .buckets import BucketPlan, read_buckets
from .executor import Executor, load_kernels
from .plan import KernelStep, Plan, TorchStep, from_json
from .torch_executor import TorchExecutor
from .upload import upload

Observer = Callable[[int, torch.Tensor], None]


def device_of(target: str) -> torch.device:
    """Where programs for a target run, which may be named as `--target` is.

    Raises:
        TargetError: there is no such target.
    """
    name = resolve(target).name  # of h100: cuda
    if name in gaudi.TARGETS:
        return tpc_kernels.device()
    return torch.device("cuda" if name in (cuda.NAME, rocm.NAME) else "cpu")  # torch calls HIP devices so too


class Program:
    """A compiled model with its weights.

    Attributes:
        num_layers, num_heads, num_kv_heads, head_dim, hidden_size, vocab_size: shape of the model.
        cache_width: columns that a cached token takes in each KV head.
        max_positions, long_positions: of a sequence; see `ModelShape`.
        buckets: what it was compiled with, None if without: each batch runs in its own shape.
        dtype: of weights, activations and KV cache.
        device: where they are, and all arguments of a call must be.
    """

    def __init__(self, directory: Path, plan: Plan, manifest: dict[str, Any]) -> None:
        self.directory, self.plan, self.manifest = directory, plan, manifest
        model = plan.model
        self.num_layers, self.num_heads, self.num_kv_heads = (
            model.num_layers,
            model.num_heads,
            model.num_kv_heads,
        )
        self.head_dim, self.hidden_size, self.vocab_size = model.head_dim, model.hidden_size, model.vocab_size
        self.cache_width = model.cache_width
        self.max_positions, self.long_positions = model.max_positions, model.long_positions
        self.dtype: torch.dtype = getattr(torch, model.dtype)
        self.device = device_of(manifest["target"]["name"])
        self.buckets = _buckets(directory)
        self._executor: Executor | TorchExecutor = (
            TorchExecutor(plan, self.device, self.buckets)
            if plan.runs_in_torch
            else Executor(plan, self.kernels(), self.device)
        )
        self._caches = [f"kv_{layer}" for layer in range(model.num_layers)]
        self._tokens: torch.Tensor | None = None  # where torch finds them; no device is touched before it is asked for

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
        """Take the weights into use: on a CPU where they are (those of the artifact mapped), else on the device.

        Args:
            weights: (name, tensor) pairs as in the artifact's safetensors; None maps those.

        Raises:
            ArtifactError: a weight is missing, unknown, or of another shape or dtype than the plan says;
                or a file of the artifact's is damaged.
        """
        if weights is None:
            # Their digests are remembered: to read 12 GB once more takes longer than to load them.
            digests = FileDigests(user_cache())
            artifact.check_files(self.directory, self.manifest, artifact.is_weights, digests.sha256)
        wanted = self._weight_specs()
        loaded = dict(weights if weights is not None else read_weights(self.directory))
        for name, spec in wanted.items():
            tensor = loaded.get(name)
            if tensor is None:
                raise ArtifactError(f"{self.directory}: weight {name!r} is missing; compile again")
            if list(tensor.shape) != spec.sizes() or tensor.dtype != getattr(torch, spec.dtype):
                raise ArtifactError(f"{self.directory}: weight {name!r} is not as plan.json says; compile again")
        if unknown := loaded.keys() - wanted.keys():
            raise ArtifactError(f"{self.directory}: {min(unknown)!r} is no weight of this program")
        placed = upload(loaded, self.device)
        self._executor.set_weights(placed | self._restored(placed))

    def load_dummy_weights(self, seed: int = 0) -> None:
        """Gaussian weights of deviation 0.02 (vectors: ones; packed for a CPU: zeros): to time, not to serve."""
        specs = self._all_specs()
        plain_of = {source: name for name, source in self.plan.restored.items()}
        generator = torch.Generator(self.device).manual_seed(seed)

        def make(name: str) -> torch.Tensor:
            spec = specs[plain_of.get(name, name)]
            if spec.dtype == "uint8":
                return torch.zeros(spec.sizes(), dtype=torch.uint8, device=self.device)
            weight = torch.ones(spec.sizes(), dtype=getattr(torch, spec.dtype), device=self.device)
            if weight.dim() > 1:
                weight.normal_(std=DUMMY_STD, generator=generator)
            return lossless.pack(weight) if name in plain_of else weight

        self.load_weights((name, make(name)) for name in self._weight_specs())

    def weight_bytes(self) -> int:
        """Bytes of all weights once loaded, restored copies included."""
        return sum(spec.nbytes() for spec in self._all_specs().values())

    def stored_bytes(self) -> int:
        """Bytes of the weights as they are stored, which a decode step reads, if it is not of experts."""
        return sum(spec.nbytes() for spec in self._weight_specs().values())

    def prepare(self, max_tokens: int, max_requests: int = 0) -> None:
        """Allocate scratch memory for batches of up to `max_tokens` tokens, and logits of `max_requests` rows."""
        self._executor.prepare(max(max_tokens, max_requests), max_requests)
        if "greedy" not in self.plan.functions:
            self._tokens = torch.zeros(max_requests, 1, dtype=torch.int64, device=self.device)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv: Sequence[torch.Tensor],
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        slot_mapping: torch.Tensor,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """One step of the model: prefill, decode, or both mixed.

        Args:
            input_ids: int32 [T], token ids of all requests, one request after the other.
            positions: int64 [T], position of each token in its request.
            kv: per layer the paged KV cache [blocks, kv_heads, block_size, cache_width], K then V in
                the last axis, which must be contiguous; the outer strides are free.  Written in place.
            block_table: int32 [R, W], the blocks of each request in order.
            seq_lens: int32 [R], cached tokens of each request including this step's; 0 for an empty row.
            query_start_loc: int32 [R + 1], where each request's tokens start.
            slot_mapping: int64 [T], block * block_size + offset where each token is cached, as its request's row of
                `block_table` has it, or -1 for none.
            observer: called as `observer(layer, hidden [T, D])` before each layer; it may overwrite `hidden`.

        Returns:
            hidden states [T, D] for `logits`, valid until the next call.

        Raises:
            ValueError, TypeError: an argument has another shape or dtype than the above.
        """
        if query_start_loc.shape[0] != seq_lens.shape[0] + 1:
            raise ValueError(
                f"query_start_loc has {query_start_loc.shape[0]} entries; "
                f"for {seq_lens.shape[0]} requests it needs {seq_lens.shape[0] + 1}"
            )
        inputs = {
            "input_ids": input_ids,
            "positions": positions,
            **dict(zip(self._caches, kv, strict=True)),
            "block_table": block_table,
            "seq_lens": seq_lens,
            "query_start_loc": query_start_loc,
            "slot_mapping": slot_mapping,
        }
        tokens = input_ids.shape[0]
        # As many tokens as requests: each decodes one.  (If not, the kernels that are chosen are right all the same.)
        return self._executor.run("forward", tokens, inputs, observer, prefill=tokens != seq_lens.shape[0])

    __call__ = forward

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, D] -> logits [S, V] in the model's dtype, valid until the next call."""
        return self._executor.run("logits", hidden.shape[0], {"hidden": hidden.contiguous()})

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """Most probable tokens: logits [S, V] -> int64 [S, 1], of equal ones the first; valid until the next call."""
        rows = logits.shape[0]
        if "greedy" in self.plan.functions:
            return self._executor.run("greedy", rows, {"logits": logits.contiguous()})
        if self._tokens is None or rows > len(self._tokens):
            self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        return torch.argmax(logits, dim=-1, keepdim=True, out=self._tokens[:rows])

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings: int [T] -> [T, D]."""
        steps = self.plan.functions["forward"].steps
        arguments = (
            [argument for _, argument in s.inputs] if isinstance(s, TorchStep) else list(s.arguments)
            for s in steps
            if isinstance(s, KernelStep | TorchStep)
        )
        table = next(given[1].buffer for given in arguments if given[0].buffer == "input_ids")
        return self._executor.weight(table)[input_ids.long()]

    def kernels(self) -> Callable[[str], Kernel]:
        """The kernels of the artifact by symbol."""
        return load_kernels(self.directory / artifact.LIBRARY)

    def set_plan(self, plan: Plan) -> None:
        """Run this plan from now on, which differs from the artifact's in its kernels only."""
        self.plan = plan
        self._executor.set_plan(plan)

    def _weight_specs(self) -> dict[str, TensorSpec]:
        """Of the weights that are stored."""
        return {name: spec for name, spec in self._all_specs().items() if name not in self.plan.restored}

    def _all_specs(self) -> dict[str, TensorSpec]:
        entries = (self.plan.functions["forward"], self.plan.functions["logits"])
        return {a.buffer: a.spec for function in entries for a in function.weights}

    def _restored(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Plain copies, on the device, of the lossless weights that a vendor's functions read too."""
        specs = self._all_specs()
        return {
            name: lossless.unpack(stored[source], specs[name].size(0), specs[name].size(1))
            for name, source in self.plan.restored.items()
        }


def load(directory: str | Path, weights: bool = True) -> Program:
    """Load an artifact onto its device; every file is compared with its SHA-256 before it is used.

    Weights that have not changed since they were last read are not read again for it; see `FileDigests`.

    Args:
        directory: what `compile` wrote.
        weights: load the weights too; if False, call `Program.load_weights` later.

    Raises:
        ArtifactError: the artifact is damaged, of another schema, or made for another CPU.
        TargetError: it is made for a GPU that this machine does not have.
    """
    directory = Path(directory)
    manifest = artifact.read_manifest(directory)
    artifact.check_machine(directory, manifest)
    artifact.check_files(directory, manifest, lambda name: not artifact.is_weights(name))
    try:
        plan = from_json((directory / artifact.PLAN).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{directory / artifact.PLAN}: not a plan ({error})") from error
    program = Program(directory, plan, manifest)
    if weights:
        program.load_weights()
    return program


def _buckets(directory: Path) -> BucketPlan | None:
    """The bucket plan of an artifact, if it was compiled with one."""
    path = directory / artifact.BUCKETS
    return read_buckets(path) if path.exists() else None


def read_weights(directory: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """The stored weights, one at a time, mapped from the artifact's safetensors."""
    for shard in sorted(directory.glob("model-*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, file.get_tensor(name)
