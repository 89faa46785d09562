"""Direct calls of vLLM's CPU kernels, with fewer operations around them. For one process, float weights, no compiler.

With a model as small as the embedded one, most of a step is not arithmetic but the calls around it: normalisation in
seven operations, rotation on three equal axes, layers of dispatch around the experts, a sort of the whole vocabulary.
This module calls the same kernels of vLLM directly (figures: deploy/adr/0004). The setting `cpu_kernels` switches it
on. It never runs on a GPU, where CUDA graphs hide such costs. A layer or sampler of unexpected structure stays vLLM's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_CANDIDATES = 128
"""Largest top k for which a selection of candidates costs less than a sort of the vocabulary."""


def patch_decoder_layers(runner: Any) -> int:
    """Replace the sampler and the decoder layers of vLLM's loaded model runner; return the number of such layers."""
    config = runner.vllm_config
    if not current_platform.is_cpu() or config.compilation_config.mode != CompilationMode.NONE:
        return 0
    sampler = runner.sampler
    if sampler.logprobs_mode == "raw_logprobs" and not sampler.use_fp64_gumbel:
        sampler.topk_topp_sampler.forward = topk_first_sampler(sampler.topk_topp_sampler.forward)
    model = runner.get_model()
    if not any(config.model_config.get_multimodal_config().get_limit_per_prompt(kind) for kind in ("image", "video")):
        # Images add these to the first layers; vLLM adds zeros for tokens of other kinds.
        model.deepstack_input_embeds = None
    alone = config.parallel_config.world_size == 1
    layers = [layer for layer in model.language_model.model.layers if alone and _is_plain(layer)]
    for layer in layers:
        layer.forward = Layer(layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    """Return whether a decoder layer consists of the parts that `Layer` computes."""
    attention, block = layer.self_attn, layer.mlp
    if not isinstance(block, Qwen3MoeSparseMoeBlock) or block.shared_expert is not None:
        return False
    experts = block.experts.routed_experts
    method = experts.quant_method
    linear = (attention.qkv_proj, attention.o_proj, block.gate)
    norms = (attention.q_norm, attention.k_norm, layer.input_layernorm, layer.post_attention_layernorm)
    return (
        all(isinstance(part.quant_method, UnquantizedLinearMethod) and part.bias is None for part in linear)
        and all(norm.weight.dtype == torch.float32 and norm.variance_size_override is None for norm in norms)
        and isinstance(attention.attn.impl, CPUAttentionBackendImpl)
        and isinstance(attention.rotary_emb, MRotaryEmbedding)
        and isinstance(method, UnquantizedFusedMoEMethod)
        and isinstance(method.moe_kernel.fused_experts, CPUUnquantizedExperts)
        and experts.renormalize
        and experts.scoring_func == "softmax"
        and not experts.use_grouped_topk
        and experts.custom_routing_function is None
        and experts.e_score_correction_bias is None
        and not experts.apply_router_weight_on_input
        and not hasattr(experts, "w13_bias")
    )


class Layer:
    """A decoder layer's `forward`."""

    def __init__(self, layer: Any) -> None:
        self._vllm_forward = layer.forward
        self._input_norm, self._post_attention_norm = layer.input_layernorm, layer.post_attention_layernorm
        attention = layer.self_attn
        self._attention = attention
        self._name = attention.attn.layer_name
        self._heads = attention.num_heads + attention.num_kv_heads
        self._qk_size = attention.q_size + attention.kv_size
        # The norms of queries and keys differ only in their weights.
        self._ones = torch.ones(attention.head_dim)
        self._qk_weight = torch.cat(
            (
                attention.q_norm.weight.data.expand(attention.num_heads, -1),
                attention.k_norm.weight.data.expand(attention.num_kv_heads, -1),
            )
        )
        self._gate = layer.mlp.gate
        self._experts = layer.mlp.experts.routed_experts
        kernel = self._experts.quant_method.moe_kernel.fused_experts
        self._isa, self._zentorch = kernel.isa, kernel._use_zentorch  # noqa: SLF001 - no public name has it

    def __call__(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the layer for the tokens of one step."""
        context = get_forward_context()
        # Without metadata it is a profiling run, which writes no context.
        if not isinstance(context.attn_metadata, dict) or self._zentorch:
            return self._vllm_forward(positions, hidden_states, residual)  # type: ignore[no-any-return]
        if residual is None:
            residual = hidden_states.clone()
            hidden_states = _norm(hidden_states, self._input_norm.weight, self._input_norm.variance_epsilon)
        else:
            _add_and_norm(hidden_states, residual, self._input_norm)
        hidden_states = self._run_attention(positions, hidden_states, context)
        _add_and_norm(hidden_states, residual, self._post_attention_norm)
        return self._run_experts(hidden_states), residual

    def _run_attention(self, positions: torch.Tensor, hidden_states: torch.Tensor, context: Any) -> torch.Tensor:
        attention = self._attention
        tokens = hidden_states.shape[0]
        qkv = attention.qkv_proj.cpu_linear(hidden_states, None, None)
        qk = _norm(
            qkv[:, : self._qk_size].reshape(-1, attention.head_dim), self._ones, attention.q_norm.variance_epsilon
        )
        qk = qk.view(tokens, self._heads, attention.head_dim).mul_(self._qk_weight).view(tokens, self._qk_size)
        query, key = qk[:, : attention.q_size], qk[:, attention.q_size :]
        # The three axes of positions are equal for audio and text (`model.py`).
        row = positions[0] if positions.ndim > 1 else positions
        rotary = attention.rotary_emb
        torch.ops._C.rotary_embedding(row, query, key, attention.head_dim, rotary.cos_sin_cache, rotary.is_neox_style)  # noqa: SLF001
        attn, name = attention.attn, self._name
        key = key.view(tokens, -1, attention.head_dim)
        value = qkv[:, self._qk_size :].view(tokens, -1, attention.head_dim)
        attn.impl.do_kv_cache_update(attn, key, value, attn.kv_cache, context.slot_mapping[name])
        output = torch.empty(tokens, attention.num_heads, attention.head_dim, dtype=query.dtype)
        metadata = context.attn_metadata[name]
        attn.impl.forward(attn, query.view(tokens, -1, attention.head_dim), key, value, attn.kv_cache, metadata, output)
        return attention.o_proj.cpu_linear(output.view(tokens, -1), None, None)  # type: ignore[no-any-return]

    def _run_experts(self, hidden_states: torch.Tensor) -> torch.Tensor:
        experts = self._experts
        # The softmax of the greatest logits is the softmax of all, renormalised to the greatest.
        logits, ids = self._gate.cpu_linear(hidden_states, None, None).topk(experts.top_k, dim=-1)
        output = torch.empty_like(hidden_states)
        torch.ops._C.cpu_fused_moe(  # noqa: SLF001
            output,
            hidden_states,
            experts.w13_weight,
            experts.w2_weight,
            None,
            None,
            logits.softmax(dim=-1),
            ids.to(torch.int32),
            False,  # noqa: FBT003 - skip_weighted: the weights apply
            experts.activation.value,
            self._isa,
        )
        return output


def _norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    output = torch.empty_like(states)
    torch.ops._C.rms_norm(output, states, weight, epsilon)  # noqa: SLF001
    return output


def _add_and_norm(states: torch.Tensor, residual: torch.Tensor, norm: Any) -> None:
    """Add and normalise in place: `residual` becomes the sum, `states` the sum's norm."""
    torch.ops._C.fused_add_rms_norm(states, residual, norm.weight, norm.variance_epsilon)  # noqa: SLF001


def topk_first_sampler(vllm_sampler: Callable[..., Any]) -> Callable[..., Any]:
    """Return a sampler that selects the top k first, and applies top p to those. `vllm_sampler` is vLLM's own.

    The distribution is vLLM's, with one exception: of tokens with equal logits in the k-th place it keeps as many as
    fit. A batch with a seeded request, or without a top k of at most `MAX_CANDIDATES`, is sampled by vLLM.
    """

    def sample(
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        largest_k = MAX_CANDIDATES + 1 if k is None or generators else int(k.max())
        if k is None or largest_k > min(MAX_CANDIDATES, logits.shape[-1]):
            return vllm_sampler(logits, generators, k, p)  # type: ignore[no-any-return]
        best, ids = logits.topk(largest_k, dim=-1)
        best.masked_fill_(torch.arange(largest_k) >= k.unsqueeze(1), -torch.inf)
        shares = best.softmax(dim=-1)
        if p is not None:
            better = shares.cumsum(dim=-1) - shares
            shares.masked_fill_(better >= p.unsqueeze(1), 0)
            shares[:, 0].clamp_(min=torch.finfo(shares.dtype).tiny)
        chosen = shares.div_(torch.empty_like(shares).exponential_()).argmax(dim=-1, keepdim=True)
        return ids.gather(1, chosen).squeeze(1), None

    return sample
