"""Money: integers of a currency's minor units inside, decimal text outside. Pure.

No float comes near it, and nothing is rounded: an amount that the currency cannot hold exactly is
refused, not mended.
"""

import re
from dataclasses import dataclass
from typing import Final, Self

from glamd.errors import FieldError, InputError

MINOR_LIMIT: Final = 10**15 - 1
"""Minor units; far more than any pack costs, and far below what a `bigint` holds."""

_USUAL_DIGITS: Final = 2
_DIGITS: Final = {
    **dict.fromkeys(
        (
            "BIF",
            "CLP",
            "DJF",
            "GNF",
            "ISK",
            "JPY",
            "KMF",
            "KRW",
            "PYG",
            "RWF",
            "UGX",
            "UYI",
            "VND",
            "VUV",
            "XAF",
            "XOF",
            "XPF",
        ),
        0,
    ),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}
"""How many digits a currency has behind the point, where these are not two (ISO 4217)."""

_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_AMOUNT: Final = re.compile(r"(0|[1-9][0-9]{0,14})(?:\.([0-9]{1,10}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Money:
    """So many minor units (cents of USD) of a currency by its ISO 4217 code; InputError else."""

    amount_minor: int
    currency: str

    def __post_init__(self) -> None:
        """Refuse what is no sum of money."""
        if _CURRENCY.fullmatch(self.currency) is None:
            raise _wrong("currency", "it is three capital letters, such as USD")
        if type(self.amount_minor) is not int or not 0 <= self.amount_minor <= MINOR_LIMIT:
            raise _wrong("amount", f"it is 0 to {MINOR_LIMIT} minor units")

    @classmethod
    def parse(cls, amount: object, currency: object) -> Self:
        """Read decimal text such as `39.99`; trailing zeros may be missing or too many.

        InputError for everything else, numbers that are not text among it.
        """
        if not isinstance(currency, str):
            raise _wrong("currency", "it is three capital letters, such as USD")
        found = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
        if found is None:
            raise _wrong("amount", 'it is a decimal text, such as "39.99"')
        digits = _DIGITS.get(currency, _USUAL_DIGITS)
        fraction = (found[2] or "").rstrip("0")
        if len(fraction) > digits:
            raise _wrong("amount", f"it has at most {digits} digits behind the point")
        return cls(int(found[1] + fraction.ljust(digits, "0")), currency)

    @property
    def amount(self) -> str:
        """The decimal text, with all digits of the currency: `39.90`, and `500` of JPY."""
        digits = _DIGITS.get(self.currency, _USUAL_DIGITS)
        if not digits:
            return str(self.amount_minor)
        whole, fraction = divmod(self.amount_minor, 10**digits)
        return f"{whole}.{fraction:0{digits}}"


def _wrong(field: str, message: str) -> InputError:
    return InputError(f"It is not a sum of money: {field}.", fields=(FieldError(field, message),))
