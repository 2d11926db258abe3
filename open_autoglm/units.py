"""Quantities with their units, as people write them: ``50ms``, ``0.05s``, ``2GiB``, ``512MB``.

Both types are strings, so that a spec shows, logs and replays exactly what was asked for,
and both refuse a bare number: "50" could be seconds or milliseconds.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

_MIX_ENTRY = re.compile(r"(\d+)/(\d+)(?::(\d+(?:\.\d+)?))?")
_NUMBER_AND_UNIT = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class _Quantity(str):
    """A positive number with a unit; subclasses name the units and their size in the base unit."""

    noun: ClassVar[str]
    example: ClassVar[str]
    units: ClassVar[dict[str, float]]

    def __new__(cls, text: str) -> Self:
        match = _NUMBER_AND_UNIT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a {cls.noun}: write it like {cls.example}")
        number, unit = match.groups()
        if unit not in cls.units:
            known = ", ".join(cls.units)
            problem = f"the unit {unit!r} of {text!r} is not known" if unit else f"{text!r} has no unit"
            raise ValueError(f"{problem}: write a {cls.noun} like {cls.example} (units: {known})")
        if float(number) <= 0:
            raise ValueError(f"{text!r} must be greater than zero: write a {cls.noun} like {cls.example}")
        return super().__new__(cls, f"{number}{unit}")

    @property
    def in_base_unit(self) -> float:
        match = _NUMBER_AND_UNIT.fullmatch(self)
        assert match is not None  # __new__ has checked it
        return float(match[1]) * self.units[match[2]]

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls, core_schema.str_schema(), serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, _schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        units = "|".join(cls.units)
        return {"type": "string", "pattern": rf"^\s*\d+(\.\d+)?\s*({units})\s*$", "examples": [cls.example]}


class Duration(_Quantity):
    """A time such as ``50ms``, ``0.05s`` or ``2min``."""

    noun = "duration"
    example = "50ms"
    units: ClassVar[dict[str, float]] = {"us": 1e-3, "ms": 1.0, "s": 1e3, "min": 60e3, "h": 3600e3}

    @property
    def ms(self) -> float:
        """Milliseconds."""
        return self.in_base_unit


class ByteSize(_Quantity):
    """A size such as ``2GiB`` (powers of 1024) or ``512MB`` (powers of 1000)."""

    noun = "size"
    example = "2GiB"
    units: ClassVar[dict[str, float]] = {
        "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
        "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    }  # fmt: skip

    @property
    def bytes(self) -> int:
        """Bytes, rounded down."""
        return int(self.in_base_unit)


class LengthMix(str):
    """Prompt and output lengths with their weights: ``128/32:3,512/64:1`` is three of the first to one of
    the second; a weight left out is 1."""

    def __new__(cls, text: str) -> Self:
        entries = [part.strip() for part in text.split(",")]
        for entry in entries:
            match = _MIX_ENTRY.fullmatch(entry)
            sound = match and int(match[1]) >= 1 and int(match[2]) >= 2 and 0 < float(match[3] or 1) < 1e9
            if not sound:
                raise ValueError(
                    f"{entry!r} is not a share of a mix of lengths: write prompt/output:weight, at least "
                    "1 prompt token and 2 output tokens, like 128/32:3,512/64:1"
                )
        return super().__new__(cls, ",".join(entries))

    @property
    def shares(self) -> tuple[tuple[int, int, float], ...]:
        """(prompt tokens, output tokens, share of the requests) for each kind; the shares add up to 1."""
        found = [match for match in map(_MIX_ENTRY.fullmatch, self.split(",")) if match is not None]
        weights = [float(match[3] or 1) for match in found]
        return tuple(
            (int(match[1]), int(match[2]), weight / sum(weights))
            for match, weight in zip(found, weights, strict=True)
        )

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls, core_schema.str_schema(), serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, _schema: CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        entry = r"\s*\d+/\d+(:\d+(\.\d+)?)?\s*"
        return {"type": "string", "pattern": f"^{entry}(,{entry})*$", "examples": ["128/32:3,512/64:1"]}


def number(value: float) -> str:
    """Three significant digits, never with an exponent: 1245.3 is '1,245' and 0.01234 is '0.0123'."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent_as_given(share: float) -> str:
    """A limit, with no digit lost: '99%' and '0.1%'."""
    return f"{100 * share:.6g}%"


def quantity(value: float, unit: str) -> str:
    """A figure with its unit. Memory is in MiB up to 10 GiB, so that engines compare at a glance."""
    if unit == "bytes":
        return f"{number(value / 2**30)} GiB" if value >= 10 * 2**30 else f"{number(value / 2**20)} MiB"
    return f"{number(value)} {unit}".rstrip()
