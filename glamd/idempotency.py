"""Answers that are remembered, so that asking twice has one effect: one row a caller's key.

Written by a capability in its own transaction, through the `Keep` that it is handed: what was done
and the answer to it are committed together or not at all. What an answer looks like, and which
requests carry a key, is for `glamd.http`.
"""

from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

from glamd.db import Connection

R = TypeVar("R")

Keep: TypeAlias = Callable[[Connection, R], Awaitable[None]]
"""A capability awaits it once, with its connection and its result, last in its transaction.

What it raises ends that transaction: another request has taken this one's place.
"""
