"""The documentation: its code runs and prints what it says, its reference is complete, and the site builds."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import load_script

import pcsim

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"# needs (\w+)\n")
"""First line of a block that is left out where an optional package is missing."""
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")
MODULES = (
    "pcsim",
    *(
        f"pcsim.{name}"
        for name in (
            "callbacks",
            "data",
            "diagnosis",
            "errors",
            "io",
            "metrics",
            "plots",
            "profiling",
            "topologies",
            "verify",
        )
    ),
)
SAME = doctest.OutputChecker()


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Language, text and line of every block of code; a text block right after code is what that code prints."""
    text, found, end = page.read_text(), [], -1
    for match in BLOCK.finditer(text):
        follows = match[1] == "text" and found and text[end : match.start()].strip() == ""
        if match[1] == "python" or follows:
            found.append((match[1], match[2], text.count("\n", 0, match.start()) + 2))
            end = match.end()
    return found


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run a page's blocks in order in one namespace, and compare what they print with what the page says."""
    monkeypatch.chdir(folder)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # classes that a block defines are looked up there
    printed, absent = "", False
    for language, text, line in blocks(page):
        if language == "python":
            needs = NEEDS.match(text)
            if absent := needs is not None and importlib.util.find_spec(needs[1]) is None:
                continue
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("\n" * (line - 1) + text, str(page), "exec"), module.__dict__)
            printed = output.getvalue()
        elif not absent:
            assert SAME.check_output(text, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), (
                f"{page_name(page)}, line {line}: the code above prints\n{printed}\nand the page says\n{text}"
            )
    return vars(module)


PAGES_WITH_CODE = [page for page in PAGES if page.exists() and blocks(page)]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=page_name)
def test_code_runs_and_prints_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("matplotlib", reason="pages draw figures")
    run(page, tmp_path, monkeypatch)


def test_readme_shows_the_state_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    names = run(ROOT / "README.md", tmp_path, monkeypatch)
    assert tuple(names["hidden"].error.shape) == (64, 128)


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=page_name)
def test_pictures_are_there(page: Path) -> None:
    for picture in PICTURE.findall(page.read_text()):
        assert (page.parent / picture).stat().st_size > 5_000, picture


def test_every_figure_is_drawn_by_code_and_shown(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the figures show digits")
    pytest.importorskip("matplotlib", reason="figures need it")
    figures = load_script(DOCS / "figures.py")
    kept = {path.stem for path in (DOCS / "figures").iterdir()}
    assert kept == set(figures.FIGURES)
    shown = {Path(picture).stem for page in PAGES if page.exists() for picture in PICTURE.findall(page.read_text())}
    assert kept <= shown
    quick = ["anatomy", "schedules", "auxiliary", "plan"]
    figures.main(quick, tmp_path)
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in quick)


def test_the_gallery_shows_every_example() -> None:
    examples = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py")}
    assert examples == set(re.findall(r"examples/[\w/]+\.py", (DOCS / "gallery.md").read_text()))


def public_names() -> Iterator[tuple[str, object]]:
    """Every public name with what it stands for: of ``__all__``, or the classes and functions that a module defines."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        listed = getattr(module, "__all__", None)
        for name, own in vars(module).items():
            defined = getattr(own, "__module__", None) == module_name and hasattr(own, "__name__")
            public = name in listed if listed is not None else defined and not name.startswith("_")
            if public and not inspect.ismodule(own) and not name.startswith("__"):
                yield f"{module_name}.{name}", own


def referenced() -> set[str]:
    return {name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}


def resolved(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_public_name_has_a_docstring() -> None:
    undocumented = []
    for name, own in public_names():
        if not (inspect.isclass(own) or inspect.isfunction(own)):
            continue
        parts = {name: own}
        if inspect.isclass(own):
            members = vars(own).items()
            parts |= {
                f"{name}.{member}": getattr(part, "__func__", part)
                for member, part in members
                if not member.startswith("_")
                and (inspect.isfunction(part) or isinstance(part, property | classmethod | staticmethod))
            }
        undocumented += [part_name for part_name, part in parts.items() if not (part.__doc__ or "").strip()]
    assert not undocumented


def test_the_reference_shows_every_public_name_and_no_other() -> None:
    shown = {name: resolved(name) for name in referenced()}
    objects = {id(own) for own in shown.values()}
    missing = [name for name, own in public_names() if name not in shown and id(own) not in objects]
    assert not missing, "add `::: NAME` to a page of docs/api"
    public = {name for name, _ in public_names()}
    assert set(shown) <= public


@pytest.mark.slow  # the site is built by .ci/run as well
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    for tool in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is missing: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert not built.stdout + built.stderr
    pages = {page.relative_to(tmp_path): page.read_text() for page in tmp_path.rglob("*.html")}
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)")
    assert {page: found for page, text in pages.items() if (found := loaded.findall(text))} == {}
    anchors = {anchor for text in pages.values() for anchor in re.findall(r'id="(pcsim\.[\w.]+)"', text)}
    assert referenced() <= anchors
    leftovers = re.compile(r":(?:class|meth|func|mod|attr|data):|class=\"arithmatex\"|<autoref")
    assert not [str(page) for page, text in pages.items() if leftovers.search(text)]


def test_public_modules_are_those_of_the_package() -> None:
    exported = {f"pcsim.{name}" for name in pcsim.__all__ if inspect.ismodule(getattr(pcsim, name))}
    assert exported <= set(MODULES)


def test_the_forge_runs_what_a_change_has_to_pass_on_every_python_that_is_named() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    matrix = re.search(r"python: \[(.*)\]", workflow)
    assert matrix is not None
    assert re.findall(r'"([\d.]+)"', matrix[1]) == named
    assert "bash .ci/run" in workflow


def test_the_version_is_the_same_everywhere() -> None:
    citation, changelog = (ROOT / "CITATION.cff").read_text(), (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {pcsim.__version__}\n" in citation
    assert re.search(rf"^## .*\b{re.escape(pcsim.__version__)}\b", changelog, re.MULTILINE)


def test_the_table_of_a_node_names_its_arguments() -> None:
    page = (DOCS / "guides" / "build.md").read_text(encoding="utf-8")
    table = page.split("| argument | what it does |")[1].split("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    known = inspect.signature(pcsim.Network.add_node).parameters.keys() - {"self", "name", "shape"}
    assert set(named) == known
