"""Tiny GGUF files of the families that transformers reads, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Arrays: TypeAlias = Mapping[str, NDArray[np.float32]]
Change: TypeAlias = Callable[[str, NDArray[np.float32], Any], Arrays]
"""What becomes of a weight: the file's name of it, its numbers and the config in, arrays by name out."""

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = ("t h", "th e", "i n", "e r", "Ġ a", "o n", "Ġ the", "r e", "u s", "us er")


def _as_it_is(name: str, weight: NDArray[np.float32], config: Any) -> Arrays:
    return {name: weight}


def _interleaved(name: str, weight: NDArray[np.float32], config: Any) -> Arrays:
    """Rotary halves of queries and keys become pairs."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return {name: weight}
    heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return {name: halves.swapaxes(1, 2).reshape(weight.shape)}


def _norms_from_one(name: str, weight: NDArray[np.float32], config: Any) -> Arrays:
    """Norms that are kept around zero become factors."""
    return {name: weight + 1 if name.endswith("norm.weight") else weight}


def _experts(name: str, weight: NDArray[np.float32], config: Any) -> Arrays:
    """What gates and goes up is kept apart; a gate of one row is a vector."""
    if name.endswith("ffn_gate_up_exps.weight"):
        layer = name.rsplit(".", 2)[0]
        gate, up = np.split(weight, 2, axis=1)
        return {f"{layer}.ffn_gate_exps.weight": gate, f"{layer}.ffn_up_exps.weight": up}
    return {name: weight[0] if "ffn_gate_inp_shexp" in name else weight}


def _transposed(name: str, weight: NDArray[np.float32], config: Any) -> Arrays:
    """GPT-2's layers are convolutions, with inputs first."""
    layer = any(part in name for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"))
    return {name: weight.T if layer and weight.ndim == 2 else weight}


def _heads_apart(name: str, weight: NDArray[np.float32], config: Any) -> Arrays:
    """BLOOM keeps queries, keys and values together by head; the file keeps each for all heads."""
    if "attn_qkv" not in name:
        return {name: weight}
    by_head = weight.reshape(config.n_head, 3, config.hidden_size // config.n_head, -1)
    return {name: by_head.swapaxes(0, 1).reshape(weight.shape)}


def _states(name: str, weight: NDArray[np.float32], config: Any) -> Arrays:
    if name.endswith("ssm_a"):
        return {name: -np.exp(weight)}
    return {name: weight[:, 0] if "conv" in name and weight.ndim == 3 else weight}


def _gated_delta(name: str, weight: NDArray[np.float32], config: Any) -> Arrays:
    if name.endswith("norm.weight") and "ssm_norm" not in name:
        return {name: weight + 1}
    return _states(name, weight, config)


@dataclass(frozen=True)
class GGUFFamily:
    """One family.

    Attributes:
        architecture: as the file names it.
        model_type: as transformers names it.
        options: of the config, beside the sizes. What a file does not say stays what transformers takes by default.
        change: what the converter does with weights.
        words: how the vocabulary is kept: byte-level merges, or SentencePiece scores.
        facts: metadata beside those that transformers' table names.
    """

    architecture: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    change: Change = _as_it_is
    words: Literal["gpt2", "llama"] = "gpt2"
    facts: Callable[[Any], dict[str, Any]] = lambda config: {}

    def config(self) -> Any:
        from transformers import AutoConfig

        sizes = {"vocab_size": len(vocabulary(self.words)), "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0}
        return type(AutoConfig.for_model(self.model_type))(**{**_SIZES, **sizes, **self.options})


def _lfm2_facts(config: Any) -> dict[str, Any]:
    kinds = config.layer_types
    return {
        "attention.head_count_kv": [config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds],
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }


def _qwen35_facts(config: Any) -> dict[str, Any]:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "full_attention_interval": 2,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": config.head_dim // 4,
        "rope.dimension_sections": [2, 1, 1, 0],
    }


_HEADS = {"head_dim": 16}
_FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 32,
    "rope_parameters": {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}

GGUF_FAMILIES = [
    GGUFFamily("llama", "llama", _HEADS, _interleaved),
    GGUFFamily("llama", "mistral", {**_HEADS, "sliding_window": None}, _interleaved, "llama"),
    GGUFFamily("qwen2", "qwen2"),
    GGUFFamily("qwen3", "qwen3", {"head_dim": 128}),
    GGUFFamily("qwen2moe", "qwen2_moe", _FEW_EXPERTS, _experts),
    GGUFFamily("qwen3moe", "qwen3_moe", {**_HEADS, **_FEW_EXPERTS, "norm_topk_prob": True}, _experts),
    GGUFFamily("phi3", "phi3", words="llama"),
    GGUFFamily(
        "gemma2", "gemma2", {**_HEADS, "sliding_window": 7, "tie_word_embeddings": True}, _norms_from_one, "llama"
    ),
    GGUFFamily(
        "gemma3", "gemma3_text", {**_HEADS, "sliding_window": 7, "num_hidden_layers": 6}, _norms_from_one, "llama"
    ),
    GGUFFamily("falcon", "falcon", {"tie_word_embeddings": True, "num_kv_heads": 1}),
    GGUFFamily("bloom", "bloom", {"tie_word_embeddings": True, "n_layer": 2, "n_head": 4}, _heads_apart),
    GGUFFamily("stablelm", "stablelm"),
    GGUFFamily("gpt2", "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "tie_word_embeddings": True}, _transposed),
    GGUFFamily("starcoder2", "starcoder2"),
    GGUFFamily("nemotron", "nemotron", change=_norms_from_one),
    GGUFFamily("minimax-m2", "minimax_m2", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}, _experts),
    GGUFFamily("mamba", "mamba", {"state_size": 8, "tie_word_embeddings": True, "intermediate_size": 128}, _states),
    GGUFFamily(
        "lfm2",
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        _states,
        facts=_lfm2_facts,
    ),
    GGUFFamily("qwen35", "qwen3_5_text", _DELTA, _gated_delta, facts=_qwen35_facts),
]

# transformers has no name for the file's experts here, and leaves them as they were drawn.
GPT_OSS = GGUFFamily("gpt-oss", "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2})


def write_gguf(
    family: GGUFFamily, model: Any, path: Path, quantized: Any = None, more: Mapping[str, Any] | None = None
) -> None:
    """A file of the model's weights, in float32, or matrices in a type of ``gguf.GGMLQuantizationType``.

    Args:
        more: metadata beside the model's own.
    """
    import gguf

    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_name("Tiny")
    for key, value in (_facts(family, model.config) | dict(more or {})).items():
        _add(writer, f"{family.architecture}.{key}", value)
    _write_vocabulary(writer, family.words)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture),
        model.config.num_hidden_layers,
    )
    tied = model.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        for kept, array in family.change(_named(names, name), weight.float().numpy(), model.config).items():
            _write(writer, kept, np.ascontiguousarray(array, dtype=np.float32), quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write(writer: Any, name: str, array: NDArray[np.float32], quantized: Any) -> None:
    import gguf

    if quantized is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
        writer.add_tensor(name, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
    else:
        writer.add_tensor(name, array)


def _named(names: Any, name: str) -> str:
    """The file's name of a weight; what the package has no name for is called as llama.cpp does."""
    layer = ".".join(["blk", *(part for part in name.split(".") if part.isdigit())])
    for end, kept in (
        (".experts.gate_up_proj", f"{layer}.ffn_gate_up_exps.weight"),
        (".experts.down_proj", f"{layer}.ffn_down_exps.weight"),
        (".e_score_correction_bias", f"{layer}.exp_probs_b.bias"),
        (".dt_bias", f"{layer}.ssm_dt.bias"),
    ):
        if name.endswith(end):
            return kept
    for short in (name, name.removeprefix("transformer.")):
        found = names.get_name(short, try_suffixes=(".weight", ".bias"))
        if found is not None:
            return str(found)
    return name


def _facts(family: GGUFFamily, config: Any) -> dict[str, Any]:
    """Metadata by key, for what transformers' own table reads of them."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    key = family.model_type.removesuffix("_text")
    table = GGUF_CONFIG_MAPPING.get(key, {})
    found = {fact: _value(config, attribute) for fact, attribute in table.items() if attribute}
    return {fact: value for fact, value in (found | family.facts(config)).items() if value is not None}


def _value(config: Any, attribute: str) -> Any:
    if attribute == "rope_theta":
        rope = config.rope_parameters
        return float(rope.get("full_attention", rope)["rope_theta"])
    if attribute == "scoring_func":
        return 2
    return getattr(config, attribute, None)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


@cache
def vocabulary(words: str) -> tuple[str, ...]:
    """Its tokens in order: the special ones, single bytes or letters, and some that are merged."""
    if words == "gpt2":
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return (*_SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in _MERGES))
    letters = [chr(code) for code in range(33, 127)]
    return (*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "th", "the", "▁the", "us", "er")


def _write_vocabulary(writer: Any, words: str) -> None:
    tokens = vocabulary(words)
    writer.add_tokenizer_model(words)
    writer.add_token_list(list(tokens))
    # 1 is a word, 3 steers, 6 is a byte.
    writer.add_token_types([3 if token in _SPECIAL else 6 if token.startswith("<0x") else 1 for token in tokens])
    if words == "gpt2":
        writer.add_tokenizer_pre("default")
        writer.add_token_merges(list(_MERGES))
    else:
        writer.add_token_scores([float(-at) for at in range(len(tokens))])
        writer.add_add_bos_token(False)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
