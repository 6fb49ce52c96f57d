"""Put the committed result tables into README.md and pages of docs/, between ``<!-- table: NAME -->`` and ``<!-- end -->`` marks.

python benchmarks/update_readme.py [--check]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "fp_and_svdquant.md")
RESULTS = ROOT / "benchmarks" / "results"


def filled(page: Path) -> str:
    """The page with every marked table as ``results/<name>.md`` has it; links are written as from docs/."""

    def table(match: re.Match[str]) -> str:
        content = (RESULTS / f"{match[1]}.md").read_text().strip()
        if page.parent == ROOT:
            content = content.replace("](../", "](")
        return f"<!-- table: {match[1]} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, page.read_text(), flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if a page is not up to date")
    args = parser.parse_args()
    for page in PAGES:
        text = filled(page)
        if args.check and text != page.read_text():
            raise SystemExit(f"{page.name} does not show the committed results; run python benchmarks/update_readme.py")
        page.write_text(text)


if __name__ == "__main__":
    main()
