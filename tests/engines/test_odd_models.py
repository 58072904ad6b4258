"""Models that somebody brings and that are not quite whole: each runs, or ends in one error that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tta_middleware.cli import checks
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError, EngineError, ModelNotFoundError, TTAError
from tta_middleware.types import GenerationRequest, Message, Sampling

Change = Callable[[Path], object]


def cut(name: str, length: int) -> Change:
    """A file of which a part was fetched."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def edited(name: str, **changes: Any) -> Change:
    """A JSON file with other entries; None takes one out."""

    def change(folder: Path) -> None:
        known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        found = {key: value for key, value in {**known, **changes}.items() if value is not None}
        (folder / name).write_text(json.dumps(found))

    return change


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def saved(kind: str = "AutoModelForCausalLM", *, scale: float = 1.0, shard: str = "1GB", **options: Any) -> Change:
    """Other weights: of another class of transformers, or of another size."""

    def change(folder: Path) -> None:
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(str(folder))
        config.update(options)
        made = getattr(transformers, kind)
        model = made.from_config(config) if kind.startswith("Auto") else made(config)
        # Any layer but the last: what overflows goes on as infinity.
        next(weight for name, weight in model.named_parameters() if "down_proj" in name).data *= scale
        (folder / "model.safetensors").unlink(missing_ok=True)
        model.save_pretrained(str(folder), max_shard_size=shard)

    return change


def of_type(model_type: str, kind: str, **options: Any) -> Change:
    """A model of another type."""

    def change(folder: Path) -> None:
        import transformers

        config = type(transformers.AutoConfig.for_model(model_type))(vocab_size=49152, **options)
        (folder / "model.safetensors").unlink()
        getattr(transformers, kind)(config).save_pretrained(str(folder))

    return change


def shard_lost(folder: Path) -> None:
    saved(shard="20KB")(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


def index_cut(folder: Path) -> None:
    saved(shard="20KB")(folder)
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    known["weight_map"] = {name: file for name, file in known["weight_map"].items() if "layers.1" not in name}
    index.write_text(json.dumps(known))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_ends(folder: Path) -> None:
    edited("tokenizer_config.json", eos_token=None, pad_token=None, bos_token=None)(folder)
    edited("generation_config.json", eos_token_id=None, pad_token_id=None)(folder)
    edited("config.json", eos_token_id=None, pad_token_id=None)(folder)


@dataclass(frozen=True)
class Odd:
    """What is odd about a model's folder, and what comes of it: text where ``error`` is None."""

    name: str
    change: Change
    error: type[TTAError] | None = None
    told: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


FOLDERS = [
    Odd("no end or padding tokens", no_ends),
    Odd("several ends", edited("generation_config.json", eos_token_id=[2, 0, 5])),
    Odd("a table larger than the tokenizer", saved(vocab_size=50_000)),
    Odd("a tied head", saved(tie_word_embeddings=True)),
    Odd("float16 on a CPU", lambda folder: None, options={"dtype": "float16"}),
    Odd("a tokenizer class of its own", edited("tokenizer_config.json", tokenizer_class="Llama99Tokenizer")),
    Odd("no context length", edited("config.json", max_position_embeddings=None)),
    Odd("no chat template", without("chat_template.jinja"), ConfigurationError, "no chat template; use an instruction"),
    Odd(
        "a broken template",
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }"),
        ConfigurationError,
        "chat template is broken",
    ),
    Odd(
        "no tokenizer", without("tokenizer.json", "tokenizer_config.json"), EngineError, r"see whether tokenizer\.json"
    ),
    Odd(
        "half a tokenizer", cut("tokenizer.json", 5000), EngineError, r"see whether tokenizer\.json is there and whole"
    ),
    Odd("a table smaller than the tokenizer", saved(vocab_size=20_000), ConfigurationError, "take both from one place"),
    Odd("no head", saved("LlamaModel"), ModelNotFoundError, r"lack 1 .*\(lm_head\.weight\), which would be random"),
    Odd("a classifier", saved("LlamaForSequenceClassification"), ModelNotFoundError, "take those of a chat model"),
    Odd("a lost shard", shard_lost, ModelNotFoundError, "model-00002-of-"),
    Odd("half an index", index_cut, ModelNotFoundError, r"the files lack \d of the model's weights"),
    Odd("more layers than weights", edited("config.json", num_hidden_layers=3), ModelNotFoundError, "the files lack 9"),
    Odd(
        "other sizes than weights", edited("config.json", intermediate_size=48), EngineError, "of other sizes than its"
    ),
    Odd("truncated weights", cut("model.safetensors", 9_000), EngineError, "broken safetensors file .* fetch it again"),
    Odd("weights without a header", cut("model.safetensors", 5), EngineError, "broken safetensors file"),
    Odd("no weights", without("model.safetensors"), ModelNotFoundError, "incomplete or broken"),
    Odd("pickled weights", pickled, ModelNotFoundError, "pickled ones can run code: convert them"),
    Odd("half a config", cut("config.json", 40), ModelNotFoundError, "not a valid JSON file"),
    Odd("an empty config", lambda folder: (folder / "config.json").write_text("{}"), EngineError, "a `model_type` key"),
    Odd(
        "a type that is new", edited("config.json", model_type="llama99"), ConfigurationError, "--upgrade transformers"
    ),
    Odd(
        "an encoder-decoder",
        of_type("t5", "T5ForConditionalGeneration", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2),
        ConfigurationError,
        "encoder-decoder models are not supported",
    ),
    Odd(
        "a model that reads ahead",
        of_type(
            "bert",
            "BertForMaskedLM",
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        ),
        ConfigurationError,
        "read ahead",
    ),
    Odd(
        "numbers that float16 does not hold",
        saved(scale=1e6),
        ConfigurationError,
        r"torch\.float16 is not finite; .*bfloat16 or float32",
        {"dtype": "float16"},
    ),
    Odd("weights that are no numbers", saved(scale=float("nan")), ConfigurationError, "fetch them anew"),
]


