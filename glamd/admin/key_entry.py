"""The ceremony at the operator's terminal: each component of a key is typed by another person.

A component is not echoed, not kept, no argument and in no history; it goes to the daemon over its
socket and nowhere else. Each is checked here as soon as it is typed, so that a slip of the finger
is mended by who made it; the daemon checks all of it again. From a pipe one line is one answer, in
the order of the questions: how many, then of each component the holder, the component, its KCV.
"""

import re
import sys
from typing import TYPE_CHECKING, Final

import click

from glamd.errors import InputError

if TYPE_CHECKING:
    from glamd.keys.key_sets.ceremony import Ceremony

ATTEMPTS: Final = 3
"""How often a component may be typed; then the daemon is told, which refuses and records it."""

_COUNT = re.compile("[23]")
_COMPONENT = re.compile(r"(?:[0-9A-Fa-f]{2}){16,32}")
_KCV = re.compile(r"[0-9A-Fa-f]{6}")

Typed = list[dict[str, str]]


def base_derivation_key(scheme: str) -> Typed:
    """The components of a BDK, as the daemon takes them."""
    # glamctl starts without the libraries that check a key; only a ceremony waits for them.
    from glamd.keys.key_sets import ceremony  # noqa: PLC0415

    return _components("component", ceremony.bdk_ceremony(scheme))


def protection_key(block: str, scheme: str) -> Typed:
    """The components of the key that protects a key block, as the daemon takes them.

    Nobody is asked where the block's header says that it is no BDK of this scheme: UsageError.
    """
    from glamd.crypto import keyblock  # noqa: PLC0415 - as above
    from glamd.keys.key_sets.ceremony import Ceremony  # noqa: PLC0415

    try:
        keyblock.check_header(block, scheme=scheme)
        protection, lengths = keyblock.protection_scheme(block), keyblock.kbpk_lengths(block)
    except InputError as error:
        raise click.UsageError(f"{error.message}.") from None
    return _components(
        "protection key component", Ceremony(protection, lengths=lengths, field="kbpk")
    )


def _components(what: str, ceremony: "Ceremony") -> Typed:
    count = int(_asked(f"How many {what}s", _COUNT, "It is 2 or 3."))
    found: Typed = []
    for number in range(1, count + 1):
        if number > 1 and _at_terminal():
            click.echo("Hand the keyboard to the next holder now.", err=True)
        typed, right = _component(f"{what} {number} of {count}", ceremony)
        found.append(typed)
        if not right:
            break
    return found


def _component(which: str, ceremony: "Ceremony") -> tuple[dict[str, str], bool]:
    """One component, and whether it was right at last."""
    from glamd.keys.key_sets.ceremony import Component  # noqa: PLC0415 - as above

    holder = _holder(which, ceremony)
    typed: dict[str, str] = {}
    for _ in range(ATTEMPTS if _at_terminal() else 1):
        question = f"{which[0].upper()}{which[1:]}, in hex (not shown)"
        rule = "It is 32 to 64 hexadecimal digits."
        component = _asked(question, _COMPONENT, rule, hidden=True)
        kcv = _asked(f"Check value of {which}", _KCV, "It is 6 hexadecimal digits.")
        typed = {"holder": holder, "hex": component, "kcv": kcv}
        try:
            ceremony.take(Component(holder, bytes.fromhex(component), kcv))
        except InputError as error:
            if _at_terminal():
                click.echo(_sentence(error), err=True)
        else:
            return typed, True
    return typed, False


def _holder(which: str, ceremony: "Ceremony") -> str:
    """Who is going to type; at a terminal asked again while it is nobody, or who typed before."""
    question = f"Name of the holder of {which}"
    while True:
        name = " ".join(_line(question, hidden=False).split())
        if not _at_terminal():
            return name
        try:
            ceremony.check_holder(name)
        except InputError as error:
            click.echo(_sentence(error), err=True)
        else:
            return name


def _asked(question: str, shape: re.Pattern[str], rule: str, *, hidden: bool = False) -> str:
    """What was typed, blanks between digits allowed; asked again at a terminal until it fits."""
    while True:
        typed = "".join(_line(question, hidden=hidden).split())
        if shape.fullmatch(typed):
            return typed
        if not _at_terminal():
            raise click.UsageError(f"{question}: {rule}")
        click.echo(rule, err=True)


def _line(question: str, *, hidden: bool) -> str:
    if not _at_terminal():
        return sys.stdin.readline()
    typed: str = click.prompt(question, hide_input=hidden, err=True, type=str)
    return typed


def _sentence(error: InputError) -> str:
    message = error.fields[0].message
    return f"{message[0].upper()}{message[1:]}."


def _at_terminal() -> bool:
    return sys.stdin.isatty()
