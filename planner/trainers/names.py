"""Names of trainers and of services that rent cards: all that the command line's options need to know."""

from __future__ import annotations

TRAINER_NAMES = ("axolotl", "llamafactory", "trl", "unsloth")
JOB_SERVICES = ("sky", "dstack")
