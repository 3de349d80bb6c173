"""Records a trace of request lengths from real text: Python's standard library, tokenised.

    python -m benchmarks.record_trace --task complete --modules even --out benchmarks/traces/complete_even.json

Lengths are those of real text.  A request is a function of a module of the standard library that this Python runs on:
`complete` has the module up to the function's body as its prompt and the body as its output; `describe` has the
function's source as its prompt and its docstring as its output.  `--modules` takes every other module, so that two
traces have no text in common.  Tokens are those of a byte-level BPE of 16,384 entries, trained on all these modules.

When requests arrive is not recorded but drawn: a Poisson process whose rate changes between quiet and busy, seed 0.
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vllm_compile.bucketing.trace import Request, write_trace

VOCABULARY = 16384
PROMPT = 3072  # tokens before the body that are kept, as an editor would
OUTPUT = 1000
RATES = (0.02, 0.1, 0.3, 0.6)  # requests a step, in turn
TURN = 400  # steps


def sources() -> dict[str, str]:
    """The modules of the standard library by path, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"}
    paths = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    return {str(p.relative_to(root)): p.read_text(encoding="utf-8", errors="ignore") for p in paths}


def tokenizer(texts: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet))
    return made


def functions(text: str) -> Iterator[tuple[str, str, str]]:
    """Of each function: the module before its body, the body, and its docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            begin, end = node.body[0].lineno - 1, node.end_lineno
            yield "".join(lines[:begin]), "".join(lines[begin:end]), ast.get_docstring(node) or ""


def lengths(task: str, texts: list[str], count: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """(prompt, output) in tokens of `count` requests, drawn from all functions."""
    pairs = []
    for text in texts:
        for before, body, docstring in functions(text):
            pair = (before, body) if task == "complete" else (body, docstring)
            if all(pair):
                pairs.append(pair)
    chosen = generator.choice(len(pairs), size=min(count, len(pairs)), replace=False)
    encode = tokenizer(list(sources().values())).encode_batch
    prompts = encode([pairs[i][0][-8 * PROMPT :] for i in chosen])
    outputs = encode([pairs[i][1] for i in chosen])
    return [(min(len(p), PROMPT), min(len(o), OUTPUT)) for p, o in zip(prompts, outputs, strict=True)]


def arrivals(count: int, generator: np.random.Generator) -> list[int]:
    steps, step = [], 0
    while len(steps) < count:
        rate = RATES[step // TURN % len(RATES)]
        steps += [step] * int(generator.poisson(rate))
        step += 1
    return steps[:count]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("complete", "describe"), required=True)
    parser.add_argument("--modules", choices=("even", "odd"), required=True, help="which half of the modules")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    generator = np.random.default_rng(0)
    half = list(sources().values())[options.modules == "odd" :: 2]
    pairs = lengths(options.task, half, options.requests, generator)
    requests = [Request(step, *pair) for step, pair in zip(arrivals(len(pairs), generator), pairs, strict=True)]
    version = ".".join(map(str, sys.version_info[:3]))
    about = (
        f"Lengths of real text: functions of the {options.modules} modules of Python {version}'s standard library, "
        f"task {options.task}. Arrivals are drawn (Poisson, seed 0). See benchmarks/record_trace.py."
    )
    write_trace(options.out, about, requests)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
