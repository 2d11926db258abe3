"""Tiny real checkpoints: two random layers, a trained byte-level tokenizer, the files a user would have.

Everything is real except the knowledge: the same classes, file formats and tensor names as GLM-4-9B,
small enough to write in a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
"""No other Linear may have this many outputs: the ONNX builder would take it for the head."""
PAD, EOS, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRAINING_TEXT = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "A model reads a prompt one token at a time and then writes the next token, again and again.",
    "The faster a machine can read its memory, the faster it can write the next token.",
    "Numbers such as 1, 12, 144 and 2026 are tokens too; so are commas, full stops and (brackets).",
    "When the test fails, read the message first: it says what is wrong and how to mend it.",
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # ONNX Runtime wants rotary_dims / 2 to be a multiple of 8
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": [1],
    "tie_word_embeddings": False,
}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_TRAITS: dict[str, dict[str, Any]] = {
    "glm": {"attention_bias": True, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "glm4": {"attention_bias": True, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "llama": {"rope_parameters": _ROPE},
    "qwen2": {"rope_parameters": _ROPE},
    "qwen3": {"rope_parameters": _ROPE},
}


def build_checkpoint(
    directory: Path, model_type: str = "glm", *, seed: int = 0, layers: int = 2, **overrides: Any
) -> Path:
    """Write a random ``model_type`` checkpoint into ``directory`` and return it.

    ``overrides`` replace entries of the config, for example ``tie_word_embeddings=True``.
    The same arguments give the same weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type, **{**_SHAPE, **_TRAITS[model_type], "num_hidden_layers": layers, **overrides}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.generation_config.pad_token_id = config.pad_token_id
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a chat template; every id is below ``VOCAB_SIZE``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _randomise(model: Any, seed: int) -> None:
    """Draw every weight anew, wide enough that logits differ clearly; norm weights stay near one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
