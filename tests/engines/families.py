"""Families of transformers as configs of tiny random models: what stands in for their weights in tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

_TINY: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 2,
    "pad_token_id": 2,
}
_HEADS = {"head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DEEPSEEK = {
    **_LATENT,
    **_EXPERTS,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 5.0, 8.0],
        "original_max_position_embeddings": 40,
    },
    "original_max_position_embeddings": 40,
    "max_position_embeddings": 4096,
}
_ROUTED = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_ERNIE_EXPERTS = {
    "moe_intermediate_size": 32,
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
}
_LFM2_EXPERTS = {**_EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}
_KIMI_LINEAR = {
    **_LATENT,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_expert_group": 1,
    "topk_group": 1,
}
# Some of its layers run twice, behind a window that is shorter than the prompts.
_LOOPED = {
    **_HEADS,
    "sliding_window": 7,
    "num_hidden_layers": 3,
    "n_input_layers": 1,
    "n_recurrent_layers": 1,
    "n_output_layers": 1,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: as transformers names it.
        known: models that people know it by.
        path: which way it is to run.
        options: of its config, beside the sizes.
        quick: whether the quick suite has it, too.
    """

    model_type: str
    known: str
    path: Literal["packed", "plain"] = "packed"
    options: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def talk(self) -> str:
        """How its chat templates are made, as models_table.py names it; empty where each has its own."""
        return _TALKS.get(self.model_type, "")

    @property
    def vocabulary(self) -> bool:
        """Whether vLLM's engines can look its prompts up: not where there is a table for every layer."""
        return self.model_type not in ("gemma3n_text", "gemma4_text")

    def config(self) -> Any:
        """The config of its tiny model."""
        from transformers import AutoConfig

        return type(AutoConfig.for_model(self.model_type.split()[0]))(**{**_TINY, **self.options})


_TALKS = {
    "llama": "Llama",
    "llama4_text": "Llama",
    "qwen2": "ChatML",
    "qwen2_moe": "ChatML",
    "qwen3": "ChatML, thinking",
    "qwen3_moe": "ChatML, thinking",
    "mistral": "Mistral",
    "ministral": "Mistral",
    "mixtral": "Mistral",
    "gemma": "Gemma",
    "gemma2": "Gemma",
    "gemma3_text": "Gemma",
    "gemma3n_text": "Gemma",
    "gemma4_text": "Gemma 4",
    "gpt_oss": "Harmony",
    "deepseek_v3": "DeepSeek, thinking",
    "qwen3_next": "ChatML, thinking",
    "qwen3_5_text": "Qwen 3.5",
    "qwen3_5_moe_text": "Qwen 3.5",
    "glm4_moe": "GLM 4.5",
    "glm4_moe_lite": "GLM 4.5",
    "seed_oss": "Seed-OSS",
    "minimax_m2": "MiniMax M2",
    "ministral3": "Mistral 3",
}

