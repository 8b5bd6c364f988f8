"""A causal language model of an architecture that exists nowhere else, in transformers' own registry.

Nothing in it has a name that a recipe knows. It has two kinds of blocks: one whose attention and MLP read the
same normed input side by side, with queries, keys and values in one projection, and a squared ReLU; and one
without attention, which mixes neighbouring tokens by a convolution and gates the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TINY: dict[str, Any] = {
    "model_type": "comet",
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "widening": 3,
    "max_position_embeddings": 2048,
}


class CometConfig(PreTrainedConfig):
    model_type = "comet"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        widening: int = 3,
        max_position_embeddings: int = 2048,
        **rest: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.widening = num_hidden_layers, widening
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        rest.setdefault("tie_word_embeddings", False)
        super().__init__(**rest)


class CometScale(nn.Module):
    """Divides by the largest magnitude, and weighs in fp32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: Any) -> Any:
        wide = x.float()
        return (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.gain.float()).to(x.dtype)


class CometSight(nn.Module):
    """Attention and a squared-ReLU MLP on one normed input."""

    def __init__(self, config: CometConfig, index: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, index
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.num_key_value_groups = self.heads // self.shared
        self.is_causal = True
        inner = config.widening * config.hidden_size
        self.together = nn.Linear(
            config.hidden_size, (self.heads + 2 * self.shared) * self.head_dim, bias=False
        )
        self.back = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.widen = nn.Linear(config.hidden_size, inner, bias=False)
        self.narrow = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Any, attention_mask: Any, **kwargs: Any) -> Any:
        batch, length, _ = x.shape
        sizes = [part * self.head_dim for part in (self.heads, self.shared, self.shared)]
        query, key, value = (
            part.reshape(batch, length, -1, self.head_dim).transpose(1, 2)
            for part in self.together(x).split(sizes, dim=-1)
        )
        run = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        seen, _ = run(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.back(seen.reshape(batch, length, -1)) + self.narrow(torch.relu(self.widen(x)).square())


class CometDrift(nn.Module):
    """A gated causal convolution over neighbouring tokens."""

    def __init__(self, config: CometConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.enter = nn.Linear(size, 2 * size, bias=False)
        self.mix = nn.Conv1d(size, size, 4, padding=3, groups=size, bias=False)
        self.leave = nn.Linear(size, size, bias=False)

    def forward(self, x: Any, attention_mask: Any, **kwargs: Any) -> Any:
        content, gate = self.enter(x).chunk(2, dim=-1)
        mixed = self.mix(content.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.leave(mixed * torch.sigmoid(gate))


class CometBlock(GradientCheckpointingLayer):
    def __init__(self, config: CometConfig, index: int) -> None:
        super().__init__()
        self.scale = CometScale(config.hidden_size)
        self.core = CometDrift(config) if index % 2 else CometSight(config, index)

    def forward(self, hidden: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return hidden + self.core(self.scale(hidden), attention_mask, **kwargs)


class CometPreTrainedModel(PreTrainedModel):
    config_class = CometConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ("CometBlock",)


class CometModel(CometPreTrainedModel):
    def __init__(self, config: CometConfig) -> None:
        super().__init__(config)
        self.sky = nn.Embedding(config.vocab_size, config.hidden_size)
        self.trail = nn.ModuleList(CometBlock(config, index) for index in range(config.num_hidden_layers))
        self.end = CometScale(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.sky

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.sky = value

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        # As in transformers' own models a variable holds the embeddings while the layers run.
        if inputs_embeds is None:
            inputs_embeds = self.sky(input_ids)
        hidden = inputs_embeds
        for block in self.trail:
            hidden = block(hidden, None)
        return BaseModelOutputWithPast(last_hidden_state=self.end(hidden))


class CometForCausalLM(CometPreTrainedModel, GenerationMixin):
    def __init__(self, config: CometConfig) -> None:
        super().__init__(config)
        self.model = CometModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        found = self.model(input_ids=input_ids, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(found.last_hidden_state))


def register() -> None:
    """Make transformers know it."""
    AutoConfig.register("comet", CometConfig, exist_ok=True)
    AutoModelForCausalLM.register(CometConfig, CometForCausalLM, exist_ok=True)
