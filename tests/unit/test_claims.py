"""Claims: what is read of a sentence or a table, and what is said of each figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import guide_claims
from launcher import cli
from planner.base.errors import InputError
from planner.claims.claim import BEYOND, POSSIBLE, TIGHT, Claim, JudgedFigure
from planner.claims.judge import judge
from planner.claims.sentence import read_claim
from planner.claims.table import read_table
from planner.planning.estimation import estimate

GIB = 2**30
HEADLINE = "Qwen2.5-14B 4k QLoRA: 11.8 GB, 2,600 tok/s on a 5060 Ti"


def figures(text: str) -> dict[str, JudgedFigure]:
    return {one.figure.kind: one for one in judge(read_claim(text)).figures}


@pytest.mark.parametrize(
    ("text", "model", "gpu", "knobs", "stated", "tokens"),
    [
        (
            HEADLINE,
            "qwen2.5-14b",
            "rtx-5060-ti-16gb",
            {"method": "qlora", "max_length": 4096},
            {"memory": (11.75 * GIB, 11.85 * GIB), "tokens_per_second": (2599.5, 2600.5)},
            None,
        ),
        (
            "Llama 3.1 8B LoRA r=32, batch 4, 1k examples of 2,048 tokens x 3 epochs: 1-3 h on an A100 80GB",
            "llama-3.1-8b",
            "a100-80gb",
            {"method": "lora", "lora_r": 32, "per_device_train_batch_size": 4, "max_length": 2048},
            {"hours": (0.5, 3.5)},
            3 * 1000 * 2048,
        ),
        (
            "llama-2-7b full fine-tuning, 1,000 x 2,048 tokens: 90 min on 4x h100",
            "llama-2-7b",
            "4xh100-80gb",
            {"method": "full", "max_length": 2048},
            {"hours": (89.5 / 60, 90.5 / 60)},
            1000 * 2048,
        ),
        (
            "Qwen2.5-14B: NF4 base is 7.5 GB, peak 12,000 MiB",
            "qwen2.5-14b",
            None,
            {"method": "qlora"},
            {"weights": (7.45 * GIB, 7.55 * GIB), "memory": (11999.5 * 2**20, 12000.5 * 2**20)},
            None,
        ),
        (
            "my-org/my-model-7b QLoRA on one 24 GB card",
            "my-org/my-model-7b",
            "24GB",
            {"method": "qlora"},
            {},
            None,
        ),
    ],
)
def test_a_claim_is_read(
    text: str,
    model: str,
    gpu: str | None,
    knobs: dict[str, object],
    stated: dict[str, tuple[float, float]],
    tokens: float | None,
) -> None:
    found = read_claim(text)
    assert (found.model, found.gpu, dict(found.knobs), found.tokens) == (model, gpu, knobs, tokens)
    assert found.unread == ()
    assert {one.kind: (one.low, one.high) for one in found.figures} == {
        kind: pytest.approx(ends) for kind, ends in stated.items()
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("7B QLoRA: 10 GB", "no model"),
        ("llama-2-7b: 10 GB", "no method"),
        ("llama-2-7b qlora", "neither a figure nor a card"),
        ("llama-2-7b qlora 100 tok/s", "needs a card"),
        ("llama-2-7b qlora on a 4090: 3 hours", "the work it is for"),
        ("", "printable"),
    ],
)
def test_what_cannot_be_judged_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_claim(text)


def test_what_is_not_understood_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_claim("llama-2-7b qlora 10 GB with 12foo").unread == ("12foo",)
    assert cli.run(["check", "llama-2-7b qlora 10 GB with 12foo"]) == 0
    assert "not understood" in capsys.readouterr().err


def test_a_guide_s_speed_is_beyond_the_card_with_the_true_figures() -> None:
    found = figures(HEADLINE)
    assert found["tokens_per_second"].verdict == BEYOND
    assert found["card"].verdict == POSSIBLE
    # The true figure is what `estimate` says of the setup that it is of.
    memory = found["memory"]
    assert memory.setup is not None
    told = estimate(memory.setup, gpu="rtx-5060-ti-16gb").memory
    assert (memory.expected, memory.expected_high) == (told.peak_bytes, told.peak_upper_bytes)
    speed = found["tokens_per_second"]
    assert speed.expected is not None
    assert speed.limit is not None
    assert speed.expected < speed.limit < 2600


@pytest.mark.parametrize(("kind", "unit"), [("memory", "GB"), ("tokens_per_second", "tok/s")])
def test_verdicts_change_where_they_are_said_to(kind: str, unit: str) -> None:
    def verdict(figure: float) -> str:
        text = f"Qwen2.5-14B 4k QLoRA: {figure:.4f} {unit} on a 5060 Ti"
        return figures(text)[kind].verdict

    true = figures(f"Qwen2.5-14B 4k QLoRA: 1 {unit} on a 5060 Ti")[kind]
    assert true.expected is not None
    assert true.expected_high is not None
    assert true.limit is not None
    if kind == "memory":
        expected, limit = true.expected / GIB, true.limit / GIB
        assert [verdict(x) for x in (expected + 0.001, expected - 0.001)] == [POSSIBLE, TIGHT]
        assert [verdict(x) for x in (limit + 0.001, limit - 0.001)] == [TIGHT, BEYOND]
    else:
        high, limit = true.expected_high, true.limit
        assert [verdict(x) for x in (high - 0.01, high + 0.01)] == [POSSIBLE, TIGHT]
        assert [verdict(x) for x in (limit - 0.01, limit + 0.01)] == [TIGHT, BEYOND]


def test_a_speed_of_what_does_not_fit_is_beyond_the_card() -> None:
    found = figures("llama-2-70b QLoRA at 2,048 tokens: 1 tok/s on a 4090")
    assert {one.verdict for one in found.values()} == {BEYOND}
    assert found["tokens_per_second"].expected is None


def test_knobs_that_are_stated_are_kept() -> None:
    claim = read_claim("llama-3.1-8b QLoRA at 2,048 tokens: 30 GB", knobs={"gradient_checkpointing": False})
    (found,) = judge(claim).figures
    assert found.setup is not None
    assert not found.setup.gradient_checkpointing


TABLES = {
    "csv": """claim,model,gpu,method,max_length,memory,speed
