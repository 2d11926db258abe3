"""What the server's process and the engine's say to each other: JSON, one object a line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from open_autoglm.schemas import Model

_FORGETFUL = ConfigDict(cache_strings="keys")
"""pydantic would keep the last 16,384 short strings that it has read: here ids, of which none comes again."""

Finish = Literal["stop", "length"]


class Sampling(Model):
    """How the next token is chosen from the logits."""

    temperature: float = Field(0, ge=0, le=2, description="0: the likeliest token")
    top_p: float = Field(1, gt=0, le=1, description="of the likeliest tokens, as many as have this share")
    seed: int | None = Field(None, description="the same seed and logits give the same tokens")
    logprobs: int | None = Field(None, ge=0, le=20, description="that many likeliest tokens beside each")


class Generation(Model):
    """One prompt to be continued."""

    id: str
    prompt: tuple[int, ...] = Field(min_length=1, description="token ids")
    max_tokens: int = Field(ge=1)
    sampling: Sampling = Sampling()
    stop_tokens: tuple[int, ...] = Field((), description="ids that end the answer, and are not part of it")
    fresh: bool = Field(False, description="reads all of the prompt, whatever of it is in the cache")


class Token(Model):
    """One token of an answer, as soon as it is known."""

    id: str = Field(description="of its generation")
    token: int | None = Field(description="None: the answer ended before another one")
    finish: Finish | None = None
    not_finite: bool = Field(False, description="the logits held NaN or infinity, and there is no token")
    cached_tokens: int = Field(0, description="of the prompt, read for an earlier request; said once")
    slot_s: float | None = Field(None, description="when it got its slot, by `time.monotonic`; said once")
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = Field((), description="ids and natural logarithms, best first")

    @property
    def ends(self) -> bool:
        """Nothing follows."""
        return self.finish is not None or self.not_finite


class Load(Model):
    """What the engine is busy with."""

    running: int = 0
    waiting: int = 0
    cached_tokens: int = Field(0, description="in all slots")


class EngineOptions(Model):
    """What an engine process is started with."""

    bundle: Path
    slots: int = Field(ge=1, description="requests in the cache at one time")
    max_tokens: int = Field(ge=2, description="prompt and output of one request")
    threads: int = Field(ge=1)
    chunk_tokens: int = Field(128, ge=1, description="of a prompt, read between two tokens of the others")
    reuse_prefixes: bool = True


class Ready(Model):
    """The engine process has loaded its model."""

    slots: int
    max_tokens: int
    facts: dict[str, str]


class Command(Model):
    """To the engine."""

    model_config = _FORGETFUL

    generate: Generation | None = None
    cancel: str | None = None
    slower: float | None = Field(
        None, ge=0, description="from now on each call of the model takes this share longer"
    )


class Report(Model):
    """From the engine."""

    model_config = _FORGETFUL

    ready: Ready | None = None
    tokens: tuple[Token, ...] = ()
    load: Load | None = None
