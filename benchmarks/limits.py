"""Whether limits are those of `plan`, for random pairs of a model and a card.

    python -m benchmarks.limits [--pairs N] [--seed S]

For each pair: a plan at the longest length that is said to fit must fit, and one for 512 tokens more must
not, unless that is beyond the model's window. Writes benchmarks/results/limits.json.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from benchmarks.results import write_result
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import list_models, load_shipped
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request

STEP = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    arguments = parser.parse_args()
    chosen = random.Random(arguments.seed)
    models, cards = list_models(), list(gpu_catalog())
    rows = [judge(chosen.choice(models).id, chosen.choice(cards).id) for _ in range(arguments.pairs)]
    wrong = [row for row in rows if not row["holds"]]
    write_result("limits", {"seed": arguments.seed, "wrong": len(wrong), "pairs": rows})
    print(f"seed {arguments.seed}: {len(rows) - len(wrong)} of {len(rows)} pairs hold")
    for row in wrong:
        print(row)


def judge(model: str, gpu: str) -> dict[str, Any]:
    """One pair: the longest length that is said to fit, and what plans for it and beyond say."""
    window = load_shipped(model).max_position_embeddings
    longest = make_plan(make_request(model, gpu=gpu), longest=True, whole=False).longest

    def fits(length: int) -> bool:
        request = make_request(model, gpu=gpu, knobs={"max_length": length})
        return make_plan(request, whole=False).fits

    if longest is None:
        shortest = min(STEP, window)
        return {"model": model, "gpu": gpu, "longest": None, "holds": not fits(shortest)}
    length = longest.max_length
    beyond = length + STEP
    holds = fits(length) and (beyond > window or not fits(beyond))
    return {
        "model": model,
        "gpu": gpu,
        "longest": length,
        "reaches_model_limit": longest.reaches_model_limit,
        "holds": holds,
    }


if __name__ == "__main__":
    main()
