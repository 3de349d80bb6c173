"""What runs on a GPU machine alone: inputs of repeated decode steps, beside those of vLLM's own kernels.

    python -m tests.runtime.advance_step_cases     # a GPU, vLLM

Requests, lengths, tokens and blocks are random, at random places; some got a block since the step before.  Where this
writes nothing, there is what vLLM left of the step before, and all of it is compared.  The seed is printed.
"""

from __future__ import annotations

import argparse
import inspect
import random
import secrets
import sys
from collections.abc import Iterable

import torch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import combine_sampled_and_draft_tokens, prepare_pos_seq_lens

from vllm_compile.runtime.advance_step import advance_step

CASES, PLACES, TOKENS, VOCABULARY = 40, 300, 1024, 128256
LENGTHS = (64, 2000, 131072)  # of a request at most


class Case:
    """A step of random requests, which vLLM has prepared, and the step after it."""

    def __init__(self, rng: random.Random) -> None:
        self.size, self.longest = rng.choice([16, 32, 64, 128]), rng.choice(LENGTHS)
        self.requests = rng.choice([1, 2, 8, 33, 256])
        width = -(-self.longest // self.size)
        named = {"kernel_block_sizes": [self.size]}  # which vLLM 0.32 has no more
        known = inspect.signature(BlockTables).parameters
        more = {name: value for name, value in named.items() if name in known}
        self.tables = BlockTables([self.size], PLACES, TOKENS, [width], torch.device("cuda"), **more)
        places = rng.sample(range(PLACES), self.requests)
        self.places = self.of(places)
        self.computed = self.of([rng.randrange(self.longest - 2) for _ in range(PLACES)])
        # Some end with a block.
        for place in places[::3]:
            self.computed[place] = int(self.computed[place]) // self.size * self.size + self.size - 1
        self.computed.clamp_(max=self.longest - 2)
        self.prompts = self.computed.clone()
        self.sampled = torch.randint(VOCABULARY, (PLACES, 1), device="cuda")
        self.bounds = self.of(range(self.requests + 1))
        self.input_ids, self.seq_lens = self.of([-1] * TOKENS), self.of([-1] * PLACES)
        self.positions = torch.full((TOKENS,), -1, device="cuda")
        for place in places:
            first, count = rng.randrange(1 << 20), int(self.computed[place]) // self.size + 1
            self.tables.append_block_ids(place, (list(range(first, first + count)),), overwrite=True)
        self.tables.apply_staged_writes()
        self.prepare()
        self.computed[self.places.long()] += 1
        self.sampled.random_(VOCABULARY)
        for place in places:
            if int(self.computed[place]) % self.size == 0:
                self.tables.append_block_ids(place, ([rng.randrange(1 << 20)],), overwrite=False)
        self.tables.apply_staged_writes()

    def of(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device="cuda")

    def prepare(self) -> None:
        """As vLLM does it."""
        prepare_pos_seq_lens(self.places, self.bounds, self.computed, self.positions, self.seq_lens)
        drafts = torch.zeros(PLACES, 0, dtype=torch.int64, device="cuda")
        combine_sampled_and_draft_tokens(
            self.input_ids,
            self.places,
            self.sampled,
            self.bounds,
            self.seq_lens,
            self.prompts,
            drafts,
            self.bounds,
            self.requests,
        )
        padded = -(-self.requests // 8) * 8
        (self.table,) = self.tables.gather_block_tables(self.places, num_reqs_padded=padded)
        (self.slots,) = self.tables.compute_slot_mappings(self.places, self.bounds, self.positions, padded)

    def advance(self) -> None:
        advance_step(
            self.places,
            self.computed,
            self.sampled,
            self.tables.block_tables[0].gpu,
            self.tables.block_sizes_tensor,
            self.input_ids,
            self.positions,
            self.seq_lens,
            self.table,
            self.slots,
        )

    def inputs(self) -> list[torch.Tensor]:
        written = self.input_ids, self.positions, self.seq_lens, self.table, self.tables.slot_mappings
        return [tensor.clone() for tensor in written]


def differences(rng: random.Random) -> tuple[list[bool], list[bool]]:
    """Which inputs differ from vLLM's, advanced, and left as they were: that must be noticed."""
    case = Case(rng)
    before = case.inputs()
    case.advance()
    advanced = case.inputs()
    case.prepare()
    expected = case.inputs()
    wrong = [not torch.equal(*pair) for pair in zip(advanced, expected, strict=True)]
    return wrong, [torch.equal(*pair) for pair in zip(before, expected, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    seed = parser.parse_args().seed
    print(f"seed {seed}; {torch.cuda.get_device_name()}")
    rng, failed, grown = random.Random(seed), 0, 0
    torch.manual_seed(seed)
    for number in range(CASES):
        wrong, unnoticed = differences(rng)
        grown += not unnoticed[3]
        if any(wrong) or any(unnoticed[:3]) or unnoticed[4]:
            failed += 1
            print(f"case {number}: wrong {wrong}, unnoticed {unnoticed}")
    print(f"{CASES} steps, {failed} failed; blocks were new in {grown}")
    sys.exit(failed > 0 or grown == 0)


if __name__ == "__main__":
    main()
