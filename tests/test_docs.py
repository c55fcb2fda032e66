"""The documentation is true: its Python runs, its links lead somewhere, its pages are reachable.

Every block fenced as ```python runs, those of one page one after the other and in one namespace; output
that a page promises is an assert in the block. A block that is not meant to run is fenced as something
else.
"""

import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#|mailto:)([^)#\s]+)")


def name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def code_of(page: pathlib.Path) -> list[str]:
    """The Python blocks of a page, padded so that an error names the page's own line."""
    text = page.read_text()
    return ["\n" * text[: found.start(1)].count("\n") + found[1] for found in FENCE.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=name)
def test_code_runs(page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # some pages write files
    namespace = {"__name__": "__docs__"}
    for code in code_of(page):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: pathlib.Path):
    dead = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not dead, f"{name(page)} links to {dead}"


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    entries = [page for entry in nav for page in entry.values()]
    listed = {path for page in entries for path in (page if isinstance(page, list) else [page])}
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_the_pages_with_examples_have_some():
    for page in ("README.md", "docs/quickstart.md", "docs/rules.md", "docs/dispatch.md", "docs/report.md"):
        assert code_of(ROOT / page), page
