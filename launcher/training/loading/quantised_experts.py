"""Stacked experts in 4 bits, and PEFT's adapters on them.

bitsandbytes replaces nn.Linear alone when transformers loads a model, and leaves experts, which are 3-D
parameters, in 16 bits; `replace_parameter_4bit` (bitsandbytes/nn/parametrize.py) holds such a parameter in 4
bits and dequantises the whole stack where it is read. PEFT 0.21.2 cannot adapt what is held so. Three things
are done otherwise here, each needed by the releases in NEEDED_BY and by a test of
tests/stack/test_quantised_experts.py, which fails when upstream has mended it (findings/experts-4bit.md):

- Adapter first. PEFT looks experts up among a model's parameters, where a parametrised one has another name,
  and adapts nothing, without a word: while adapters are made each is a parameter of its shape that takes no
  memory (`as_parameters`).
- The adapter's own place in the chain. `ParamWrapper._remove_parametrizations` looks for a class that an
  adapter alone on its parameter is not of, and leaves it there: the second forward pass fails.
- What is read is not remembered before the adapter is there. PEFT reads the parameter's dtype, and torch the
  parameter when a parametrisation is registered, with torch's cache on where another of the module is adapted
  too: the weight without adapter is used then, and its adapter gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from planner.models.storage import EXPERT_NAMES

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

NEEDED_BY = {"bitsandbytes": "0.50.2", "peft": "0.21.2", "torch": "2.13.0"}
"""The newest releases that were seen to need what is done here."""


def is_stack(name: str, value: torch.Tensor) -> bool:
    """Whether a parameter of a model is a stack of experts' weights."""
    return name.rpartition(".")[2] in EXPERT_NAMES and value.dim() == 3


def quantise_all(model: torch.nn.Module, config: BitsAndBytesConfig) -> None:
    """Hold every stack of experts of a model in 4 bits, where the model has them in 16 or 32 already."""
    for module in list(model.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            if is_stack(name, value):
                quantise(module, name, value, config)


def quantised_parameters(model: torch.nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Modules that hold a stack of experts in 4 bits, its name in them, and torch's chain that makes it."""
    import bitsandbytes.nn.parametrize as bnb

    for module in model.modules():
        chains: Any = getattr(module, "parametrizations", {})
        for name in EXPERT_NAMES:
            if name in chains and isinstance(chains[name][0], bnb.Bnb4bitParametrization):
                yield module, name, chains[name]


def quantise(
    module: torch.nn.Module, name: str, weight: torch.nn.Parameter, config: BitsAndBytesConfig
) -> None:
    """Hold a stack of experts in 4 bits in a module, `weight` being what it is in 16 or 32.

    What it takes on the weight's device meanwhile is the weight and what becomes of it.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module.register_parameter(name, weight)
    replace_parameter_4bit(
        module,
        name,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
    )


def quantised(weight: torch.Tensor, config: BitsAndBytesConfig) -> tuple[torch.Tensor, Any]:
    """The bits of a stack and bitsandbytes' state of them, as `quantise` would have them."""
    from bitsandbytes.functional import quantize_4bit

    found: tuple[torch.Tensor, Any] = quantize_4bit(
        weight.contiguous(),
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
    )
    return found


@contextmanager
def as_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Experts in 4 bits as parameters of their shape, dtype and device that take no memory, for PEFT to
    adapt; in 4 bits again, with their adapters, when the context ends.
    """
    import torch.nn.utils.parametrize as torch_parametrize

    held = list(quantised_parameters(model))
    for module, name, chain in held:
        quantised = chain[0].quant_state, chain.original
        torch_parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        module.register_parameter(name, _hollow(*quantised))
    try:
        yield
    finally:
        for module, name, chain in held:
            module.register_parameter(name, chain.original)
            torch_parametrize.register_parametrization(module, name, chain[0], unsafe=True)
    adapt(model)


def adapt(model: torch.nn.Module) -> None:
    """Have PEFT's wrappers of experts in 4 bits put their adapters into torch's chains."""
    from peft.tuners.lora.layer import ParamWrapper

    quantised = {(id(module), name) for module, name, _ in quantised_parameters(model)}
    for wrapper in model.modules():
        if type(wrapper) is not ParamWrapper:
            continue
        if (id(wrapper.get_base_layer()), wrapper.parameter_name) in quantised:
            wrapper.__class__ = _wrapper_class()


def _hollow(state: Any, original: torch.Tensor) -> torch.nn.Parameter:
    """A parameter of what is quantised that has one element: PEFT reads its shape, dtype and device."""
    import torch

    one = torch.empty((), dtype=state.dtype, device=original.device)
    return torch.nn.Parameter(one.expand(state.shape), requires_grad=False)


_wrappers: list[type[Any]] = []
"""The class, made where PEFT is first needed."""


def _wrapper_class() -> type[Any]:
    if not _wrappers:
        _wrappers.append(_make_wrapper())
    return _wrappers[0]


def _make_wrapper() -> type[Any]:
    import torch.nn.utils.parametrize as torch_parametrize
    from peft.tuners.lora.layer import ParamWrapper, _LoraFactorsProxy

    class QuantisedParamWrapper(ParamWrapper):  # type: ignore[misc]
        """PEFT's wrapper of a parameter that is dequantised where it is read."""

        def _chain(self) -> Any:
            return self.get_base_layer().parametrizations[self.parameter_name]

        def get_param(self) -> torch.nn.Parameter:
            """What PEFT asks for shape and dtype, without dequantising it."""
            chain = self._chain()
            return _hollow(chain[0].quant_state, chain.original)

        @contextmanager
        def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
            """Fold the adapters into the weight while the context lasts, as PEFT's own does."""
            chain = self._chain()
            proxies = [
                _LoraFactorsProxy(*self.get_delta_factors(name))
                for name in active_adapters
                if name in self.lora_A
            ]
            chain.extend(proxies)
            try:
                # The module reads the stack once, and backward of what it computes needs this very one.
                with torch_parametrize.cached():
                    yield
            finally:
                for _ in proxies:
                    del chain[-1]

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Refused: 4 bits have no room for an adapter.

            Raises:
                NotImplementedError: always.
            """
            raise NotImplementedError("experts in 4 bits are merged in 16 (launcher/merging)")

    return QuantisedParamWrapper
