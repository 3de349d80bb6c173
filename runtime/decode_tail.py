"""What follows a decode step's last layer, recorded in the step's own CUDA graph: logits and greedy tokens.

Launched from Python behind the graph's replay, logits and sampling take longer than a small model's step: of
Llama-3.2-1B with one request 70 and 260 of 1,360 microseconds (benchmarks/baseline.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class DecodeTail:
    """Logits and the most probable token of each request of a decode step.

    While a graph is warmed up and captured, `record` runs them.  An engine announces each of its steps by `begin`;
    behind a replayed graph they are there without a kernel being launched for them.  All graphs of decode steps are
    recorded, the largest among them.

    Args:
        logits: hidden states [R, D] -> logits [R, V], in the same memory each time, whatever R.
        greedy: logits [R, V] -> their most probable tokens, int64 [R, 1], in the same memory each time, too.
        max_requests: R at most.

    Attributes:
        recording: a graph is about to be captured, or warmed up.
    """

    def __init__(
        self,
        logits: Callable[[torch.Tensor], torch.Tensor],
        greedy: Callable[[torch.Tensor], torch.Tensor],
        max_requests: int,
    ) -> None:
        self.recording = False
        self._compute_logits, self._greedy, self._max_requests = logits, greedy, max_requests
        self._logits_RV: torch.Tensor | None = None  # of the largest step recorded
        self._tokens_by_rows: list[torch.Tensor] = []  # slices take longer to make than to look up
        self._rows = 0  # of the step at hand
        self._asked = True  # its logits have been handed out

    def record(self, hidden_RD: torch.Tensor) -> None:
        """Compute logits and tokens of a step, of which each row is a request."""
        rows = hidden_RD.shape[0]
        if rows > self._max_requests:
            return
        logits_RV = self._compute_logits(hidden_RD)
        tokens_R1 = self._greedy(logits_RV)
        if self._logits_RV is None or rows > self._logits_RV.shape[0]:
            self._logits_RV = logits_RV
            self._tokens_by_rows = [tokens_R1[:fewer] for fewer in range(rows + 1)]

    def begin(self, rows: int) -> None:
        """A step begins: the replay of a graph with these rows recorded, padding left out; 0 for any other."""
        self._rows = 0 if self._logits_RV is None or rows > self._logits_RV.shape[0] else rows
        self._asked = self._rows == 0

    def logits(self, rows: int) -> torch.Tensor | None:
        """[R, V], valid until the next step, to be overwritten at will; None if this step has none.

        Once a step: an engine that asks again asks for logits of other hidden states, those of a prompt.
        """
        if self._asked or self._logits_RV is None or rows != self._rows:
            return None
        self._asked = True
        return self._logits_RV[:rows]

    def tokens(self, rows: int) -> torch.Tensor | None:
        """int64 [R, 1], a copy that no later step changes; None if this step has none.

        They are those of the logits before anything was written over these.
        """
        return self._tokens_by_rows[rows].clone() if rows and rows == self._rows else None
