"""Prices of rented cards from gpuhunt, which collects what nine providers list every day.

Only what asks for it comes here: gpuhunt's lists are downloaded, without an account.
"""

from __future__ import annotations

import datetime as dt
import logging
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING

from planner.base.errors import InputError, MissingExtraError, shorten
from planner.gpus.prices import ListedPrice
from planner.gpus.rented import rented_names

if TYPE_CHECKING:
    from gpuhunt import CatalogItem

SILENT_SECONDS = 30.0
"""How long a provider's list may send nothing; gpuhunt itself waits for ever."""
NAMED_AS = "dstack"
"""Whose names gpuhunt has: both are dstack's."""
_DAY = re.compile(r"(\d{4})(\d\d)(\d\d)")


def download_prices(today: dt.date) -> tuple[ListedPrice, ...]:
    """The lowest price on demand of each card that is listed, of the catalog's order.

    Of machines with one GPU where there are such, else of a GPU's share of a larger one. A list says its day
    in its version (20260818-42); one that does not is of `today`.

    Raises:
        MissingExtraError: gpuhunt is not installed.
        InputError: no list could be loaded, or none has a card that is known.
    """
    try:
        import gpuhunt
    except ImportError as error:
        raise MissingExtraError("--update-prices", error.name or "gpuhunt", "'vramwise[prices]'") from error
    catalog = gpuhunt.Catalog(balance_resources=False, auto_reload=False)
    with _quietly():
        try:
            catalog.load()
        except gpuhunt.GPUHuntError as error:
            reason = shorten(str(error.__cause__ or error), 120)
            raise InputError(f"--update-prices: gpuhunt could not load a list ({reason})") from error
        items = catalog.query(gpu_vendor="nvidia", min_gpu_count=1, spot=False)
    days = {provider: _day(one.version, today) for provider, one in catalog.catalog.items()}
    by = f"gpuhunt {metadata.version('gpuhunt')}"
    found = tuple(_lowest(items, days, by))
    if not found:
        raise InputError("--update-prices: no list of gpuhunt's has a card of the catalog")
    return found


def _lowest(items: Iterable[CatalogItem], days: dict[str, str], by: str) -> Iterator[ListedPrice]:
    offers: dict[str, list[CatalogItem]] = {}
    for item in items:
        if item.price > 0 and item.gpu_memory:
            offers.setdefault(f"{item.gpu_name}:{item.gpu_memory:g}GB", []).append(item)
    for card, names in rented_names().items():
        offered = offers.get(names.get(NAMED_AS, ""), [])
        alone = [item for item in offered if item.gpu_count == 1]
        for item in sorted(alone or offered, key=lambda item: (item.price / item.gpu_count, item.provider))[
            :1
        ]:
            yield ListedPrice(
                card=card,
                usd_per_hour=round(item.price / item.gpu_count, 4),
                provider=item.provider,
                listed=days[item.provider],
                by=by,
            )


def _day(version: str, today: dt.date) -> str:
    found = _DAY.match(version)
    return today.isoformat() if found is None else "-".join(found.groups())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without gpuhunt's own log, which has a traceback for each provider that fails, and not for ever."""
    logger, waits = logging.getLogger("gpuhunt"), socket.getdefaulttimeout()
    was = logger.propagate
    logger.propagate = False
    logger.addHandler(silent := logging.NullHandler())
    socket.setdefaulttimeout(SILENT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(waits)
        logger.removeHandler(silent)
        logger.propagate = was
