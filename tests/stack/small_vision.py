"""Small vision-language models with random weights, saved as a folder that the launcher trains from: config,
weights, image processor, and the demo's tokenizer with the tokens and the chat template of the family.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from planner.base.data_files import PROFILES

TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
GEMMA_TOKENS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
        "vision_config": {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
        },
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "text_config": {
            **TEXT,
            "head_dim": 32,
            "sliding_window": 64,
            "model_type": "gemma3_text",
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "image_size": 112,
            "patch_size": 14,
            "vision_use_head": False,
            "model_type": "siglip_vision_model",
        },
        "mm_tokens_per_image": 16,
    },
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 112 * 112,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    },
    "gemma3": {
        "image_processor_type": "Gemma3ImageProcessor",
        "do_pan_and_scan": None,
        "image_seq_length": 16,
        "size": {"height": 112, "width": 112},
    },
}
_SHOWN = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
}


def template(family: str) -> str:
    """ChatML whose turns may be parts, as the families' own templates take them."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + _SHOWN[family] + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def save(family: str, folder: Path) -> Path:
    """Write a family's small model into a folder."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(PROFILES / "demo" / "model")
    tokens = QWEN_TOKENS if family == "qwen2_5_vl" else GEMMA_TOKENS
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template(family)
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    values = json.loads(json.dumps(CONFIGS[family]))
    values["text_config"] |= {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if family == "qwen2_5_vl":
        values |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
        values |= {
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
    else:
        values |= {"image_token_index": ids["<image_soft_token>"], "boi_token_index": ids["<start_of_image>"]}
        values |= {"eoi_token_index": ids["<end_of_image>"]}
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, **values), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[family]))
    return folder
