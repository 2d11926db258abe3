"""The prompts every candidate is timed on: real text, drawn once per study.

Each round, and each row of a batch, reads another prompt. A runtime that keeps the KV cache of a prompt
it has seen (OpenVINO GenAI does) would otherwise be timed on a look-up instead of a prefill.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from open_autoglm.engines.contract import Tokens
from open_autoglm.errors import UserError
from open_autoglm.files import sha256_file, write_atomic
from open_autoglm.quality.texts import TEXTS, Tokenizer, encode, load_tokenizer
from open_autoglm.schemas import Checkpoint, OptimizeSpec, Workload

WARMUPS = 2
"""Leading prompts that are run but not counted."""


def make_workload(checkpoint: Checkpoint, spec: OptimizeSpec, path: Path) -> Workload:
    """Draw ``WARMUPS + spec.rounds`` batches of prompts and save them as ``path``, atomically.

    The file is a ``.npy`` of ``int64[prompts, batch, prompt_tokens]``. The same checkpoint and spec give
    the same bytes. Raises UserError if the texts are too short for that many different prompts.
    """
    batches = WARMUPS + spec.rounds
    rows = draw_prompts(load_tokenizer(checkpoint), batches * spec.batch_size, spec.prompt_tokens, spec.seed)
    buffer = io.BytesIO()
    np.save(buffer, rows.reshape(batches, spec.batch_size, spec.prompt_tokens))
    write_atomic(path, buffer.getvalue())
    return Workload(
        path=path,
        sha256=sha256_file(path),
        batch_size=spec.batch_size,
        prompt_tokens=spec.prompt_tokens,
        output_tokens=spec.output_tokens,
        rounds=spec.rounds,
        seed=spec.seed,
        corpus=" and ".join(f"{kind}.eval" for kind in TEXTS),
    )


def draw_prompts(tokenizer: Tokenizer, count: int, length: int, seed: int) -> Tokens:
    """``count`` different prompts, ``int64[count, length]``, alternating between the kinds of text.

    Prompts of one text start evenly spaced, so they are disjoint as long as the text is long enough;
    beyond that they overlap but still start at different tokens. A text is read as a ring: a prompt
    that reaches its end goes on at its beginning. Raises UserError if there are more prompts than tokens.
    """
    generator = np.random.default_rng(seed)
    prompts = np.empty((count, length), dtype=np.int64)
    for first, kind in enumerate(TEXTS):
        text = encode(tokenizer, kind, "eval")
        wanted = len(range(first, count, len(TEXTS)))
        if wanted > len(text):
            raise UserError(
                f"{count} different prompts are needed, but the {kind} text has only {len(text)} tokens to "
                f"start one at: ask for fewer rounds or a smaller batch"
            )
        starts = generator.permutation(wanted) * len(text) // wanted + generator.integers(len(text))
        prompts[first :: len(TEXTS)] = text[(starts[:, None] + np.arange(length)) % len(text)]
    return prompts
