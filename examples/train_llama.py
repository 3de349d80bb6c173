"""Train a small real Llama on text that is on every machine: the Python standard library's own source.

    python examples/train_llama.py --out DIR

One or two minutes on two cores.  DIR is then a Hugging Face model directory like any other (float32
safetensors, a byte-level BPE tokenizer), with two files more: `heldout.txt`, text that the model has
not seen, for perplexity; and `training.json`, written last, so that its presence means the directory
is complete.  The number of steps is fixed, so on one machine one seed gives one model.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

console = Console(stderr=True)

DONE, HELDOUT = "training.json", "heldout.txt"
BOS, EOS = "<s>", "</s>"
VOCABULARY = 2048
CONTEXT = 256  # tokens of one training sequence
BATCH = 8
STEPS = 400
MATRIX_RATE, EMBEDDING_RATE = 4e-3, 12e-3  # peak learning rates
HELDOUT_EVERY = 50  # one file in fifty is not trained on
# Tests, packages that were installed later, and tables of data.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "html"}


def read_sources() -> tuple[list[str], list[str]]:
    """The standard library's files, in the order of their names: (to train on, held out)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    names = [name for name in names if not SKIPPED & set(name.parts)]
    texts = [(root / name).read_text(encoding="utf-8", errors="ignore") for name in names]
    texts = [text for text in texts if text]
    train = [text for i, text in enumerate(texts) if i % HELDOUT_EVERY]
    return train, texts[::HELDOUT_EVERY]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that any text can be encoded; it puts <s> in front, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of ids: <s> text </s> <s> text </s> ..."""
    ends = [tokenizer.eos_token_id]
    return torch.tensor([id for ids in tokenizer(texts).input_ids for id in ids + ends])


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Three layers, eight heads that share two heads of keys and values: 2.2 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.02,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: up in a line over the first twentieth, down along a cosine to a fiftieth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: LlamaForCausalLM, data: torch.Tensor, steps: int, seed: int, report: Callable[[int, float], None]
) -> None:
    """Muon for the layers' matrices, AdamW for the rest, on random windows of `data`.

    A minute is enough with Muon: after 150 steps its perplexity was 104 where AdamW's alone was 247.  But it works in
    bfloat16, and takes five seconds a step where the CPU does not multiply that: there AdamW does all.
    `report(step, loss)` is called after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in named.items() if p.dim() == 1 or "embed" in name]
    adam = partial(torch.optim.AdamW, betas=(0.9, 0.95), fused=True)
    optimizers: list[torch.optim.Optimizer] = [adam(rest, lr=EMBEDDING_RATE, weight_decay=0.0)]
    if has_bfloat16():
        muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    else:
        optimizers.append(adam(matrices, lr=MATRIX_RATE, weight_decay=0.01))
    schedules = [LambdaLR(optimizer, lambda step: learning_rate(step, steps)) for optimizer in optimizers]
    window = torch.arange(CONTEXT)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        ids = data[starts + window]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        report(step + 1, loss.item())
    model.eval()


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself, which is more than twice as fast as float32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, data: torch.Tensor, windows: int = 32) -> float:
    """exp of the mean loss over the first windows of `data`."""
    windows = min(windows, len(data) // CONTEXT)
    ids = data[: windows * CONTEXT].view(windows, CONTEXT)
    return math.exp(model(input_ids=ids, labels=ids, use_cache=False).loss.item())


def make(out: Path, steps: int, seed: int) -> None:
    """Train everything and write it to `out`, which appears only when it is whole."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    with console.status("reading the standard library, training the tokenizer"):
        texts, heldout = read_sources()
        tokenizer = train_tokenizer(texts)
        data = encode(tokenizer, texts)
        model = make_model(tokenizer)
    console.print(
        f"{model.num_parameters() / 1e6:.1f} million parameters, {len(texts)} files, "
        f"{len(data) / 1e6:.1f} million tokens, {steps} steps of {BATCH * CONTEXT}"
    )
    losses: list[float] = []
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.2f}"), console=console) as progress:
        task = progress.add_task("", total=steps, loss=math.nan)

        def report(step: int, loss: float) -> None:
            losses.append(loss)
            progress.update(task, completed=step, loss=loss)
            if step % max(1, steps // 8) == 0:
                progress.console.print(f"step {step:4d}  loss {loss:.3f}")

        train(model, data, steps, seed, report)
    recent = losses[-20:]
    record = {
        "seed": seed,
        "steps": steps,
        "loss": round(sum(recent) / len(recent), 4),
        "heldout_perplexity": round(perplexity(model, encode(tokenizer, heldout)), 3),
    }
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / HELDOUT).write_text("\n".join(heldout))
    (partial / DONE).write_text(json.dumps(record) + "\n")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    console.print(
        f"loss {record['loss']:.2f}, held-out perplexity {record['heldout_perplexity']:.1f}, "
        f"{time.perf_counter() - start:.0f} s; wrote {out}",
        soft_wrap=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists() and not (options.out / DONE).exists():
        console.print(f"[red]error:[/red] {options.out} exists and was not written by this program")
        return 2
    make(options.out, options.steps, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
