"""Pages of a list: what stands behind the `?`, and where the answer stands in its list.

The numbers are those of the contract; what a page holds is its route's.
"""

from typing import Annotated, Final

from pydantic import Field

from glamd.http.call import Pagination
from glamd.http.queries import Query, wrong_query

MAX_PAGE_SIZE: Final = 200
MAX_PAGE: Final = 10_000
"""A page number is an offset underneath; whoever wants to go deeper has the cursor."""
MAX_CURSOR_CHARS: Final = 512


class PageQuery(Query):
    """The query of a list; each list has a class of its own, for the published document."""

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE_SIZE)] = Field(
        default=50, description="How many are on a page."
    )
    page: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = Field(
        default=None, description="Which page, counted from 1; not together with `cursor`."
    )
    cursor: Annotated[str, Field(min_length=1, max_length=MAX_CURSOR_CHARS)] | None = Field(
        default=None, description="The `next_cursor` of the page before."
    )

    def number(self) -> int | None:
        """The page's number, None behind a cursor. `InputError` where both are given."""
        if self.cursor is None:
            return self.page or 1
        if self.page is not None:
            raise wrong_query("cursor", "A page and a cursor do not go together.")
        return None

    def pagination(self, *, total: int, next_cursor: str | None) -> Pagination:
        """The answer's place in its list."""
        return Pagination(
            page=self.number(), limit=self.limit, total=total, next_cursor=next_cursor
        )
