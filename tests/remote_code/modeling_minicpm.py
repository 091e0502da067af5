"""MiniCPM, which transformers does not have: Llama with three scales.

Embeddings are multiplied by ``scale_emb``, what attention and MLP add to the
residual stream by ``scale_depth / sqrt(layers)``, and the input of the output
matrix by ``dim_model_base / hidden_size``.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class MiniCPMConfig(LlamaConfig):
    model_type = "minicpm"
    scale_emb: float | int = 1
    scale_depth: float | int = 1
    dim_model_base: int = 1


class MiniCPMDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MiniCPMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scale = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.scale * attended
        added = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.scale * added


class MiniCPMModel(LlamaModel):
    config_class = MiniCPMConfig
    _no_split_modules = ("MiniCPMDecoderLayer",)

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        numbers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([MiniCPMDecoderLayer(config, i) for i in numbers])
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        return super().forward(inputs_embeds=self.config.scale_emb * inputs_embeds, **kwargs)


class MiniCPMForCausalLM(LlamaForCausalLM):
    config_class = MiniCPMConfig

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        self.model = MiniCPMModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids=input_ids, **kwargs)
        hidden_states = out.last_hidden_state[:, -logits_to_keep:]
        config = self.config
        logits = self.lm_head(hidden_states * (config.dim_model_base / config.hidden_size))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
