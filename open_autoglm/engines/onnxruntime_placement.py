"""Where ONNX Runtime runs a graph: on which provider, with what options, and which nodes really went there.

A session says of its provider only that it exists. Without a GPU, or with a library missing, ONNX Runtime
logs a line and runs on the CPU; and a provider leaves single nodes to the CPU if it has no kernel for them.
So a session is refused if its provider is not the first one, and the nodes of each provider are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

CPU = "CPUExecutionProvider"

RECORD_NODES = "session.record_ep_graph_assignment_info"
"""Session option that lets a session tell which provider got which node; since ONNX Runtime 1.24."""

NO_CPU_NODES = "session.disable_cpu_ep_fallback"
"""Session option that refuses a graph of which any node, shape arithmetic included, is left to the CPU."""

HOST_OPERATORS = frozenset(
    {
        "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Max",
        "Min", "Mul", "Range", "ReduceMax", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Squeeze",
        "Sub", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""What shapes and lengths are computed with. ONNX Runtime puts such nodes on the CPU on purpose, where their
few integers are needed; a graph's work (products, attention, norms) has other operators."""


class Placement(NamedTuple):
    """Where a session is to run."""

    provider: str = CPU
    options: Mapping[str, str] = MappingProxyType({})
    device: Literal["cpu", "cuda"] = "cpu"
    """Of the KV cache."""
    whole: bool = False
    """Refuse the graph if a single node is left to the CPU."""
    fixed: Mapping[str, int] = MappingProxyType({})
    """Named dimensions of the graph that are constants in this session."""


ON_THE_CPU = Placement()


class WrongProvider(RuntimeError):
    """The session runs on another provider than it was asked to."""


class Nodes(NamedTuple):
    """How many nodes of each operator each provider got, before its own fusions."""

    counts: Mapping[str, Counter[str]]

    @classmethod
    def of(cls, session: Any) -> Nodes:
        """Of a session that was made with RECORD_NODES."""
        parts = session.get_provider_graph_assignment_info()
        return cls.from_pairs((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[str, str]]) -> Nodes:
        """Of (provider, operator) of each node."""
        counts: dict[str, Counter[str]] = {}
        for provider, operator in pairs:
            counts.setdefault(provider, Counter())[operator] += 1
        return cls(counts)

    def words(self) -> str:
        """``CUDAExecutionProvider 40 (MatMul 21, …); CPUExecutionProvider 2 (Shape 1, Sub 1)``."""
        return "; ".join(_words(provider, operators) for provider, operators in self.counts.items())

    def elsewhere(self, provider: str) -> str:
        """What of the graph's work ``provider`` left to others; '' if it has all of it."""
        total = sum(operators.total() for operators in self.counts.values())
        lost = {
            other: Counter({name: count for name, count in operators.items() if name not in HOST_OPERATORS})
            for other, operators in self.counts.items()
            if other != provider
        }
        parts = [_words(other, operators) for other, operators in lost.items() if operators]
        return f"of {total} nodes {provider} left to others: {'; '.join(parts)}" if parts else ""


def _words(provider: str, operators: Counter[str]) -> str:
    named = ", ".join(f"{name} {count}" for name, count in operators.most_common())
    return f"{provider} {operators.total()} ({named})"
