"""Errors that a person can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral


class UserError(ValueError):
    """A person's mistake, told in one line: what was wrong, where, the nearest right thing. The CLI exits with 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest right one, or all there are."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1) or [o for o in options if name and o.startswith(name)]
    return f" Did you mean {close[0]!r}?" if close else f" Choose from: {', '.join(options) or 'nothing'}."


def check_whole(**numbers: object) -> None:
    """Raises UserError for one that is not a whole number of 1 or more."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or int(number) < 1:
            raise UserError(f"{name} = {number!r} is not a whole number of 1 or more")


def check_least(given: object, **least: int) -> None:
    """Raises UserError for an attribute that is less than it may be; one that is None is not asked for."""
    for name, number in least.items():
        if (value := getattr(given, name)) is not None and value < number:
            raise UserError(f"{name} = {value} is too few; the least is {number}")