# Windows and chunks are shorter than the prompts, so that they matter.
FAMILIES = [
    Family("llama", "Llama 2 to 3.3, SmolLM2, Yi", options=_HEADS),
    Family(
        "llama4_text",
        "Llama 4",
        options={
            **_HEADS,
            "attention_chunk_size": 6,
            "num_hidden_layers": 4,
            "floor_scale": 4,
            "num_local_experts": 4,
            "no_rope_layers": [1, 1, 1, 0],
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 1,
        },
    ),
    Family("smollm3", "SmolLM3", options=_HEADS),
    Family("qwen2", "Qwen 2, 2.5, QwQ", options={}),
    Family("qwen3", "Qwen 3", options=_HEADS),
    Family("qwen2_moe", "Qwen 1.5 MoE", options={**_EXPERTS, "num_experts": 4}),
    Family("qwen3_moe", "Qwen 3 MoE", options={**_HEADS, **_EXPERTS, "num_experts": 4}),
    Family("mistral", "Mistral 7B, Nemo, Small", options={**_HEADS, "sliding_window": 7}),
    Family("ministral", "Ministral", options={**_HEADS, "sliding_window": 7}),
    Family("mixtral", "Mixtral", options={"num_experts_per_tok": 2, "num_local_experts": 4}),
    Family("phi", "Phi 1.5, 2"),
    Family("phi3", "Phi 3, 4", options={"sliding_window": 9}),
    Family("phi3 longrope", "Phi 3.5 mini, with its long rotary scaling", options=_LONGROPE, quick=True),
    Family("phimoe", "Phi 3.5 MoE", options={"num_experts_per_tok": 2, "num_local_experts": 4}),
    Family("gemma", "Gemma", options=_HEADS),
    Family("gemma2", "Gemma 2", options={**_HEADS, "sliding_window": 7}),
    Family("gemma3_text", "Gemma 3", options={**_HEADS, "sliding_window": 7, "num_hidden_layers": 6}),
    Family(
        "gemma3n_text",
        "Gemma 3n",
        options={
            **_HEADS,
            "num_hidden_layers": 5,
            "sliding_window": 7,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 49152,
            "activation_sparsity_pattern": [0.0] * 5,
            "intermediate_size": [64] * 5,
        },
    ),
    Family(
        "gemma4_text",
        "Gemma 4",
        options={
            **_HEADS,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "sliding_window": 7,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 49152,
            "global_head_dim": 16,
        },
    ),
    Family(
        "gpt_oss",
        "GPT-OSS 20B, 120B",
        options={
            **_HEADS,
            "sliding_window": 7,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
        },
        quick=True,
    ),
    Family("gpt2", "GPT-2", options={"n_embd": 32, "n_layer": 2, "n_head": 4}),
    Family("gpt_neox", "Pythia"),
    Family("cohere2", "Command R7B, A", options={**_HEADS, "sliding_window": 7}),
    Family("glm4", "GLM 4", options=_HEADS),
    Family(
        "glm4_moe",
        "GLM 4.5, 4.6",
        options={
            **_HEADS,
            **_EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Family("granite", "Granite 3"),
    Family("granitemoe", "Granite 3 MoE", options={"num_experts_per_tok": 2, "num_local_experts": 4}),
    Family("olmo2", "OLMo 2"),
    Family("olmo3", "OLMo 3", options={"sliding_window": 7}),
    Family("olmoe", "OLMoE", options={"num_experts_per_tok": 2, "num_experts": 4}),
    Family("exaone4", "EXAONE 4", options={**_HEADS, "sliding_window": 7}),
    Family("ernie4_5", "ERNIE 4.5", options=_HEADS),
    Family("seed_oss", "Seed-OSS", options=_HEADS),
    Family("minimax_m2", "MiniMax M2", options={**_HEADS, "num_experts_per_tok": 2, "num_local_experts": 4}),
    Family("nemotron", "Minitron, Nemotron 4", options=_HEADS),
    Family("stablelm", "StableLM 2"),
    Family("starcoder2", "StarCoder 2"),
    Family("opt", "OPT", options={"word_embed_proj_dim": 32, "ffn_dim": 64}),
    Family("glm", "GLM 4 9B", options=_HEADS),
    Family("hunyuan_v1_dense", "Hunyuan 0.5B to 7B", options=_HEADS),
    Family("hunyuan_v1_moe", "Hunyuan A13B", options={**_HEADS, "num_experts": 4, "moe_topk": 2}),
    Family("ministral3", "Ministral 3", options=_HEADS),
    Family("exaone", "EXAONE 3, Deep"),
    Family("apertus", "Apertus"),
    Family("arcee", "Arcee"),
    Family("internlm3", "InternLM 3", options=_HEADS),
    Family("helium", "Helium", options=_HEADS),
    Family("vaultgemma", "VaultGemma", options={**_HEADS, "sliding_window": 7}),
    Family("cohere", "Command R"),
    Family("gpt_bigcode", "StarCoder", options={"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 4096}),
    Family("gptj", "GPT-J", options={"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 4096}),
    Family("ernie4_5_moe", "ERNIE 4.5 MoE", options=_ERNIE_EXPERTS),
    Family("solar_open", "Solar Open", options={**_HEADS, **_ROUTED}),
    Family("dots1", "dots.llm1", options={**_HEADS, **_ROUTED, "layer_types": ["full_attention"] * 2}),
    Family("deepseek_v2", "DeepSeek V2, Coder V2", "plain", {**_DEEPSEEK, "head_dim": 8}),
    Family("deepseek_v3", "DeepSeek V3, R1, Kimi K2", "plain", {**_DEEPSEEK, "head_dim": 8}),
    Family("minicpm3", "MiniCPM 3", "plain", {**_LATENT, "head_dim": 16}),
    Family(
        "qwen3_next",
        "Qwen3-Next",
        "plain",
        {
            **_HEADS,
            **_EXPERTS,
            **GATED_DELTA,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
        },
    ),
    Family("qwen3_5_text", "Qwen 3.5", "plain", {**_HEADS, **GATED_DELTA}),
    Family(
        "granitemoehybrid",
        "Granite 4",
        "plain",
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "shared_intermediate_size": 32,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
        },
    ),
    Family("lfm2", "LFM2", "plain", {"layer_types": ["conv", "full_attention"]}, quick=True),
    Family(
        "nemotron_h",
        "Nemotron-H, Nemotron Nano 2",
        "plain",
        {
            **_HEADS,
            "hybrid_override_pattern": "M*-M",
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
    ),
    Family("falcon_h1", "Falcon-H1", "plain", _HEADS),
    Family(
        "jamba",
        "Jamba",
        "plain",
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "num_experts_per_tok": 2,
            "num_experts": 4,
        },
    ),
    Family("glm4_moe_lite", "GLM 4.7 Flash", "plain", {**_DEEPSEEK, "head_dim": 8}),
    Family("lfm2_moe", "LFM2 8B-A1B", "plain", _LFM2_EXPERTS),
    Family("kimi_linear", "Kimi Linear", "plain", _KIMI_LINEAR),
    Family("qwen3_5_moe_text", "Qwen 3.5 MoE", "plain", {**_HEADS, **_EXPERTS, **GATED_DELTA, "num_experts": 4}),
    Family("minimax", "MiniMax M1", "plain", {**_HEADS, "num_experts_per_tok": 2, "num_local_experts": 4}),
    Family("falcon_mamba", "Falcon Mamba", "plain", {"state_size": 8}),
    Family("dory", "Dory", "plain", _LOOPED),
    Family("mamba", "Mamba", "plain", {"state_size": 8}),
    Family("mamba2", "Mamba 2", "plain", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),
    Family("rwkv", "RWKV 4", "plain", {"attention_hidden_size": 32, "context_length": 4096}),
    Family(
        "recurrent_gemma",
        "RecurrentGemma",
        "plain",
        {
            **_HEADS,
            "num_hidden_layers": 3,
            "lru_width": 32,
            "attention_window_size": 9,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
    Family("falcon", "Falcon 7B", "plain"),
    Family("bloom", "BLOOM", "plain", {"n_layer": 2, "n_head": 4}),
    Family("mpt", "MPT", "plain", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 4096}),
]
