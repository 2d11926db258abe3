"""Engines without slots, made to look as if they had one."""

from __future__ import annotations

from collections.abc import Sequence

from open_autoglm.engines.contract import Logits, Session, Tokens


class OneByOne:
    """One slot of a session that has none: a prompt is read at once, nothing of it is kept for another."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def append(self, slot: int, tokens: Tokens, *, every: bool = False) -> Logits:
        assert not every, "no drafts without slots"
        return self._session.prefill(tokens[None])

    def advance(self, slots: Sequence[int], tokens: Tokens) -> Logits:
        return self._session.decode(tokens)

    def truncate(self, slot: int, length: int) -> None:
        """The next prompt empties the cache."""