8B,llama-3.1-8b,rtx-4090,qlora,"2,048",10 GB,"9,000 tok/s"
""",
    "md": """# Page

| claim | gpu |
| --- | --- |
| `llama-2-7b` QLoRA at 2k: 10 GB | 24GB |

| other |
| --- |
| x |
""",
}


def test_tables_are_read(tmp_path: Path) -> None:
    read: dict[str, list[Claim]] = {}
    for kind, text in TABLES.items():
        path = tmp_path / f"claims.{kind}"
        path.write_text(text)
        read[kind] = list(read_table(path, knobs={}, model=None, gpu="16GB"))
    (csv,), (markdown,) = read["csv"], read["md"]
    assert (csv.text, csv.model, csv.gpu, dict(csv.knobs)["max_length"]) == (
        "8B",
        "llama-3.1-8b",
        "rtx-4090",
        2048,
    )
    assert {one.kind for one in csv.figures} == {"memory", "tokens_per_second"}
    assert (markdown.model, markdown.gpu) == ("llama-2-7b", "24GB")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("claim,colour\nx,y\n", "colour"),
        ("claim\n", "no table"),
        ("claim,gpu\nllama-2-7b qlora 10 GB\n", "row 1: 1 cells"),
        ("claim,max_length\nllama-2-7b qlora 10 GB,long\n", "row 1: max_length"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_by_its_row(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "claims.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=reason):
        list(read_table(path, knobs={}, model=None, gpu=None))


def test_the_command_exits_with_3_where_a_figure_is_beyond(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", HEADLINE, "--json"]) == 3
    (claim,) = json.loads(capsys.readouterr().out)["claims"]
    assert {one["kind"]: one["verdict"] for one in claim["figures"]}["tokens_per_second"] == BEYOND
    assert cli.run(["check", "llama-2-7b QLoRA at 2k: 10 GB on a 4090"]) == 0
    assert "possible" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"cannot be read"):
        cli.run(["check", "missing.csv"])


def test_the_guides_claims_are_those_of_the_page() -> None:
    judged = guide_claims.judged()
    verdicts = {
        (one.claim.text, figure.figure.kind): figure.verdict for one in judged for figure in one.figures
    }
    assert verdicts["70B on one 24 GB card", "card"] == BEYOND
    assert verdicts["14B on an RTX 5060 Ti", "tokens_per_second"] == BEYOND
    assert verdicts["70B needs", "memory"] == POSSIBLE
    page = (Path(guide_claims.__file__).parents[1] / "docs" / "claims.md").read_text(encoding="utf-8")
    assert all(f"| {one.claim.text} |" in page for one in judged)
