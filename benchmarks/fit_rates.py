"""Fit the shipped throughput rates to the committed records: `python -m benchmarks.fit_rates [GPU ...]`.

Without names, every GPU with records is fitted; one with shipped rates starts from nothing else, any other
from the rates of the first, scaled. Writes profiles/calibration/throughput and prints held-out errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from planner.accuracy import shipped_records, speed_accuracy
from planner.data_files import PROFILES, write_atomically
from planner.gpu_catalog import gpu_catalog
from planner.model_catalog import load_shipped
from planner.throughput.fit import fit_rates, reference_start