async def answer(folder: Path | str, **options: Any) -> tuple[int, ...]:
    engine = TransformersEngine(str(folder), **{"dtype": "float32", **options})
    try:
        prompt = await engine.embed([Message("user", "Hello there")])
        [completion] = await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=4))])
        [score] = await engine.mean_nll(prompt, [completion.token_ids])
        assert score > 0
    finally:
        await engine.aclose()
    return completion.token_ids


@pytest.fixture
def copy_of(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model, to be spoiled."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


QUICK = ("no chat template", "no tokenizer", "no head", "truncated weights", "a type that is new", "several ends")


def marked(name: str, *values: Any, quick: Collection[str] = QUICK) -> Any:
    """A few in the quick suite, all of them in the slow one."""
    return pytest.param(*values, id=name, marks=() if name in quick else pytest.mark.slow)


@pytest.mark.parametrize("odd", [marked(odd.name, odd) for odd in FOLDERS])
async def test_an_odd_model_runs_or_says_what_to_do(odd: Odd, copy_of: Path) -> None:
    odd.change(copy_of)
    if odd.error is None:
        assert len(await answer(copy_of, **odd.options)) > 0
        return
    with pytest.raises(odd.error, match=odd.told):
        await answer(copy_of, **odd.options)


def test_the_doctor_says_so_before_anybody_asks(copy_of: Path) -> None:
    without("chat_template.jinja")(copy_of)
    [found] = checks.way(str(copy_of))
    assert found.status == "fail"
    assert "the model has no chat template" in found.detail


def lora(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter for a model of other sizes, made in ``folder``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(str(base))
    config.update(options)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_config(config), settings).save_pretrained(str(folder))
    return folder


WEIGHTS = "adapter_model.safetensors"
ADAPTERS: dict[str, tuple[dict[str, Any], Change, type[TTAError], str]] = {
    "truncated": ({}, cut(WEIGHTS, 300), EngineError, "broken safetensors file"),
    "without weights": ({}, without(WEIGHTS), ModelNotFoundError, f"holds no {WEIGHTS}; fetch it"),
    "half a config": ({}, cut("adapter_config.json", 9), EngineError, "the adapter in .* could not be read"),
    "of a wider model": ({"hidden_size": 64}, lambda _: None, EngineError, "fits the model alone that it was made for"),
    "of a deeper model": (
        {"num_hidden_layers": 3},
        lambda _: None,
        ConfigurationError,
        "lacks 2 of those that it changes",
    ),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [marked(name, name, quick=["of a deeper model"]) for name in ADAPTERS])
async def test_an_odd_adapter_says_what_to_do(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    options, change, error, told = ADAPTERS[name]
    adapter = lora(tiny_folder, tmp_path / "adapter", **options)
    change(adapter)
    with pytest.raises(error, match=told):
        await answer(tiny_folder, adapter=str(adapter))


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("adapter_config.json", "it is a PEFT adapter: name the model"),
        ("tiny-q4.gguf", r"name the file, such as tiny-q4"),
    ],
)
async def test_a_folder_that_is_no_model_says_what_it_is(file: str, told: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(ModelNotFoundError, match=told):
        await TransformersEngine(str(tmp_path)).load()


async def test_a_file_of_weights_is_no_model(tiny_folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="name the folder that it is in"):
        await TransformersEngine(str(tiny_folder / "model.safetensors")).load()


@pytest.mark.parametrize("length", [marked(str(length), length, quick=["60"]) for length in (0, 8, 60, 5_000, -1_000)])
async def test_a_truncated_gguf_file_says_so(length: int, tmp_path: Path) -> None:
    import torch
    from gguf_files import GGUF_FAMILIES, write_gguf
    from transformers import AutoModelForCausalLM

    family = next(one for one in GGUF_FAMILIES if one.model_type == "qwen2")
    model = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32)
    write_gguf(family, model, tmp_path / "tiny.gguf", None, None)
    cut("tiny.gguf", length)(tmp_path)
    with pytest.raises(EngineError, match=r"cannot read tiny\.gguf .*is the file complete"):
        await TransformersEngine(str(tmp_path / "tiny.gguf"), cache_dir=tmp_path / "cache").load()
    assert not list((tmp_path / "cache" / "models").glob("*/"))
