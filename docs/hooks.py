"""What the site needs beyond MkDocs: equations without scripts, and references between docstrings as links."""

from __future__ import annotations

import html
import importlib
import inspect
import posixpath
import re
from functools import cache
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:class|meth|func|mod|attr|data|exc):<code>~?([\w.]+)</code>")
SECTION = re.compile(r"SPEC §(\d+)")
MODULES = (
    "pcsim",
    *(
        f"pcsim.{name}"
        for name in ("callbacks", "data", "diagnosis", "errors", "io", "metrics", "plots", "topologies", "verify")
    ),
)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Equations become MathML, which browsers draw by themselves; roles and sections of docstrings become links."""
    content = EQUATION.sub(_equation, content)
    if page.file.src_uri.startswith("api/"):
        theory = posixpath.relpath("theory.html", posixpath.dirname(page.url))
        content = ROLE.sub(_reference, content)
        content = SECTION.sub(rf'<a href="{theory}#section-\1">SPEC §\1</a>', content)
    return content


def _equation(found: re.Match[str]) -> str:
    block = found[1] == "div"
    drawn: str = convert(html.unescape(found[2]), display="block" if block else "inline")
    return f'<div class="equation">{drawn}</div>' if block else drawn


def _reference(found: re.Match[str]) -> str:
    name = found[1]
    identifier = public_names().get(name.removeprefix("pcsim."))
    shown = f"<code>{name}</code>"
    return shown if identifier is None else f'<autoref identifier="{identifier}" optional>{shown}</autoref>'


@cache
def public_names() -> dict[str, str]:
    """Anchor in the reference by name, as docstrings have it: "Network", "Network.add_node", "plots.new_figure"."""
    names: dict[str, str] = {}
    for module_name in reversed(MODULES):
        module = importlib.import_module(module_name)
        for name in names_of(module):
            anchor, own = f"{module_name}.{name}", getattr(module, name)
            names[name] = names[anchor.removeprefix("pcsim.")] = anchor
            if inspect.isclass(own):
                names.update({f"{name}.{member}": f"{anchor}.{member}" for member in vars(own) if member[0] != "_"})
    return names


def names_of(module: Any) -> list[str]:
    """Public names of a module: its ``__all__``, or the classes and functions that it defines."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return [name for name in listed if not name.startswith("__") and not inspect.ismodule(getattr(module, name))]
    return [
        name
        for name, own in vars(module).items()
        if not name.startswith("_") and getattr(own, "__module__", None) == module.__name__ and hasattr(own, "__name__")
    ]
