"""InternLM2, which transformers does not have: Llama under other names.

Queries, keys and values come from one map, ``wqkv``. Its rows are laid out by
key/value head: the queries that read it, then the key, then the value.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)


class InternLM2Config(LlamaConfig):
    model_type = "internlm2"
    bias: bool = False


class InternLM2Attention(nn.Module):
    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads + 2 * self.kv_heads
        self.wqkv = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        shape = hidden_states.shape[:2]
        qkv = self.wqkv(hidden_states).view(*shape, self.kv_heads, -1, self.head_dim)
        query = qkv[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attended = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=attention_mask is None and shape[1] > 1,
            enable_gqa=True,
        )
        return self.wo(attended.transpose(1, 2).reshape(*shape, -1))


class InternLM2MLP(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.w2(silu(self.w1(hidden_states)) * self.w3(hidden_states))


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = self.attention(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


class InternLM2Model(LlamaModel):
    config_class = InternLM2Config
    _no_split_modules = ("InternLM2DecoderLayer",)
    _input_embed_layer = "tok_embeddings"

    def __init__(self, config: InternLM2Config) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        numbers = range(config.num_hidden_layers)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InternLM2DecoderLayer(config, i) for i in numbers])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class InternLM2ForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    config_class = InternLM2Config
    _input_embed_layer = "tok_embeddings"
    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids=input_ids, **kwargs)
        logits = self.output(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
