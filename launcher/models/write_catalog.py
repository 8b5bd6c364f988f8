"""profiles/models.toml and profiles/configs -> profiles/models; the same input gives the same bytes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.models.inspect import inspect_config
from planner.base import data_files
from planner.base.errors import InputError, UnknownNameError
from planner.models import hub_config
from planner.models.catalog import MODELS, name_key
from planner.models.spec import ModelSpec
from planner.models.vision_config import PROCESSOR, whole_fields

CONFIGS = data_files.PROFILES / "configs"
PROCESSORS = CONFIGS / "processors"
TABLE = data_files.PROFILES / "models.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogEntry:
    """One model of models.toml, whose header says what each field is."""

    id: str
    hub_id: str
    published_total: int
    total_source: str
    hub_ids: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    stored_beside: int = 0
    stored_what: str = ""
    images: bool = False
    text_id: str = ""

    @property
    def parameter_count(self) -> int:
        """Parameters of the model described: the published total without what is stored beside them."""
        return self.published_total - self.stored_beside

    @property
    def names(self) -> tuple[str, ...]:
        """All that people type for it: id, aliases, Hub ids and their last parts. Where `text_id` is the
        entry of its language model alone, those of the Hub stand for that one.
        """
        if self.text_id:
            return (self.id, *self.aliases)
        hubs = (self.hub_id, *self.hub_ids)
        return (self.id, *self.aliases, *hubs, *(hub.rpartition("/")[2] for hub in hubs))


def read_table(path: Path = TABLE) -> tuple[CatalogEntry, ...]:
    """The entries of models.toml, in order."""
    models: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["model"]
    return tuple(
        CatalogEntry(**{**m, **{key: tuple(m.get(key, ())) for key in ("hub_ids", "aliases")}})
        for m in models
    )


def write_catalog(ids: Iterable[str] | None, folder: Path = MODELS) -> Iterator[str]:
    """Write the specs of these catalog models (None: all, and the index); yield a line for each change.

    Raises:
        InputError: a model is not understood, or has another total than the published one.
        UnknownNameError: an id that is not in models.toml.
    """
    entries = read_table()
    known = {entry.id for entry in entries}
    wanted = known if ids is None else set(ids)
    for unknown in sorted(wanted - known):
        raise UnknownNameError("catalog model", unknown, sorted(known), "(see profiles/models.toml)")
    specs: dict[str, ModelSpec] = {}
    configs: dict[str, Any] = {}
    for entry in entries:
        if entry.id in wanted:
            published = json.loads((CONFIGS / f"{entry.id}.json").read_bytes())
            specs[entry.id] = describe(entry, published)
            configs[entry.id] = fingerprint(published, images=entry.images)
            yield from _write(folder / f"{entry.id}.json", spec_text(specs[entry.id]))
    if ids is None:
        yield from _write(folder / "index.json", _index_text(entries, specs))
        yield from _write(folder / "configs.json", _object_text(configs))
        for stale in sorted(folder.glob("*.json")):
            if stale.stem not in known | {"index", "configs"}:
                stale.unlink()
                yield f"removed {stale.name}"


def describe(entry: CatalogEntry, published: Mapping[str, Any]) -> ModelSpec:
    """Inspect one catalog model and hold it to its published total."""
    spec = inspect_config(
        {**published, PROCESSOR: _processor(entry)} if entry.images else published,
        model_id=entry.id,
        hub_id=entry.hub_id,
        aliases=(*entry.aliases, *entry.hub_ids),
        note=f"the checkpoint also stores: {entry.stored_what}" if entry.stored_what else "",
    )
    if spec.parameter_count != entry.parameter_count:
        raise InputError(
            f"{entry.id}: {spec.parameter_count:,} parameters built, {entry.parameter_count:,} published"
        )
    return spec


def _processor(entry: CatalogEntry) -> dict[str, Any]:
    """The published preprocessor_config.json of an entry with images."""
    found: dict[str, Any] = json.loads((PROCESSORS / f"{entry.id}.json").read_bytes())
    return found


def fingerprint(published: Mapping[str, Any], *, images: bool = False) -> dict[str, Any]:
    """By what a config.json of this model is recognised: each field's values, and the required fields.

    A field is required when transformers builds another model without it. With `images` the fields are those
    of both parts, each of which is required where it is written.
    """
    if images:
        return _whole_fingerprint(published)
    resolved, written = _resolved(published), hub_config.relevant_fields(published)
    if resolved is None:
        raise InputError(f"transformers refuses the published config of a {published['model_type']}")
    accepted = {key: [value] for key, value in resolved.items()}
    for key, value in written.items():
        if value not in accepted.setdefault(key, []):
            accepted[key].append(value)
    required = ["model_type"]
    for key in written.keys() & published.keys() - {"model_type"}:
        without = _resolved({k: v for k, v in published.items() if k != key})
        # A key that transformers only carries along is missing without it, and nothing else changes.
        if without is None or {k: v for k, v in resolved.items() if k != key or k in without} != without:
            required.append(key)
    return {"accepted": dict(sorted(accepted.items())), "required": sorted(required)}


def _whole_fingerprint(published: Mapping[str, Any]) -> dict[str, Any]:
    resolved, written = _resolved(published, whole_fields), whole_fields(published)
    assert resolved is not None
    accepted = {key: [value] for key, value in resolved.items()}
    for key, value in written.items():
        if value not in accepted.setdefault(key, []):
            accepted[key].append(value)
    shared = written.keys() & resolved.keys()
    return {"accepted": dict(sorted(accepted.items())), "required": sorted(shared)}


def _resolved(
    published: Mapping[str, Any],
    relevant: Callable[[Mapping[str, Any]], dict[str, Any]] = hub_config.relevant_fields,
) -> dict[str, Any] | None:
    """The relevant fields with transformers' defaults filled in; None when it refuses the config."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = dict(published)
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (StrictDataclassError, ValueError):
        return None
    return relevant(json.loads(json.dumps(config.to_dict())))


def spec_text(spec: ModelSpec) -> str:
    """A spec as JSON with one parameter and one layer kind a line."""
    lines = []
    for key, value in spec.to_dict().items():
        if key in ("parameters", "layers"):
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f' "{key}": [\n  {items}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _index_text(entries: Iterable[CatalogEntry], specs: Mapping[str, ModelSpec]) -> str:
    models: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for entry in entries:
        spec = specs[entry.id]
        models.append(
            {
                "id": entry.id,
                "hub_id": entry.hub_id,
                "aliases": spec.aliases,
                "architecture": spec.architecture,
                "parameter_count": spec.parameter_count,
                "max_position_embeddings": spec.max_position_embeddings,
                "experts": max(layer.experts for layer in spec.layers),
            }
        )
        for name in entry.names:
            if names.setdefault(name_key(name), entry.id) != entry.id:
                raise InputError(f"{name} is a name of both {names[name_key(name)]} and {entry.id}")
    rows = ",\n  ".join(json.dumps(model) for model in models)
    by_name = json.dumps(dict(sorted(names.items())), indent=2)
    return f'{{\n "models": [\n  {rows}\n ],\n "names": {by_name}\n}}\n'


def _object_text(values: Mapping[str, Any]) -> str:
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    return f"{{\n{rows}\n}}\n"


def _write(path: Path, text: str) -> Iterator[str]:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        data_files.write_atomically(path, text)
        yield f"wrote {path.name}"
