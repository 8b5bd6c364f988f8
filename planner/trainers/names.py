"""Names of the trainers on the command line: all that its options need to know."""

from __future__ import annotations

TRAINER_NAMES = ("axolotl", "llamafactory", "trl", "unsloth")
