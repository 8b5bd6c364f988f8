"""Products with the frozen base in 8 bits: what they compute, what they leave alone, and the check before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from benchmarks.eight_bit_learning import judged
from launcher.training import build
from launcher.training.callbacks import decoder_layers
from launcher.training.products import agreement, base_linear, scaled
from launcher.training.products.base_linear import use_eight_bit
from launcher.training.products.nf4 import Constants, dequantised, weight_in_e4m3
from planner.memory.compiled.kept import kept_names, kept_sizes
from planner.memory.decoder.groups import layer_groups
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from tests.stack.small_models import spec_of
from tests.stack.test_compilation import (
    LENGTH,
    RANK,
    TOKENS,
    compile_model,
    gradients,
    kept_by_layer,
    kept_bytes,
    loss_of,
    make_model,
)
from tests.stack.test_rehearsal import learned, trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS, INPUTS, OUTPUTS = 40, 128, 192


def four_bit(outputs: int = OUTPUTS, inputs: int = INPUTS, *, double: bool = True) -> bnb.nn.Linear4bit:
    """A 4-bit layer with random weights."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        inputs,
        outputs,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=double,
        quant_type="nf4",
    )
    weight = torch.randn(outputs, inputs) * 0.02
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type="nf4"
    )
    return layer.to("cpu").train()


def passes(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's output and its input's gradient, on fixed random numbers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, INPUTS, generator=generator).to(torch.bfloat16).requires_grad_()
    upstream = torch.randn(ROWS, OUTPUTS, generator=generator).to(torch.bfloat16)
    output = layer(x)
    return output.detach().float(), torch.autograd.grad(output, x, upstream)[0].float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def changed(layer: nn.Module, base_matmul: str) -> base_linear.Changed:
    """Change it as the one layer between those at the ends."""
    ends: list[tuple[str, nn.Module]] = [("end", nn.Sequential()) for _ in range(2)]
    return use_eight_bit([*ends, ("layer", nn.Sequential(layer)), *ends], base_matmul)


