"""The example of `docs/kernel.md` runs, and prints what the page says."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "kernel.md"
RUN_LIMIT_S = 20


def test_the_example_of_the_page_prints_what_the_page_says() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    example, printed = blocks
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=PAGE.parents[1],
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
        check=False,
    )
    assert (done.stderr, done.stdout) == ("", printed)
