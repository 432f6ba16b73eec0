"""The authorization matrix in docs/api.md says what the route tables say."""

from pathlib import Path

from glamd.http import matrix
from glamd.http.openapi import api_routes, worker_routes

PAGE = Path(__file__).parents[3] / "docs" / "api.md"


def test_the_page_shows_the_matrix_as_the_code_has_it() -> None:
    page = PAGE.read_text()
    assert matrix.put_into(page) == page, "run `make docs`"


def test_every_route_stands_in_the_matrix_once() -> None:
    rows = [line for line in matrix.table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(set(rows)) == len(api_routes()) + len(worker_routes())
