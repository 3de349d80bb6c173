"""The whole way: train or fetch a model, compile it, serve it with vLLM, compare it with Hugging Face.

    python examples/demo.py                     # a small Llama, trained here
    python examples/demo.py --model DIR|NAME    # a model directory, or a name on the hub

What an earlier run trained or compiled is used again.  The exit code is 0 when the server answered, and, in
float32, answered with Hugging Face's tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

console = Console()

PROMPT = "def __init__(self, "
NEW_TOKENS = 48
START_LIMIT = 900  # seconds until /health answers
STOP_LIMIT = 15  # seconds from SIGTERM to SIGKILL
PORTS = range(20000, 30000)
LOG_TAIL = 15  # lines of the server's log shown when it fails
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "chat_template*", "merges.txt"]


class DemoError(Exception):
    """What went wrong, in one line, and what to look at."""


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of the prompt; `first` is seconds from the start to its first token."""

    tokens: list[int]
    first: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR|NAME", help="default: a small Llama, trained for this")
    parser.add_argument("--work", type=Path, default=Path(".demo"), metavar="DIR", help="default: .demo")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the model's own")
    parser.add_argument("--prompt", default=PROMPT, help=f"default: {PROMPT!r}")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` runs
    try:
        return demo(options.model, options.work, options.dtype, options.prompt)
    except DemoError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("[red]error:[/red] interrupted")
        return 130


def demo(name: str | None, work: Path, dtype: str | None, prompt: str) -> int:
    """Returns the exit code."""
    work.mkdir(parents=True, exist_ok=True)
    model = find_model(name, work)
    artifact = compiled(model, work, dtype)
    tokenizer, ids = encode(model, prompt)
    with serving(artifact, work / "serve.log") as server:
        server.wait()
        with console.status("asking for a completion"):
            ours = server.complete(ids)
    with console.status("asking Hugging Face"):
        theirs = hugging_face(model, ids, artifact_dtype(artifact))
    return show(tokenizer, prompt, ours, theirs, artifact_dtype(artifact))


def find_model(name: str | None, work: Path) -> Path:
    """The directory of the named model: trained, found, or downloaded."""
    if name is None:
        return trained(work / "model")
    if Path(name).is_dir():
        return Path(name)
    if not HUB_NAME.fullmatch(name):
        raise DemoError(f"{name} is neither a directory nor a name on the hub (owner/model)")
    return download(name)


def trained(directory: Path) -> Path:
    if (directory / "training.json").exists():
        step(f"{directory} is there already")
    else:
        script = Path(__file__).with_name("train_llama.py")
        # Threads that spin while they wait would lose to anything else that runs here.
        execute(sys.executable, str(script), "--out", str(directory), OMP_WAIT_POLICY="passive")
    return directory


def download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    step(f"downloading {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise DemoError(f"{name} cannot be downloaded: {str(error).strip().splitlines()[0]}") from error


def compiled(model: Path, work: Path, dtype: str | None) -> Path:
    """The model's artifact under `work`, compiled unless an earlier one is of this model still."""
    artifact = work / ".".join(filter(None, (model.resolve().name, dtype, "artifact")))
    if up_to_date(artifact, model):
        step(f"{artifact} is up to date")
        return artifact
    command = [installed("vllm-compile"), "compile", "--model", str(model), "--out", str(artifact)]
    execute(*command, *(("--dtype", dtype) if dtype else ()))
    return artifact


def up_to_date(artifact: Path, model: Path) -> bool:
    """Whether a whole artifact was made from this model by this version of the compiler."""
    from vllm_compile import __version__
    from vllm_compile.artifact import source_digest
    from vllm_compile.errors import ArtifactError
    from vllm_compile.file_digests import FileDigests
    from vllm_compile.runtime.manifest import check_files, read_manifest

    if not (artifact.is_dir() and (model / "config.json").is_file()):
        return False
    try:
        manifest = read_manifest(artifact)
        check_files(artifact, manifest)
    except ArtifactError:
        return False
    made_by = manifest["compiler"]["vllm_compile"]
    return made_by == __version__ and manifest["source"] == source_digest(model, None, FileDigests())


def artifact_dtype(artifact: Path) -> str:
    return json.loads((artifact / "config.json").read_text())["dtype"]


def encode(model: Path, prompt: str) -> tuple[Any, list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DemoError(f"{model}: no tokenizer ({str(error).strip().splitlines()[0]})") from error
    return tokenizer, tokenizer(prompt).input_ids


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`, and how to talk to it."""

    process: subprocess.Popen[bytes]
    artifact: Path
    port: int
    log: Path
    started: float

    def wait(self) -> None:
        """Until /health answers.

        Raises:
            DemoError: the server ended, or never answered; with the end of its log.
        """
        with console.status("starting") as status:
            while time.monotonic() - self.started < START_LIMIT:
                if self.process.poll() is not None:
                    raise self._failure(f"vllm serve ended with exit code {self.process.returncode}")
                try:
                    self._open("/health").close()
                    return
                except OSError:
                    status.update(f"vllm serve is starting, {time.monotonic() - self.started:.0f} s")
                    time.sleep(0.05)
        raise self._failure(f"vllm serve did not answer in {START_LIMIT} s")

    def complete(self, ids: list[int]) -> Answer:
        """The greedy completion of a prompt, token by token as the server streams it."""
        request = {
            "model": str(self.artifact),
            "prompt": ids,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
        tokens: list[int] = []
        first = 0.0
        try:
            with self._open("/v1/completions", request) as response:
                for event in _events(response):
                    if "error" in event:
                        raise self._failure(f"the server answered: {event['error']}")
                    for choice in event["choices"]:
                        first = first or time.monotonic() - self.started
                        tokens += choice["token_ids"] or []
        except urllib.error.HTTPError as error:
            raise self._failure(f"the server answered {error.code}: {error.read().decode()}") from error
        except OSError as error:
            raise self._failure(f"the server broke off: {error}") from error
        return Answer(tokens, first)

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never a proxy to this machine
        return opener.open(request, timeout=120)

    def _failure(self, reason: str) -> DemoError:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        console.print(Panel(Text("\n".join(lines)), title=f"the end of {self.log}"))
        return DemoError(f"{reason}; see {self.log}")


@contextmanager
def serving(
    artifact: Path, log: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`vllm serve ARTIFACT` in a process group of its own, of which nothing is left afterwards."""
    port = free_port()
    command = [installed("vllm"), "serve", str(artifact), "--host", "127.0.0.1", "--port", str(port)]
    command += options
    step(shown(command))
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        yield Server(process, artifact, port, log, started)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the server to end, then ends whatever is left of its process group."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def hugging_face(model: Path, ids: list[int], dtype: str) -> Answer:
    """Greedy tokens of `transformers.generate`, computed in the dtype that was compiled."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    prompt = torch.tensor([ids])
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    answer = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    return Answer(answer[0, len(ids) :].tolist())


def show(tokenizer: Any, prompt: str, ours: Answer, theirs: Answer, dtype: str) -> int:
    """Prints both answers side by side and what they have in common; returns the exit code."""
    odd_width = console.width - (console.width + 1) % 2  # gives two columns of one width
    table = Table(title=Text(f"after {prompt!r}"), width=odd_width)
    table.add_column("vllm serve, compiled", ratio=1)
    table.add_column(f"Hugging Face, {dtype}", ratio=1)
    table.add_row(*(Text(tokenizer.decode(answer.tokens)) for answer in (ours, theirs)))
    console.print(table)
    console.print(f"first token {ours.first:.1f} s after `vllm serve`")
    if ours.tokens == theirs.tokens:
        console.print(f"[green]equal[/green]: all {len(ours.tokens)} tokens")
        return 0
    pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(ours.tokens), len(theirs.tokens)))
    console.print(f"[yellow]different[/yellow] after {same} of {len(theirs.tokens)} equal tokens")
    if dtype == "float32":
        return 1
    console.print(f"in {dtype} two tokens can be as likely as each other; `vllm-compile verify` measures")
    return 0


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    for line in response:
        data = line.decode().strip().removeprefix("data:").strip()
        if data and data != "[DONE]":
            yield json.loads(data)


def free_port() -> int:
    """A port that nobody has, and that the system, which gives out higher ones, will not give to others meanwhile."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):  # whoever has seeded the other one alike: other ports
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise DemoError(f"every port from {PORTS[0]} to {PORTS[-1]} is taken")


def installed(command: str) -> str:
    """The path of a command beside this Python."""
    path = Path(sys.executable).with_name(command)
    if not path.exists():
        raise DemoError(f"{command} is not installed beside {sys.executable}; run make venv")
    return str(path)


def execute(*command: str, **environment: str) -> None:
    """Runs a command that prints its own progress and its own errors."""
    step(shown(list(command)))
    code = subprocess.run(command, env=environment | os.environ).returncode
    if code == 2:  # it has said why
        sys.exit(code)
    if code:
        raise DemoError(f"{Path(command[0]).name} failed with exit code {code}")


def shown(command: list[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])


def step(text: str) -> None:
    console.print(Text(f"→ {text}", style="bold"), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