@pytest.fixture(autouse=True)
def one_exact_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small models have three layers: the one in the middle is to compute in 8 bits."""
    monkeypatch.setattr(base_linear, "EXACT_ENDS", 1)


@pytest.mark.parametrize("held", ["nf4", "nf4, plain constants", "16 bits"])
def test_products_are_those_of_the_weight_to_three_bits(held: str) -> None:
    if held == "16 bits":
        torch.manual_seed(0)
        layer: nn.Module = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    else:
        layer = four_bit(double=held == "nf4")
        one = Constants.of(layer.weight.quant_state)
        values = dequantised(
            layer.weight,
            one.absmax,
            one.code,
            one.nested,
            one.nested_code,
            one.offset,
            one.block,
            INPUTS,
        )
        assert torch.equal(values, bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state))
        scales = scaled.row_scales(values)
        there = weight_in_e4m3(layer.weight, one, scales, INPUTS, transposed=False)
        back = weight_in_e4m3(layer.weight, one, scales, INPUTS, transposed=True)
        assert torch.equal(there.float(), back.t().float())
        assert apart(there.float() * scales, values) < 0.03
    exact = passes(layer)
    kind = type(layer)
    assert changed(layer, "fp8_backward").changed == ("layer.0",)
    output, gradient = passes(layer)
    assert torch.equal(output, exact[0])
    assert 0.02 < apart(gradient, exact[1]) < 0.045
    layer.__class__ = kind
    changed(layer, "fp8")
    output, gradient = passes(layer)
    assert 0.02 < apart(output, exact[0]) < 0.045
    assert 0.02 < apart(gradient, exact[1]) < 0.045
    layer.eval()
    if held == "16 bits":  # bitsandbytes repacks 4-bit weights for inference on some CPUs
        assert torch.equal(passes(layer)[0], exact[0])


def test_rows_of_zeros_and_outliers_stay_finite() -> None:
    rows = torch.randn(4, 64)
    rows[1] = 0.0
    rows[2, 7] = 1e30
    narrow, scales = scaled.in_rows(rows)
    assert torch.equal(narrow[1].float(), torch.zeros(64))
    assert torch.isfinite(narrow.float()).all()
    assert apart(narrow.float() * scales, rows) < 0.03


def test_what_no_such_product_takes_is_left_and_named() -> None:
    odd = four_bit(outputs=200)
    found = changed(odd, "fp8")
    assert (found.changed, found.refused) == ((), ("layer.0",))
    assert type(odd) is bnb.nn.Linear4bit
    trained = nn.Linear(INPUTS, OUTPUTS, dtype=torch.bfloat16)
    assert changed(trained, "fp8") == base_linear.Changed(changed=(), refused=())


def eight_bit_model(base_matmul: str, **knobs: Any) -> Any:
    model = make_model(**knobs)
    layers = [(str(index), layer) for index, layer in enumerate(decoder_layers(model))]
    assert len(use_eight_bit(layers, base_matmul).changed) == 7 * len(layers)
    return model


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_compiled_and_checkpointed_layers_compute_the_same_and_keep_no_more(method: str) -> None:
    """fp8 in both passes: gradients equal those of eager layers, and what is kept that of 16-bit products."""
    eager = gradients(eight_bit_model("fp8", method=method, gradient_checkpointing=False))
    for checkpointed in (False, True) if method == "qlora" else (True,):
        model = eight_bit_model("fp8", method=method, gradient_checkpointing=checkpointed)
        compile_model(model)
        found = gradients(model)
        assert found.keys() == eager.keys()
        assert all(torch.equal(found[name], eager[name]) for name in eager)
        if not checkpointed and method == "qlora":
            scales = {one.untyped_storage().data_ptr() for one in model.buffers()}
            kept = [
                {at: tensor for at, tensor in layer.items() if at not in scales}
                for layer in kept_by_layer(model)
            ]
            assert [kept_bytes(layer) for layer in kept[1:]] == [planned_bytes(base_matmul="fp8")] * 2


def planned_bytes(**knobs: Any) -> int:
    """What the planner says that a layer in the middle keeps, its input apart."""
    setup = TrainingSetup(
        model="llama",
        max_length=LENGTH,
        lora_r=RANK,
        gradient_checkpointing=False,
        compile="regional",
        **knobs,
    )
    parts, _ = layer_groups(TrainingRun(setup=setup, model=spec_of("llama")))
    part = next(part for part in parts if 1 in part.indices)
    names = kept_names(part.layer, part.knobs, input_requires_grad=True) - {"x"}
    sizes = kept_sizes(part.layer, part.knobs)
    return TOKENS * sum(sizes[name] for name in names)


def one_layer(model: Any, limits: agreement.Sides) -> agreement.Agreement:
    """The second layer compared, on what the model gives it."""
    layer = decoder_layers(model)[1]
    with pytest.raises(agreement._ComparedError) as compared, agreement._compared(layer, limits):
        loss_of(model)
    return compared.value.found


@pytest.mark.parametrize("base_matmul", ["bf16", "fp8_backward", "fp8"])
def test_a_layer_that_runs_as_it_should_agrees_and_a_broken_one_does_not(
    base_matmul: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = agreement.LIMITS[base_matmul]
    if base_matmul == "bf16":
        model = make_model()
        compile_model(model)
    else:
        model = eight_bit_model(base_matmul)
    found = one_layer(model, limits)
    assert found.found, found
    assert all(difference < limits[side] / 2 for side, difference in found.differences.items()), found
    assert all(parameter.grad is None for parameter in model.parameters())
    if base_matmul == "bf16":
        return
    right = base_linear.scaled_product
    monkeypatch.setattr(base_linear, "scaled_product", lambda *given: right(*given) * 1.5)
    broken = one_layer(model, limits)
    assert not broken.found
    assert "input gradient by" in broken.in_words()
    for layer in decoder_layers(model):
        agreement.run_plain(layer)
    exact = make_model()
    assert loss_of(model).item() == loss_of(exact).item()


def trained(folder: Path, base_matmul: str, told: list[str] | None = None) -> list[float]:
    """Losses of a short run of the demo model, compared before its first step where `told` hears of it."""
    made = trainer(folder, dtype="bfloat16", method="qlora", lora_dropout=0.1)
    if base_matmul != "bf16":
        assert not build.use_eight_bit_products(made.model, base_matmul)
    if told is not None:
        warn = lambda message: told.append(f"warning: {message}")  # noqa: E731
        made.add_callback(agreement.LayerCheck(made, base_matmul, say=told.append, warn=warn))
    return learned(made)[0]


def test_a_run_is_compared_before_its_first_step_and_runs_plain_where_layers_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    unchecked = trained(tmp_path / "unchecked", "fp8_backward")
    assert trained(tmp_path / "checked", "fp8_backward", told) == unchecked
    assert told[0].startswith("a layer agrees with the plain one (output by 0.0%, input gradient by ")
    right = base_linear.scaled_product
    monkeypatch.setattr(base_linear, "scaled_product", lambda *given: right(*given) * 1.5)
    broken = trained(tmp_path / "broken", "fp8_backward", told)
    assert told[1].startswith("warning: a layer as it would run")
    assert "differs from the plain one (input gradient by" in told[1]
    assert told[1].endswith("all layers run plain, slower")
    assert broken == trained(tmp_path / "plain", "bf16")


def test_what_8_bits_cost_is_judged_by_the_spread_of_seeds() -> None:
    def lines(way: str, losses: tuple[float, ...]) -> list[dict[str, Any]]:
        return [{"way": way, "seed": seed, "exact": loss} for seed, loss in enumerate(losses, start=1)]

    exact = lines("bf16", (2.70, 2.72, 2.71))
    near, far = lines("fp8_backward", (2.71, 2.73, 2.72)), lines("fp8", (2.75, 2.77, 2.76))
    found = judged([*exact, *near, *far])
    assert found["spread"] == pytest.approx(0.02)
    assert found["modes"]["fp8_backward"]["above"] == pytest.approx(0.01)
    assert found["modes"]["fp8_backward"]["within_the_bar"] is True
    assert found["modes"]["fp8"]["within_the_bar"] is False
    # One seed has no spread, and so no verdict.
    assert judged([*exact[:1], *near[:1]])["modes"]["fp8_backward"]["within_the_bar"] is None
