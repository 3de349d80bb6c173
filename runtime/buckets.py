"""Buckets: the shapes that a chip with static graphs has graphs of, and the file that names them.

A graph of a bucket runs every step that is no larger in any of three sizes; what the step lacks is padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vllm_compile.errors import BucketError
from vllm_compile.whole_file import write_whole

SCHEMA = 1


class Bucket(NamedTuple):
    """The shape of a step, or of a graph.

    Attributes:
        batch: requests.
        queries: tokens of each request; 1 where they decode.
        blocks: blocks of the KV cache that attention reads, of all requests together: where they decode all of
            them, else those of earlier steps.
    """

    batch: int
    queries: int
    blocks: int

    @property
    def decodes(self) -> bool:
        return self.queries == 1

    def covers(self, step: Bucket) -> bool:
        """True if a graph of this bucket can run the step: a decode in one of decodes, a prefill in one of prefills."""
        larger = self.batch >= step.batch and self.queries >= step.queries and self.blocks >= step.blocks
        return larger and self.decodes == step.decodes


@dataclass(frozen=True)
class Limits:
    """What a server is started with.

    Attributes:
        max_requests: that run at once (vLLM's max_num_seqs).
        max_tokens: of one step (max_num_batched_tokens).
        max_length: of a request, its output included (max_model_len).
        block_size: tokens of a block of the KV cache.
        cache_blocks: of the whole KV cache.
    """

    max_requests: int
    max_tokens: int
    max_length: int
    block_size: int
    cache_blocks: int

    def __post_init__(self) -> None:
        if min(self.max_requests, self.max_length, self.block_size, self.cache_blocks) < 1 or self.max_tokens < 2:
            raise BucketError(f"limits must be 1 or more, of a step's tokens 2 or more: {self}")

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens of one request take."""
        return -(-tokens // self.block_size)

    @property
    def largest(self) -> tuple[Bucket, Bucket]:
        """Buckets that any step fits into: of decodes, and of a prompt's chunk."""
        longest = self.blocks(self.max_length)
        decode = Bucket(self.max_requests, 1, min(self.max_requests * longest, self.cache_blocks))
        context = min(self.blocks(self.max_length - 1), self.cache_blocks)
        return decode, Bucket(1, min(self.max_tokens, self.max_length), context)


@dataclass(frozen=True)
class Work:
    """What a step costs at a chip's peaks, in microseconds: its padding is what its bucket costs more.

    Attributes:
        token: of each token that is computed.
        block: of each block of the KV cache that is read.
    """

    token: float
    block: float

    def of(self, shape: Bucket) -> float:
        return shape.batch * shape.queries * self.token + shape.blocks * self.block


@dataclass(frozen=True)
class BucketPlan:
    """Buckets, without doubles and in order, and what their padding is measured by.

    Attributes:
        block_size: tokens of a block of the KV cache.
    """

    buckets: tuple[Bucket, ...]
    work: Work
    block_size: int

    def find(self, step: Bucket) -> Bucket | None:
        """The bucket that runs a step with the least work, None if none can."""
        return min((b for b in self.buckets if b.covers(step)), key=self.work.of, default=None)

    def check(self, limits: Limits) -> None:
        """See that every step within a server's limits has a bucket.

        Raises:
            BucketError: one has none; or the blocks are of another size.
        """
        if self.block_size != limits.block_size:
            raise BucketError(
                f"the buckets are for KV blocks of {self.block_size} tokens, not {limits.block_size}: "
                f"serve with --block-size {self.block_size}, or plan for others"
            )
        for largest in limits.largest:
            if self.find(largest) is None:
                raise BucketError(
                    f"no bucket covers {list(largest)} (requests, tokens of each, KV blocks), which may come with "
                    f"--max-num-seqs {limits.max_requests} --max-num-batched-tokens {limits.max_tokens} "
                    f"--max-model-len {limits.max_length} --num-gpu-blocks-override {limits.cache_blocks}: "
                    "lower them to what was planned for, or plan for these"
                )

    def prune(self, used: Iterable[Bucket]) -> BucketPlan:
        """The plan without the buckets that are not among `used`; the largest stay: those that no other covers."""
        kept = {*used, *(b for b in self.buckets if not any(o.covers(b) for o in self.buckets if o != b))}
        return BucketPlan(tuple(b for b in self.buckets if b in kept), self.work, self.block_size)

    def write(self, path: Path) -> None:
        """Write the bucket file, one bucket a line.

        Raises:
            BucketError: it cannot be written.
        """
        head = {
            "schema": SCHEMA,
            "block_size": self.block_size,
            "work_us": {"token": self.work.token, "block": self.work.block},
        }
        lines = ",\n  ".join(json.dumps(list(bucket)) for bucket in self.buckets)
        text = json.dumps(head, indent=1)[:-2] + f',\n "buckets": [\n  {lines}\n ]\n}}\n'
        try:
            write_whole(path, text)
        except OSError as error:
            raise BucketError(f"{path}: cannot be written ({error.strerror})") from error


def read_buckets(path: Path) -> BucketPlan:
    """The plan in a bucket file.

    Raises:
        BucketError: there is no such file, or it is none of this version; what is wrong with it is said.
    """
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise BucketError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BucketError(f"{path}: not a bucket file ({error})") from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise BucketError(f"{path}: not a bucket file of schema {SCHEMA}; plan the buckets again")
    try:
        work = Work(float(raw["work_us"]["token"]), float(raw["work_us"]["block"]))
        block_size, listed = int(raw["block_size"]), list(raw["buckets"])
    except (KeyError, TypeError, ValueError) as error:
        raise BucketError(f"{path}: work_us, block_size or buckets is missing or wrong ({error!r})") from error
    buckets = tuple(_bucket(path, number, value) for number, value in enumerate(listed, 1))
    if not buckets:
        raise BucketError(f"{path}: has no bucket")
    if len(set(buckets)) < len(buckets):
        double = next(b for n, b in enumerate(buckets) if b in buckets[:n])
        raise BucketError(f"{path}: bucket {list(double)} is there twice")
    return BucketPlan(tuple(sorted(buckets)), work, block_size)


def _bucket(path: Path, number: int, value: object) -> Bucket:
    whole = isinstance(value, list) and len(value) == len(Bucket._fields) and all(type(n) is int for n in value)
    if not isinstance(value, list) or not whole or min(value[:2]) < 1 or value[2] < 0:
        raise BucketError(
            f"{path}: bucket {number} is {json.dumps(value)}; it must be [batch, queries, blocks], "
            "whole numbers from 1, 1 and 0 on"
        )
    return Bucket(*value)
