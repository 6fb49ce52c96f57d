"""Put the committed result tables into README.md and pages of docs/, between ``<!-- table: NAME -->`` and ``<!-- end -->`` marks.

python benchmarks/update_readme.py [--check]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"<!-- table: (?P<name>[^\n]*?) -->\n(?P<content>.*?)<!-- end -->", re.DOTALL)
OPENING = "<!-- table:"


def pages() -> list[Path]:
    """README.md and every page of docs/ that shows a marked table."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if OPENING in page.read_text()]


def filled(page: Path) -> str:
    """The page with every marked table as ``results/<name>.md`` has it; links are written as from docs/.

    Raises:
        SystemExit: a mark is not closed, or its results file is missing or empty.
    """
    text = page.read_text()
    if len(MARK.findall(text)) != text.count(OPENING):
        raise SystemExit(f"{page.name}: a table's mark is not closed by <!-- end --> before the next begins")

    def table(match: re.Match[str]) -> str:
        source = RESULTS / f"{match['name']}.md"
        content = source.read_text().strip() if source.is_file() else ""
        if not content:
            raise SystemExit(f"{page.name} shows the table {match['name']}, but {source.relative_to(ROOT)} is missing or empty")
        depth = len(page.parent.relative_to(ROOT).parts)
        content = content.replace("](../", f"]({'../' * depth}")
        return f"<!-- table: {match['name']} -->\n{content}\n<!-- end -->"

    return MARK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if a page is not up to date")
    args = parser.parse_args()
    for page in pages():
        text = filled(page)
        if args.check and text != page.read_text():
            raise SystemExit(f"{page.name} does not show the committed results; run python benchmarks/update_readme.py")
        page.write_text(text)


if __name__ == "__main__":
    main()
