"""A standard graph as a session: which token goes where in the cache, whoever computes the graph."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from open_autoglm.engines.contract import Logits, SessionOptions, Tokens
from open_autoglm.export.graph import WRITE_INDICES


class Feeds(NamedTuple):
    """What one call of a standard graph reads besides the cache."""

    input_ids: NDArray[np.int64]
    """``[batch, sequence]``"""
    position_ids: NDArray[np.int64]
    """``[batch, sequence]``"""
    write_indices: NDArray[np.int64]
    """``[batch]``: where in each row of the cache the call's tokens go"""
    first_logits: int
    """Of the call's positions, the first that logits are wanted of, counted from the front"""

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """All but `first_logits`, by the names of the graph's inputs."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            WRITE_INDICES: self.write_indices,
        }


class Executor(Protocol):
    """A standard graph with the memory of its cache."""

    def allocate(self, rows: int) -> None:
        """Have a cache for ``rows`` rows, of zeros where it is new; stale contents may stay."""
        ...

    def run(self, feeds: Feeds) -> Logits:
        """Write the call's keys and values into the cache; return ``float32[batch, sequence - first_logits,
        vocab]`` in memory of its own."""
        ...

    def facts(self) -> dict[str, str]: ...

    def close(self) -> None: ...


class StandardSession:
    """A standard graph with one KV cache, whose rows have the same length."""

    def __init__(self, executor: Executor, options: SessionOptions) -> None:
        self._executor = executor
        self._options = options
        self._rows = 0
        self._length = 0

    def prefill(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(tokens, tokens.shape[1] - 1)[:, -1]

    def decode(self, tokens: Tokens) -> Logits:
        return self._run(tokens[:, None], 0)[:, -1]

    def full_logits(self, tokens: Tokens) -> Logits:
        self._reset(len(tokens))
        return self._run(tokens, 0)

    def extend(self, tokens: Tokens) -> Logits:
        return self._run(tokens, 0)

    def rewind(self, tokens: int) -> None:
        if not 0 <= tokens <= self._length:
            raise ValueError(f"{self._length} tokens were read, {tokens} cannot be forgotten")
        self._length -= tokens  # what lies beyond is not seen, and overwritten

    def _reset(self, rows: int) -> None:
        if rows > self._options.batch_size:
            raise ValueError(f"batch of {rows} in a session opened for {self._options.batch_size}")
        self._length = 0
        if rows != self._rows:
            self._executor.allocate(rows)
            self._rows = rows

    def _run(self, tokens: Tokens, first_logits: int) -> Logits:
        """Append ``int64[batch, n]``; logits of the positions from ``first_logits`` on."""
        rows, added = tokens.shape
        length = self._length + added
        if length > self._options.max_tokens:
            raise ValueError(f"the cache holds {self._options.max_tokens} tokens, {length} were asked for")
        feeds = Feeds(
            input_ids=np.ascontiguousarray(tokens, dtype=np.int64),
            position_ids=np.tile(np.arange(self._length, length, dtype=np.int64), (rows, 1)),
            write_indices=np.full(rows, self._length, dtype=np.int64),
            first_logits=first_logits,
        )
        logits = self._executor.run(feeds)
        self._length = length
        return logits

    def facts(self) -> dict[str, str]:
        return {**self._executor.facts(), "kv_cache": "in_place"}

    def close(self) -> None:
        self._executor.close()
