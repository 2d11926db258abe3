"""The decoders whose graphs we write node by node straight from a checkpoint: what is in a layer, in which
order. How each part is said is a format's own, see :mod:`~open_autoglm.export.openvino_graph` and
:mod:`~open_autoglm.export.standard_graph`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_autoglm.analysis import profile_config
from open_autoglm.checkpoint import build_on_meta, load_config
from open_autoglm.schemas import Checkpoint
from open_autoglm.weights import SAFETENSORS, SAFETENSORS_INDEX, find_weights

Floats = NDArray[np.float32]

MODEL_TYPES = frozenset({"glm", "glm4", "llama", "qwen2", "qwen3"})
"""Model types whose graphs our tests compare with transformers."""

_NEVER_READ = ("lm_head.weight", "rotary_emb.inv_freq")
"""Tensors that a checkpoint may hold in vain: a head tied to the embedding, and a table made anew."""


class UnknownModel(RuntimeError):
    """The checkpoint has something that the graph would leave out."""


class StoredTensors:
    """The tensors of a checkpoint by name, read one by one; knows which nobody asked for.

    A file is mapped only while one of its tensors is in use: pages that were read once count as memory of
    this process for as long as they are mapped, in the end as much as the whole checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self._files: dict[str, Path] = {}
        for path in find_weights(directory, SAFETENSORS, SAFETENSORS_INDEX):
            with safe_open(path, framework="pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))
        self.unread = set(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Floats:
        """The tensor ``name`` as float32. Raises KeyError if there is none."""
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as file:  # numpy has no bfloat16
            tensor: Floats = file.get_tensor(name).float().numpy()
        self.unread.discard(name)
        return tensor


class DecoderGraph(ABC):
    """One graph in the making. Its values, ``Any`` here, are whatever a format's nodes have for outputs."""

    FORMAT: str
    """What it is called where something is refused."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises UnknownModel for what there are no nodes for."""
        self._config = load_config(checkpoint.path)
        self._refuse()
        self._shape = profile_config(self._config)
        self._eps = float(self._config.rms_norm_eps)
        self._tensors = StoredTensors(checkpoint.path)

    def _refuse(self) -> None:
        config = self._config
        if config.model_type not in MODEL_TYPES:
            raise UnknownModel(f"{self.FORMAT} is not verified for model type {config.model_type!r}")
        if config.hidden_act != "silu":
            raise UnknownModel(f"{self.FORMAT} has no activation {config.hidden_act!r}")
        if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
            raise UnknownModel(f"{self.FORMAT} has no rotary embedding that changes with the length")
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise UnknownModel(f"{self.FORMAT} has no sliding-window attention")

    def _require_all_read(self) -> None:
        """Raise UnknownModel if the checkpoint holds tensors that the graph does not use."""
        unused = sorted(name for name in self._tensors.unread if not name.endswith(_NEVER_READ))
        if unused:
            raise UnknownModel(f"{self.FORMAT} has no use for the tensors {unused[:5]}")

    def _frequencies(self) -> tuple[Floats, float]:
        """Radians per position, ``float32[rotary_dims / 2]``, and what cosines and sines are multiplied by.

        They come from the model's own class, so that every static kind of scaling is right.
        """
        rotary = type(build_on_meta(self._config).get_decoder().rotary_emb)(self._config)
        return rotary.inv_freq.numpy(), float(rotary.attention_scaling)

    # ── the decoder ──────────────────────────────────────────────────────────────────────────────

    def _layers(self, hidden: Any) -> Any:
        """The residual stream after all layers and the norm behind them."""
        for index in range(self._shape.layers):
            hidden = self._layer(f"model.layers.{index}", hidden, last=index == self._shape.layers - 1)
        return self._norm("model.norm", hidden)

    def _layer(self, name: str, hidden: Any, *, last: bool) -> Any:
        """Attention and MLP, each between norms; after the last attention only some positions go on."""
        attended = self._attention(f"{name}.self_attn", self._norm(f"{name}.input_layernorm", hidden))
        if last:
            attended, hidden = self._wanted(attended), self._wanted(hidden)
        attended = self._linear(f"{name}.self_attn.o_proj", attended)
        hidden = self._sum(hidden, self._optional_norm(f"{name}.post_self_attn_layernorm", attended))
        changed = self._mlp(f"{name}.mlp", self._norm(f"{name}.post_attention_layernorm", hidden))
        return self._sum(hidden, self._optional_norm(f"{name}.post_mlp_layernorm", changed))

    def _mlp(self, name: str, hidden: Any) -> Any:
        """Gate and up are two products even where the checkpoint has them in one matrix: runtimes compute
        the activation and the gated product inside them."""
        size = self._shape.intermediate_size
        if self._shape.mlp == "fused_gate_up":
            both = self._tensors.read(f"{name}.gate_up_proj.weight")
            gate = self._product(f"{name}.gate_proj", hidden, both[:size])
            up = self._product(f"{name}.up_proj", hidden, both[size:])
        else:
            gate, up = (self._linear(f"{name}.{part}_proj", hidden) for part in ("gate", "up"))
        return self._linear(f"{name}.down_proj", self._gated(name, gate, up))

    def _linear(self, name: str, hidden: Any, order: NDArray[np.int64] | None = None) -> Any:
        """A linear layer with or without bias, its outputs in the given order."""
        rows = slice(None) if order is None else order
        product = self._product(name, hidden, self._tensors.read(f"{name}.weight")[rows])
        if f"{name}.bias" not in self._tensors:
            return product
        return self._biased(name, product, self._tensors.read(f"{name}.bias")[rows])

    def _norm(self, name: str, hidden: Any) -> Any:
        return self._rms(name, hidden, self._tensors.read(f"{name}.weight"))

    def _optional_norm(self, name: str, hidden: Any) -> Any:
        return self._norm(name, hidden) if f"{name}.weight" in self._tensors else hidden

    # ── the nodes of a format ────────────────────────────────────────────────────────────────────

    @abstractmethod
    def _attention(self, name: str, hidden: Any) -> Any:
        """``[batch, tokens, heads * head_dim]``, before the output projection."""

    @abstractmethod
    def _wanted(self, value: Any) -> Any:
        """``value[batch, tokens, ...]`` of those positions whose logits are wanted."""

    @abstractmethod
    def _product(self, name: str, hidden: Any, matrix: Floats) -> Any:
        """``hidden`` times the transpose of ``matrix[outputs, inputs]``."""

    @abstractmethod
    def _biased(self, name: str, product: Any, bias: Floats) -> Any:
        """``product + bias[outputs]``."""

    @abstractmethod
    def _rms(self, name: str, hidden: Any, weight: Floats) -> Any:
        """``hidden / sqrt(mean(hidden²) + eps) * weight``, the mean over the last axis."""

    @abstractmethod
    def _sum(self, stream: Any, branch: Any) -> Any:
        """What a branch adds to the residual stream."""

    @abstractmethod
    def _gated(self, name: str, gate: Any, up: Any) -> Any:
        """``silu(gate) * up``."""
