"""How events about money look on the terminal of `glamd dev`: a line each, in columns.

Only words and colours; the columns are those of a tap. The event's own name is shown, without its
`evt.` and version, so that whoever has seen the line knows what to subscribe to.
"""

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from rich.text import Text

from glamd.embedded.demo_events import Happening

_ROOM_WIDTH: Final = 11
_NAME_WIDTH: Final = 26
_AMOUNT_WIDTH: Final = 11

_Data: TypeAlias = Mapping[str, object]

_STYLES: Final = {
    "credits.granted": "bold green",
    "credits.consumed": "",
    "credits.low_balance": "bold yellow",
    "credits.exhausted": "bold red",
    "credits.insufficient": "red",
    "billing.trial.started": "bold green",
    "billing.credits.purchased": "bold green",
}
_DETAILS: Final[Mapping[str, Callable[[_Data], str]]] = {
    "credits.granted": lambda data: f"balance {data['balance']}  ({data['reference_type']})",
    "credits.consumed": lambda data: f"balance {data['balance']}",
    "credits.low_balance": lambda data: f"balance {data['balance']}, below {data['threshold']}",
    "credits.exhausted": lambda _data: "nothing is left",
    "credits.insufficient": lambda data: f"refused, balance {data['balance']}",
    "billing.trial.started": lambda data: f"until {str(data['ends_at'])[:10]}",
    "billing.trial.expired": lambda data: f"at {str(data['expired_at'])[:10]}",
    "billing.credits.purchased": lambda data: f"for {data['amount']} at {data['platform']}",
}


def of(happening: Happening) -> Text:
    """An event, or several of one subject: how many, how much together, and what is left."""
    kind = happening.subject.removeprefix("evt.").removesuffix(".v1")
    room, _, name = kind.partition(".")
    many = f" x{happening.times}" if happening.times > 1 else ""
    details = _DETAILS.get(kind)
    return _line(
        room,
        name + many,
        _amount(kind, happening),
        "" if details is None else details(happening.data),
        style=_STYLES.get(kind, "bold"),
    )


def of_checkout(pack: str, page: str) -> Text:
    """A pack that is being bought, without the signature of the page."""
    return _line("billing", "checkout", pack, f"approves at {page.partition('?')[0]}", style="")


def of_trouble(text: str) -> Text:
    """Why nothing goes on."""
    return _line("demo", "waits", "", text, style="red")


def _line(room: str, name: str, amount: str, details: str, *, style: str) -> Text:
    line = Text(f"{room:<{_ROOM_WIDTH}}", style="cyan")
    line += Text(f"{name:<{_NAME_WIDTH}}", style=style)
    line += Text(f"{amount:<{_AMOUNT_WIDTH}}", style="bold")
    return line + Text(details)


def _amount(kind: str, happening: Happening) -> str:
    match kind:
        case "credits.granted":
            return f"+{happening.amount}"
        case "credits.consumed":
            return f"-{happening.amount}"
        case "billing.trial.started" | "billing.credits.purchased":
            return str(happening.data["credits"])
        case _:
            return ""
