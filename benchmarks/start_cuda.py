"""How long a compiled model takes to start behind vLLM on a GPU: from `import vllm` to the first token.

    python benchmarks/start_cuda.py ARTIFACT --starts 3     # ARTIFACT: of `compile --weightless --target cuda`

ARTIFACT gets random weights first, unless it has some: a start reads them, as it would a model's.  The first start is
no warm one: it reads modules from the disk, and the weights once more for their digests, which are remembered.  Modules
without bytecode are compiled at every start where Python cannot write it: the script says how many of torch's lack it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_compile.runtime.manifest import MANIFEST, PLAN, content_digest, is_weights, read_manifest, sha256
from vllm_compile.runtime.plan import from_json
from vllm_compile.runtime.program import Program
from vllm_compile.whole_file import write_whole

SHARD_BYTES = 1 << 29
OPTIONS = {"max_model_len": 4096}


class Weights(Program):
    """A program whose dummy weights are written to its artifact instead of used."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
        """Writes them as shards, and their digests into the manifest."""
        assert weights is not None
        paths = []
        for number, shard in enumerate(shards(weights), 1):
            paths.append(self.directory / f"model-{number:05d}.safetensors")
            save_file(shard, paths[-1], {"format": "pt"})
        with ThreadPoolExecutor() as pool:
            self.manifest["files"] |= zip((path.name for path in paths), pool.map(sha256, paths), strict=True)
        self.manifest["digest"] = content_digest(self.manifest)
        write_whole(self.directory / MANIFEST, json.dumps(self.manifest, indent=1, sort_keys=True) + "\n")


def shards(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The weights on the host, in groups of about SHARD_BYTES."""
    shard: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        shard[name] = tensor.cpu()
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def without_bytecode(package: Path) -> tuple[int, int]:
    """(modules whose bytecode is not there, modules) of a package in this folder."""
    modules = list(package.rglob("*.py"))
    return sum(not Path(importlib.util.cache_from_source(str(m))).exists() for m in modules), len(modules)


def start(artifact: Path) -> float:
    """Seconds until the first token, in a process of its own."""
    command = [sys.executable, "-m", "vllm_compile.bench_worker", "compiled", str(artifact), json.dumps(OPTIONS)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    return float(json.loads(done.stdout)["first_token"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    manifest, plan = read_manifest(options.artifact), from_json((options.artifact / PLAN).read_text())
    if not any(map(is_weights, manifest["files"])):
        Weights(options.artifact, plan, manifest).load_dummy_weights()
        torch.cuda.empty_cache()  # vLLM measures what is free
    absent, modules = without_bytecode(Path(torch.__file__).parent)
    print(f"{torch.cuda.get_device_name()}; {absent} of torch's {modules} modules have no bytecode", flush=True)
    for number in range(1, options.starts + 1):
        print(f"start {number}: first token after {start(options.artifact):.1f} s", flush=True)


if __name__ == "__main__":
    main()
