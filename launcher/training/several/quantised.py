"""A model of bitsandbytes' layers that is marked as transformers marks one that it has loaded in 4 bits."""

from __future__ import annotations

from typing import Any


def mark_as_quantized(model: Any, quantization_config: Any) -> None:
    """Put bitsandbytes' linear layers, without weights, where transformers would put them when it loads."""
    import torch
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    quantizer = Bnb4BitHfQuantizer(quantization_config)
    skipped = quantizer.get_modules_to_not_convert(
        model, quantization_config.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    with torch.device("meta"):
        replace_with_bnb_linear(
            model,
            modules_to_not_convert=skipped,
            quantization_config=quantization_config,
            pre_quantized=False,
        )
    model.config.quantization_config = quantization_config
    model.hf_quantizer = quantizer
    model.quantization_method = quantization_config.quant_method
    model.is_quantized = True
    model.is_loaded_in_4bit = True
    quantizer._process_model_after_weight_loading(model)
