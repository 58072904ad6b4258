"""Checkpoints that see images, too: their text half answers chats, and decodes what the whole model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import GATED_DELTA
from test_families import moved

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling

_SEES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_PATCHES = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "attention_chunk_size": 6}
_PROJECTED = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 64}
_PLACES = {"image_token_id": 11, "video_token_id": 12, "audio_token_id": 13, "audio_config": None}

# By type: what its text half has beside the sizes, its eye, the rest of the config, and which way it runs.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], str]] = {
    "mistral3": ({"model_type": "mistral"}, {**_SEES, "model_type": "pixtral"}, {}, "packed"),
    "gemma3": ({"sliding_window": 7}, _SEES, {"mm_tokens_per_image": 4}, "packed"),
    "gemma4": ({"sliding_window": 7}, None, _PLACES, "packed"),
    "llava": ({"model_type": "llama"}, {**_SEES, "model_type": "clip_vision_model"}, {}, "packed"),
    "smolvlm": ({"model_type": "llama"}, _SEES, {}, "packed"),
    "qwen2_5_vl": (_SECTIONS, _PATCHES, {}, "packed"),
    "qwen3_vl": (_SECTIONS, {**_PATCHES, "deepstack_visual_indexes": [0]}, {}, "packed"),
    "llama4": (_EXPERTS, {**_SEES, **_PROJECTED}, {}, "packed"),
    "qwen3_5": (GATED_DELTA, _PATCHES, {}, "plain"),
}


@pytest.fixture
def save(tmp_path: Path, tokenizer: Any, tiny_sizes: dict[str, Any]) -> Callable[[str], Path]:
    """Writes a random checkpoint with both halves, as its authors save it."""

    def written(model_type: str) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        text, sees, more, _ = MODELS[model_type]
        torch.manual_seed(0)
        kind = type(AutoConfig.for_model(model_type))
        config = kind(text_config={**tiny_sizes, **text}, vision_config=sees, **more)
        AutoModelForImageTextToText.from_config(config).save_pretrained(str(tmp_path))
        tokenizer.save_pretrained(str(tmp_path))
        return tmp_path

    return written


def marked(model_type: str) -> Any:
    return pytest.param(model_type, marks=() if model_type == "mistral3" else pytest.mark.slow)


@pytest.mark.parametrize("model_type", [marked(name) for name in MODELS])
async def test_the_text_half_decodes_what_the_whole_model_does(model_type: str, save: Callable[[str], Path]) -> None:
    folder = str(save(model_type))
    engine = TransformersEngine(folder, dtype="float32")
    assert (await engine.way())[0] == MODELS[model_type][3]
    prompts = [await engine.embed([Message("user", text)]) for text in ("Hi", "What do bees eat in winter?")]
    prompts += [moved(prompts[1])] if model_type != "gemma4" else []
    done = await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=8)) for prompt in prompts])
    states = await engine.hidden_states(prompts[:1], [1])
    await engine.aclose()
    own = model_of(folder, model_type)
    expected = [written(own, {"input_ids": ids_of(prompt)}) for prompt in prompts[:2]]
    expected += [written(own, {"inputs_embeds": rows_of(prompt)}) for prompt in prompts[2:]]
    assert [list(completion.token_ids) for completion in done] == expected
    # Of the layers that write, not of as many that see.
    assert states[0] == pytest.approx(first_states(own, ids_of(prompts[0])), abs=1e-3)


def model_of(folder: str, model_type: str) -> Any:
    import torch
    import transformers

    # Llama 4's whole model fails on any text in transformers 5.24: it reads a field that its output lacks.
    kind = "AutoModelForCausalLM" if model_type == "llama4" else "AutoModelForImageTextToText"
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def ids_of(prompt: PromptEmbeddings) -> Any:
    import torch

    return torch.from_numpy(prompt.token_ids)[None]


def rows_of(prompt: PromptEmbeddings) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(prompt.matrix))[None]


def written(model: Any, given: dict[str, Any]) -> list[int]:
    """Eight greedy tokens by whole passes, since not every family's generate takes embeddings."""
    import torch

    ids: list[int] = []
    while len(ids) < 8 and 2 not in ids:
        with torch.inference_mode():
            ids.append(int(model(**given, use_cache=False).logits[0, -1].argmax()))
            more = torch.tensor([ids[-1:]])
            if "inputs_embeds" in given:
                more = model.get_input_embeddings()(more)
            given = {name: torch.cat([value, more], dim=1) for name, value in given.items()}
    return ids


def first_states(model: Any, ids: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, -1].numpy()
