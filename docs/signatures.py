"""Prepares docstrings for the API reference, and adds the signatures that attrs writes, which no source shows."""

from __future__ import annotations

import importlib
import re
from typing import Any

import attrs
import griffe

# What a person reads as it stands, and Markdown as a quotation or as emphasis: "rate: > 0", "(batch, *shape)".
MARKUP = re.compile(r"^ *(?:>>>|\.\.\.) .*$|(?<=: )>(?= )|(?<![\\*\w`])\*(?=\w)", re.MULTILINE)
# The singular has no section of its own in griffe, and its prompts would become quotations.
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Escapes what is no Markdown, and adds ``__init__`` to every attrs class, as attrs does."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Escape an object's docstring, but for the code in it."""
        if obj.docstring is not None:
            plain = EXAMPLE.sub(r"\1Examples:", obj.docstring.value.replace("\\\\*", "*"))
            obj.docstring.value = MARKUP.sub(lambda f: f[0] if len(f[0]) > 1 else f"\\{f[0]}", plain)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add it, with the parameters in attrs' order."""
        if "__init__" in cls.members or not any("attrs." in str(decorator.value) for decorator in cls.decorators):
            return
        fields = attrs.fields(getattr(importlib.import_module(cls.module.path), cls.name))
        parameters = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
        for field in sorted((field for field in fields if field.init), key=lambda field: bool(field.kw_only)):
            kind = griffe.ParameterKind.keyword_only if field.kw_only else griffe.ParameterKind.positional_or_keyword
            given = cls.members.get(field.name)
            annotation = given.annotation if isinstance(given, griffe.Attribute) else None
            parameters.append(griffe.Parameter(field.alias, annotation=annotation, kind=kind, default=_default(field)))
            if field.name in cls.members and cls.members[field.name].docstring is None:
                cls.del_member(field.name)  # described as a parameter
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))


def _default(field: attrs.Attribute[Any]) -> str | None:
    if field.default is attrs.NOTHING:
        return None
    factory = getattr(field.default, "factory", None)
    return repr(field.default) if factory is None else f"{factory.__name__}()"
