"""Records for others: what was measured and where, without a path, a name or anything of the data.

Everything in an exported record is a number, a word of a fixed list, a name of the catalogs or a release:
what a person may have typed (names of runs, models and calibrations) is replaced or left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from planner.base.data_files import PROFILES
from planner.base.values import dataclass
from planner.calibration.records import RunRecord
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import catalog_id
from planner.setup.stack import TRL

VERSIONED = (*TRL.packages, "liger-kernel", "torch.distributed")
"""What of a record's versions is exported: the packages that memory and speed depend on, and what joined its
ranks."""
OWN = "own calibration"
_RELEASE = re.compile(r"[0-9][0-9A-Za-z.]*(?:\+(?:cu[0-9]+|cpu))?|gloo|nccl")
_MODULE = re.compile(r"[a-z0-9_.-]{1,40}")
_DRIVER = re.compile(r"CUDA [0-9]+(?:\.[0-9]+)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """Records for others, and of those that are not the ids with the reason."""

    records: tuple[RunRecord, ...]
    left_out: tuple[tuple[str, str], ...]


def exported(records: Iterable[RunRecord], known: Callable[[str], str | None] = catalog_id) -> Exported:
    """Records in the form for others, each once; `known` gives the catalog's id of a model's name."""
    kept: dict[str, RunRecord] = {}
    left_out = []
    for record in records:
        reason = _why_not(record, known)
        if reason is not None:
            left_out.append((record.id, reason))
            continue
        public = public_form(record, known)
        kept.setdefault(public.id, public)
    return Exported(records=tuple(kept.values()), left_out=tuple(left_out))


def _why_not(record: RunRecord, known: Callable[[str], str | None]) -> str | None:
    """Why a record is of no use to others, or None."""
    if known(record.setup.model) is None:
        return "its model is not in the catalog, so that nobody else can tell what it is"
    if record.lengths:
        return "it holds the lengths of its data's examples"
    targets = record.setup.target_modules
    if not isinstance(targets, str) and not all(_MODULE.fullmatch(name) for name in targets):
        return "its target_modules are no plain names of modules"
    if record.phase("step") is None:
        return "no step was measured"
    return None


def public_form(record: RunRecord, known: Callable[[str], str | None] = catalog_id) -> RunRecord:
    """The record as others get it. Its id follows from what it says, its date has no time of day."""
    model, here = known(record.setup.model), record.environment
    assert model is not None
    gpu = gpu_catalog().match_driver(here.gpu_name, here.total_bytes)
    environment = replace(
        here,
        gpu_name=_card(here.gpu_name) if gpu is None else gpu.name,
        gpu_id=_card(here.gpu_name) if gpu is None else gpu.id,
        driver=_matching(_DRIVER, here.driver),
        python=_matching(_RELEASE, here.python),
        versions=tuple(
            (package, _matching(_RELEASE, version))
            for package, version in here.versions
            if package in VERSIONED
        ),
    )
    predicted = record.predicted
    if predicted is not None and predicted.coefficients not in _shipped():
        predicted = replace(predicted, coefficients=OWN)
    public = replace(
        record,
        id="unnamed",
        created=record.created[:10],
        setup=record.setup.replace(model=model),
        environment=environment,
        predicted=predicted,
    )
    said = json.dumps(public.to_dict(), sort_keys=True)
    return replace(
        public, id=f"{environment.gpu_id}-{model}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
    )


def is_public(record: RunRecord) -> bool:
    """Whether a record is in the form for others already."""
    return _why_not(record, catalog_id) is None and public_form(replace(record, id="unnamed")) == record


def _card(name: str) -> str:
    """A card's name of a driver's letters, digits and blanks."""
    return re.sub(r"[^A-Za-z0-9 .()-]", "", name)[:60] or "unknown"


def _matching(pattern: re.Pattern[str], text: str) -> str:
    """What of a text has the form of a release."""
    found = pattern.match(text)
    return found[0] if found else "unknown"


def _shipped() -> frozenset[str]:
    """Names of the shipped coefficients."""
    return frozenset(path.stem for path in (PROFILES / "calibration").glob("*.json"))
