"""PEFT adapters that change more than linear layers: tied embeddings, tokens of their own, no weights at all."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import GenerationRequest, Message, Sampling

# It is imported where it is used: it reads models of transformers, which collection has no need of.
pytestmark = [
    pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # peft says that merging may go wrong then, which is what is tested here.
    pytest.mark.filterwarnings("ignore:Model ha[sd] `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]

ASK = [Message("user", "Hi")]


@pytest.fixture(scope="module")
def tied(save_model: Any, tiny_sizes: dict[str, Any]) -> Path:
    """A model that reads and writes by one table, as small ones do."""
    from transformers import LlamaConfig

    return Path(save_model(LlamaConfig(**tiny_sizes, tie_word_embeddings=True)))


def adapted(base: Path, folder: Path, *, rows: int | None = None, **settings: Any) -> Any:
    """An adapter with random weights, saved in ``folder``, on its model as peft runs it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        # peft warns whoever makes one for tied embeddings.
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn_like(parameter)
        made.save_pretrained(str(folder))
    return made.eval()


async def both(base: Path, adapter: Path, model: Any) -> tuple[list[int], list[int]]:
    """What the engine writes with the adapter, and what peft's own model does."""
    import torch

    engine = TransformersEngine(str(base), dtype="float32", adapter=str(adapter))
    prompt = await engine.embed(ASK)
    [completion] = await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=8))])
    await engine.aclose()
    ids = torch.from_numpy(prompt.token_ids)[None]
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2
        )
    return list(completion.token_ids), out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("changed", [pytest.param("embed_tokens"), pytest.param("lm_head", marks=pytest.mark.slow)])
async def test_one_end_of_a_tied_table_is_changed_alone(tied: Path, tmp_path: Path, changed: str) -> None:
    """Merged into what both share it would change the other end, too."""
    model = adapted(tied, tmp_path, target_modules=["q_proj", changed])
    found, expected = await both(tied, tmp_path, model)
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("way", ["modules_to_save", "trainable_token_indices"])
async def test_a_table_that_an_adapter_brings_takes_the_place_of_the_models(
    tied: Path, tmp_path: Path, way: str
) -> None:
    more = {"modules_to_save": ["embed_tokens", "lm_head"], "trainable_token_indices": {"embed_tokens": [1, 2, 18]}}
    model = adapted(tied, tmp_path, target_modules=["q_proj"], **{way: more[way]})
    found, expected = await both(tied, tmp_path, model)
    assert found == expected


@pytest.mark.slow
async def test_an_adapter_brings_its_tokens_and_its_template(tied: Path, tmp_path: Path, tokenizer: Any) -> None:
    """As one that was trained on a base model with a chat format of its own."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<turn>"])
    own.chat_template = "{% for m in messages %}{{ '<turn>' + m.content }}{% endfor %}"
    model = adapted(
        tied, tmp_path, rows=len(own), target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    own.save_pretrained(str(tmp_path))
    found, expected = await both(tied, tmp_path, model)
    assert found == expected


@pytest.mark.slow
async def test_an_adapter_that_changes_no_weights_is_refused(tied: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(str(tied)), settings).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"kind PREFIX_TUNING is no change of weights; .*LoRA"):
        await TransformersEngine(str(tied), adapter=str(tmp_path)).load()
