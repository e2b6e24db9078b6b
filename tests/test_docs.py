"""The pages name what is there: links, files, modules."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if not p.is_symlink()]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"\b(?:[\w.*-]+/)+[\w*-]+\.(?:py|md|sh|yaml)\b")
MODULE = re.compile(r"python -m (opdctl[.\w]*)")
MADE_BY_THE_READER = ("weights/trust.py", "methods/trust.yaml")  # docs/adding-a-method.md
PUT_INTO_A_PAGE_OF_DOCS = ("claims", "methods")  # by docs/claims.py, benchmarks/methods.py


def anchors(page):
    """The anchors that a hosting platform gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    missing, home = [], page.parent
    if home.name in PUT_INTO_A_PAGE_OF_DOCS:
        home = home.parent
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = home / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_modules_that_are_named_exist(page):
    text = LINK.sub("]", page.read_text(encoding="utf-8"))
    named = {n for n in FILE.findall(text) if not n.endswith(MADE_BY_THE_READER)}
    homes = (ROOT, ROOT / "opdctl", page.parent)
    missing = {n for n in named if not any(any(home.glob(n)) for home in homes)}
    for module in MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            missing.add(module)
    assert not missing
