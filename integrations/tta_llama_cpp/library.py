"""The C interface of llama.cpp, as the wheel ``xllamacpp`` exports it.

The wheel's own Python classes take texts and tokens only; its shared library has all of ``llama.h``. The layout of two
of its structures changes from release to release, so only releases that were tried are taken, and what a structure
holds by default is looked at before anything is written into it.
"""

from __future__ import annotations

import ctypes as c
import importlib.metadata
import importlib.util
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tta_middleware.errors import ConfigurationError, MissingExtraError

VERSION = "2026.10.11549"
"""The release of ``xllamacpp`` whose layouts are below: llama.cpp's build 11549."""

INSTALL = "pip install 'tta-middleware[llama-cpp]'"

_logger = logging.getLogger(__name__)
_LogCallback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)


class ModelParameters(c.Structure):
    """``struct llama_model_params``."""

    _fields_ = (
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int),
        ("load_mode", c.c_int),
        ("lazy_mode", c.c_int),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
    )


class ContextParameters(c.Structure):
    """``struct llama_context_params``."""

    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int),
        ("rope_scaling_type", c.c_int),
        ("pooling_type", c.c_int),
        ("attention_type", c.c_int),
        ("flash_attn_type", c.c_int),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int),
        ("type_v", c.c_int),
        ("moe_cache_size", c.c_size_t),
        ("abort_callback", c.c_void_p),
        ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    )


class CBatch(c.Structure):
    """``struct llama_batch``: tokens or embeddings, each with its place and its sequences."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.c_void_p),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.c_void_p),
    )


class GGUFParameters(c.Structure):
    """``struct gguf_init_params``."""

    _fields_ = (("no_alloc", c.c_bool), ("ctx", c.c_void_p))


_p, _i32, _i64, _size = c.c_void_p, c.c_int32, c.c_int64, c.c_size_t

# name: what it returns, what it takes
_FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (_LogCallback, _p)),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ModelParameters, ()),
    "llama_context_default_params": (ContextParameters, ()),
    "llama_model_load_from_file": (_p, (c.c_char_p, ModelParameters)),
    "llama_model_free": (None, (_p,)),
    "llama_model_get_vocab": (_p, (_p,)),
    "llama_model_n_embd": (_i32, (_p,)),
    "llama_model_n_ctx_train": (_i32, (_p,)),
    "llama_model_rope_type": (c.c_int, (_p,)),
    "llama_model_meta_val_str": (_i32, (_p, c.c_char_p, c.c_char_p, _size)),
    "llama_model_has_encoder": (c.c_bool, (_p,)),
    "llama_model_is_recurrent": (c.c_bool, (_p,)),
    "llama_model_is_hybrid": (c.c_bool, (_p,)),
    "llama_model_is_diffusion": (c.c_bool, (_p,)),
    "llama_vocab_n_tokens": (_i32, (_p,)),
    "llama_vocab_is_eog": (c.c_bool, (_p, _i32)),
    "llama_init_from_model": (_p, (_p, ContextParameters)),
    "llama_free": (None, (_p,)),
    "llama_get_memory": (_p, (_p,)),
    "llama_memory_seq_rm": (c.c_bool, (_p, _i32, _i32, _i32)),
    "llama_decode": (_i32, (_p, CBatch)),
    "llama_get_logits": (c.POINTER(c.c_float), (_p,)),
    "gguf_init_from_file": (_p, (c.c_char_p, GGUFParameters)),
    "gguf_free": (None, (_p,)),
    "gguf_find_tensor": (_i64, (_p, c.c_char_p)),
    "gguf_get_data_offset": (_size, (_p,)),
    "gguf_get_tensor_offset": (_size, (_p, _i64)),
    "gguf_get_tensor_type": (c.c_int, (_p, _i64)),
    "gguf_get_tensor_size": (_size, (_p, _i64)),
}


@cache
def library() -> Any:
    """The shared library with its functions declared; loaded once in a process.

    Raises:
        MissingExtraError: xllamacpp is not installed, or the system lacks what it links to.
        ConfigurationError: another release of it is installed.
    """
    path = _library_file()
    try:
        found = c.CDLL(str(path))
        for name, (returned, taken) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = returned, taken
    except (OSError, AttributeError) as error:
        raise MissingExtraError(f"llama.cpp's library does not load here (it needs libgomp): {error}") from error
    _check_layout(found)
    found.llama_log_set(_heard, None)
    found.llama_backend_init()
    return found


def _library_file() -> Path:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise MissingExtraError(f"llama.cpp is not installed; run: {INSTALL}")
    version = importlib.metadata.version("xllamacpp")
    files = sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))
    if version != VERSION or not files:
        raise ConfigurationError(
            f"xllamacpp {version} has a layout that is not known; run: pip install xllamacpp=={VERSION}"
        )
    return files[0]


def _check_layout(found: Any) -> None:
    """Look at defaults that are far apart in the structures, so that nothing is written to a wrong place.

    Raises:
        ConfigurationError: they are not what they are in the release that is known.
    """
    model, context = found.llama_model_default_params(), found.llama_context_default_params()
    seen = [model.n_gpu_layers, model.vocab_only, model.use_extra_bufts, model.no_alloc]
    seen += [context.n_ctx, context.n_batch, context.n_seq_max, context.n_threads, context.defrag_thold]
    seen += [context.type_k, context.type_v, context.embeddings, context.op_offload, context.kv_unified]
    if seen != [-1, False, True, False, 512, 2048, 1, 4, -1.0, 1, 1, False, True, False]:
        raise ConfigurationError(
            f"this build of llama.cpp has a layout that is not known; run: pip install xllamacpp=={VERSION}"
        )


def _log(level: int, text: bytes, _: object) -> None:
    """llama.cpp's own words, which it would write to stderr."""
    _logger.debug("%s", text.decode(errors="replace").rstrip())


_heard = _LogCallback(_log)
