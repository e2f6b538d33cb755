"""What a manifest must be: the schema, and what a schema cannot say."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from pipeline.data.shipped import shipped_folder
from pipeline.errors import ConfigurationError

if TYPE_CHECKING:
    from pipeline.data.manifests import Manifest

__all__ = ["check_schema", "check_templates"]

_PLACEHOLDER = re.compile(r"\{(\w*)\}")


def check_schema(content: object, where: str) -> dict[str, Any]:
    """Return `content` if the manifest schema accepts it.

    Raises:
        ConfigurationError: it does not; the message begins with `where` and the key.
    """
    error = jsonschema.exceptions.best_match(_validator().iter_errors(content))
    if error is not None:
        key = ".".join(str(part) for part in error.absolute_path) or "top level"
        reason = " ".join(error.message.split())
        raise ConfigurationError(f"{where}: {key}: {reason[:300]}{_hint(error)}")
    if not isinstance(content, dict):
        raise ConfigurationError(f"{where}: expected a mapping of keys")
    return content


def check_templates(manifest: Manifest, where: str) -> None:
    """Refuse unknown fields in patterns and templates, and expressions that do not compile.

    Raises:
        ConfigurationError: the message begins with `where` and the key.
    """
    for name, expression in manifest.fields.items():
        _check_expression(expression, f"{where}: fields.{name}")
    for one in manifest.lists:
        _check_fields(_PLACEHOLDER.findall(one.image), one.fields, f"{where}: lists.{one.file}")
        _check_values(manifest, [*one.fields, "split"], where)
        if ".." in Path(one.image).parts:
            raise ConfigurationError(f"{where}: lists.{one.file}: {one.image!r} leaves dataset_dir")
    for index, entry in enumerate(manifest.files):
        key = f"{where}: files.{index}"
        for name, expression in entry.where.items():
            _check_expression(expression, f"{key}.where.{name}")
        _check_fields(entry.where, manifest.fields, f"{key}.where")
        for role, pattern in entry.roles.items():
            named = _PLACEHOLDER.findall(pattern)
            _check_fields(named, manifest.fields, f"{key}.{role}")
            if ".." in Path(pattern).parts:
                raise ConfigurationError(f"{key}.{role}: {pattern!r} leaves dataset_dir")
            unknown = {n for n in named if n not in _PLACEHOLDER.findall(entry.roles["image"])}
            unpaired = sorted(name for name in unknown if not name.startswith("_"))
            if unpaired:
                raise ConfigurationError(
                    f"{key}.{role}: field {unpaired[0]!r} is not in the image pattern, so nothing "
                    "could be paired by it; begin its name with an underscore if it may vary"
                )
        if entry.labels_required and "label" not in entry.roles:
            raise ConfigurationError(
                f"{key}: labels are required but there is no `label` pattern; "
                "add one or write `labels: optional`"
            )
        found = _PLACEHOLDER.findall(entry.roles["image"])
        _check_fields([table.field for table in manifest.tables], found, f"{where}: tables")
        further = [field for table in manifest.tables for field in table.columns]
        _check_values(manifest, [*found, *further, "split"], where)


def _check_values(manifest: Manifest, fields: Sequence[str], where: str) -> None:
    """Refuse templates over fields that a sample does not have."""
    for name, block in manifest.blocks.items():
        _check_fields([block["field"]], fields, f"{where}: blocks.{name}")
    known = [*fields, *manifest.blocks]
    _check_fields(_PLACEHOLDER.findall(manifest.subject), known, f"{where}: subject")
    _check_fields(_PLACEHOLDER.findall(manifest.stratum or ""), known, f"{where}: stratum")
    of_class = manifest.classes.get("of", "")
    _check_fields(_PLACEHOLDER.findall(of_class), known, f"{where}: classes.of")


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((shipped_folder("data_manifests") / "schema.json").read_text("utf-8"))
    return jsonschema.Draft202012Validator(schema)


def _hint(error: jsonschema.exceptions.ValidationError) -> str:
    """Return a remedy for what goes wrong most: misspelt keys and numbers without quotes."""
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = sorted(error.schema["properties"]) if isinstance(error.schema, Mapping) else []
        for key in error.instance:
            close = difflib.get_close_matches(str(key), known, n=1)
            if key not in known and close:
                return f"; did you mean {close[0]!r}?"
    if error.validator == "type" and error.validator_value == "string":
        return "; put it in quotes"
    return ""


def _check_expression(expression: str, key: str) -> None:
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ConfigurationError(f"{key}: {expression!r} is no expression: {error}") from error
    if compiled.groups:
        raise ConfigurationError(f"{key}: {expression!r} captures a group; write (?:...) instead")


def _check_fields(
    named: Sequence[str] | Mapping[str, str], known: Sequence[str] | Mapping[str, str], key: str
) -> None:
    for name in named:
        if name not in known:
            raise ConfigurationError(f"{key}: unknown field {name!r}, known: {', '.join(known)}")
