"""Records of made-up kernels."""

from __future__ import annotations

import random

from vllm_compile.schedules.database import Fingerprint, How, Provenance, Record, Schedule, Times, Verdict, Workload
from vllm_compile.spec import OpSpec, Sym, TensorSpec

H200 = Fingerprint("cuda", "sm_90a", "NVIDIA H200", 132, 1980, 3201, "580.82", "13.0", "0.27.0.post1", 1)
CPU = Fingerprint("cpu", "x86-64-v4", "a CPU", 2, 0, 0, "", "", "0.27.0.post1", 1)


def linear(N: int = 4096, K: int = 4096, tokens: tuple[int, int | None] = (1, 8)) -> Workload:
    x, weight = TensorSpec((Sym.TOKENS, K), "bfloat16"), TensorSpec((N, K), "bfloat16")
    out = TensorSpec((Sym.TOKENS, N), "bfloat16")
    return Workload.of_call(OpSpec("linear", (("x", x), ("weight", weight)), (out,)), {"weight": "lossless"}, tokens)


def record(
    workload: Workload | None = None,
    target: Fingerprint = H200,
    us: float = 10.0,
    config: dict | None = None,
    host: str = "alpha",
    how: How = How.MEASURED,
    verdict: Verdict | None = Verdict(1e-3, 1e-2, "device"),  # noqa: B008  (frozen)
    at: int = 1_750_000_000,
    family: str = "cuda.linear_lossless",
) -> Record:
    """A record; each argument says what is special about it."""
    return Record(
        workload or linear(),
        target,
        Schedule.of_family(family, config or {"kind": "stream", "warps": 8}),
        how,
        Times(us, us * 0.9, us * 1.2),
        2500.0,
        0.7,
        verdict,
        Provenance("a tester", at, host, "0123abc"),
    )


def random_records(seed: int, count: int, workloads: int = 200) -> list[Record]:
    """`count` different records of as many workloads, machines, hosts as a team may have."""
    rng = random.Random(seed)
    shapes = [linear(64 * (n + 1), 4096) for n in range(workloads)]
    return [
        record(
            rng.choice(shapes),
            rng.choice((H200, CPU)),
            rng.uniform(1, 1000),
            {"kind": "stream", "warps": rng.choice((4, 8, 16)), "number": n},
            f"host{rng.randrange(8)}",
        )
        for n in range(count)
    ]
