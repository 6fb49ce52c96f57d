"""What pages of docs/ link to outside of docs/, for the site (mkdocs calls these functions, see mkdocs.yml).

Pictures become files of the site. Everything else becomes a link to the repository if ``QDIFF_REPOSITORY_URL`` says where it is,
and plain words if not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PICTURES = (".png", ".jpg", ".svg")
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?:\.\./)+[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
ROLE = re.compile(r":(?:attr|class|func|meth|mod):(?=<code>|<a |<span |<autoref )")  # of Sphinx, in docstrings
FOLDER = "repository"  # of the site, for pictures from elsewhere


def outside(page: str, target: str) -> Path | None:
    """What a link of a page (a path within docs/) leads to, within the repository; ``None`` if it stays in docs/."""
    path = (ROOT / "docs" / page).parent.joinpath(target).resolve()
    return None if (ROOT / "docs") in (path, *path.parents) else path.relative_to(ROOT)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures that pages show from elsewhere in the repository."""
    for page in list(files.documentation_pages()):
        for match in LINK.finditer(page.content_string):
            path = outside(page.src_uri, match["target"])
            if path and path.suffix in PICTURES and not files.get_file_from_path(f"{FOLDER}/{path.as_posix()}"):
                files.append(File.generated(config, f"{FOLDER}/{path.as_posix()}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links that leave docs/."""

    def replace(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match["target"])
        if path is None:
            return match[0]
        if path.suffix in PICTURES:
            up = "../" * page.file.src_uri.count("/")
            return f"{match['picture']}[{match['text']}]({up}{FOLDER}/{path.as_posix()})"
        if not config.repo_url:
            return match["text"]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{match['text']}]({config.repo_url.rstrip('/')}/{kind}/main/{path.as_posix()}{match['anchor'] or ''})"

    return LINK.sub(replace, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Docstrings' ``:class:`Name``` is the name alone."""
    return ROLE.sub("", html)
