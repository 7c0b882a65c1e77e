"""Errors that a user can act on."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what the user gave: one line, naming the thing and what is allowed. The command line exits with 2."""


def unknown(kind: str, name: str, allowed: Iterable[str], listed_by: str = "") -> UserError:
    """The error for a name that is not in a list, with the nearest names first. `listed_by` is a command that lists the names where they
    are too many for one line."""
    allowed = sorted(allowed)
    near = get_close_matches(name, allowed, n=3, cutoff=0.5)
    if listed_by:
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "no name is like it;"
        return UserError(f"unknown {kind} {name!r}: {hint} {listed_by!r} lists them all")
    if near and len(allowed) > 40:
        return UserError(f"unknown {kind} {name!r}: did you mean {' or '.join(map(repr, near))}? ({len(allowed)} are known)")
    if len(allowed) > 40:
        return UserError(f"unknown {kind} {name!r}: none of the {len(allowed)} that are known is like it")
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}allowed: {', '.join(allowed)}")
