"""Builds the static site: README, docs, model cards, and every notebook executed on the miniature.

python docs/build.py [--output site] [--without-notebooks]
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jinja2
import mistune
import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "models/*.md", "models/reference/*.md"]
FILES = [
    "docs/*.png",
    "LICENSE",
    "NOTICE",
    "CITATION.cff",
    "models/results.json",
    "models/detector.json",
    "kernel-metadata.json",
]
TEMPLATE = jinja2.Template("""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; font: 17px/1.55 system-ui, sans-serif; color: #1b1f24 }
pre, code { font: 14px/1.45 ui-monospace, monospace; background: #f4f5f7 } pre { padding: .8rem; overflow-x: auto }
table { border-collapse: collapse; display: block; overflow-x: auto } td, th { border: 1px solid #d5d9de; padding: .3rem .6rem }
img { max-width: 100% } a { color: #0550ae } nav { margin-bottom: 1.5rem }
</style></head><body><nav><a href="{{ home }}">Deepfake detection by face and voice</a></nav>{{ body }}</body></html>""")


def target_of(path: str) -> str:
    """The page of a source file: ``index.html`` for a README."""
    return re.sub(r"\.(md|ipynb)$", ".html", re.sub(r"README\.md$", "index.md", path))


def linked(html: str) -> str:
    """Point links to Markdown files and notebooks at their pages."""

    def page(match: re.Match) -> str:
        place, mark, fragment = match[1].partition("#")
        if urlsplit(place).scheme or not place.endswith((".md", ".ipynb")):
            return match[0]
        folder, _, name = place.rpartition("/")
        return f'href="{folder}{"/" if folder else ""}{target_of(name)}{mark}{fragment}"'

    return re.sub(r'href="([^"]+)"', page, html)


def markdown_page(path: Path, site: Path) -> None:
    name = str(path.relative_to(ROOT))
    body = mistune.create_markdown(escape=False, plugins=["table"])(path.read_text(encoding="utf-8"))
    target = site / target_of(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    home = os.path.relpath(site / "index.html", target.parent)
    title = path.stem if name != "README.md" else "Deepfake detection by face and voice"
    target.write_text(linked(TEMPLATE.render(title=title, body=body, home=home)), encoding="utf-8")


def notebook_page(path: Path, site: Path, work: Path) -> None:
    """Execute a notebook with quick settings and save it as HTML."""
    notebook = nbformat.read(path, as_version=4)
    os.environ.update(DEEPFAKE_QUICK="1", DEEPFAKE_WORK=str(work), MPLBACKEND="agg", TQDM_DISABLE="1")
    os.environ.pop("DEEPFAKE_DATA", None)
    ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    html, _ = HTMLExporter().from_notebook_node(notebook)
    (site / "notebooks").mkdir(exist_ok=True)
    (site / "notebooks" / f"{path.stem}.html").write_text(linked(html), encoding="utf-8")


def broken_links(site: Path) -> list[str]:
    """Links inside the site that lead nowhere."""
    found = []
    for page in site.rglob("*.html"):
        text = re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for place in re.findall(r'(?:href|src)="([^"#]+)', text):
            parts = urlsplit(place)
            if not parts.scheme and parts.path and not (page.parent / unquote(parts.path)).exists():
                found.append(f"{page.relative_to(site)}: {place}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "site")
    parser.add_argument(
        "--without-notebooks",
        action="store_true",
        help="leave the notebooks out; their links are not checked",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        for pattern in PAGES:
            for path in sorted(ROOT.glob(pattern)):
                markdown_page(path, site)
        for pattern in FILES:
            for path in ROOT.glob(pattern):
                target = site / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        if not options.without_notebooks:
            for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
                print(path.stem, flush=True)
                notebook_page(path, site, Path(scratch) / "work")
        broken = [
            link for link in broken_links(site) if not (options.without_notebooks and "notebooks/" in link)
        ]
        if not broken:
            options.output.mkdir(parents=True, exist_ok=True)
            shutil.copytree(site, options.output, dirs_exist_ok=True)
    print("\n".join(broken) or options.output / "index.html")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
