"""Prices that a person had refreshed: a file of the user's data folder, which the catalog is read with."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.base import validate
from planner.base.data_files import read_json, user_data_dir, write_atomically
from planner.base.errors import FieldError, InputError
from planner.base.json_codec import decode_fields, encode
from planner.base.values import dataclass
from planner.gpus.price import MAX_PRICE
from planner.gpus.spec import GpuSpec

VERSION = 1
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedPrice:
    """What one card costs an hour, in US dollars, on demand.

    `card` is an id of the catalog, `provider` whose offer it is, `listed` the day of the provider's list
    (YYYY-MM-DD), `by` who collected it.

    Raises:
        FieldError: a price or a day that cannot be.
    """

    card: str
    usd_per_hour: float
    provider: str
    listed: str
    by: str

    def __post_init__(self) -> None:
        for field in ("card", "provider", "by"):
            validate.text(field, getattr(self, field))
        validate.number("usd_per_hour", self.usd_per_hour, minimum=0.0, maximum=MAX_PRICE)
        try:
            dt.date.fromisoformat(self.listed)
        except (TypeError, ValueError) as error:
            raise FieldError("listed", self.listed, "a day as YYYY-MM-DD") from error

    @property
    def source(self) -> str:
        """Whose price it is, for what kind of use, and of which day: as the catalog says it of its own."""
        return f"{self.provider}, on-demand, {self.listed}, by {self.by}"


def prices_file() -> Path:
    """Where refreshed prices are kept."""
    return user_data_dir() / "prices.json"


def kept_prices() -> Mapping[str, ListedPrice]:
    """Refreshed prices by their card's id; none where nobody has refreshed any.

    Raises:
        InputError: the file holds something else; it is named.
    """
    path = prices_file()
    return {one.card: one for one in read_json(path, _read)} if path.exists() else {}


def keep_prices(prices: tuple[ListedPrice, ...]) -> Path:
    """Write refreshed prices, the whole file or nothing of it.

    Raises:
        InputError: the file cannot be written.
    """
    path = prices_file()
    values = {"version": VERSION, "prices": [encode(one) for one in prices]}
    try:
        write_atomically(path, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from error
    return path


def is_newer(price: ListedPrice, gpu: GpuSpec) -> bool:
    """Whether a refreshed price is to be told in place of the one that the catalog was shipped with."""
    shipped = _DATE.search(gpu.price_source or "")
    return shipped is None or price.listed >= shipped[0]


def _read(values: Any) -> tuple[ListedPrice, ...]:
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise InputError(f"no prices of version {VERSION} (write it anew: vramwise gpus --update-prices)")
    prices = values.get("prices")
    if not isinstance(prices, list):
        raise FieldError("prices", prices, "a list")
    return tuple(decode_fields(ListedPrice, one) for one in prices)
