"""The tokenizer and the weights: precision, attention, quantization, and every fallback said."""

import hashlib
import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from orpo_lab.config import (
    Config,
    Dataset,
    Galore,
    Int8,
    Lora,
    Model,
    Nf4,
    Optimizer,
    Quantization,
    local_path,
)
from orpo_lab.errors import UserError, one_line

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Numbers of each weight that a fingerprint is of
NUM_SAMPLED = 256

# Zephyr's layout, which the ORPO authors give to models without a template of their own. It needs
# no new tokens: untrained embeddings would be frozen under LoRA.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str, on: torch.device) -> torch.dtype:
    """Return the precision to compute in: `name`, or the next of bf16, fp16, fp32 that `on` has."""
    chain = list(DTYPES)
    for candidate in chain[chain.index(name) :]:
        if _has_dtype(candidate, on):
            if candidate != name:
                log.info("model.dtype: this %s has no %s, using %s", on.type, name, candidate)
            return DTYPES[candidate]
    raise AssertionError("every device has fp32")


def _has_dtype(name: str, on: torch.device) -> bool:
    if name == "fp32":
        return True
    if on.type == "cuda":
        return name == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    # fp16 training needs loss scaling, which transformers offers on GPUs only
    return name == "bf16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def resolve_attention(name: str, on: torch.device, dtype: torch.dtype) -> str:
    """Return the attention kernel: flash_attention_2 where asked for or automatic, and possible."""
    if name not in ("auto", "flash_attention_2"):
        return name
    possible = (
        on.type == "cuda"
        and dtype != torch.float32
        and importlib.util.find_spec("flash_attn") is not None
    )
    if not possible and name == "flash_attention_2":
        log.info(
            "model.attention: flash_attention_2 needs its package, a GPU, bf16 or fp16; using sdpa"
        )
    return "flash_attention_2" if possible else "sdpa"


def locate(model: Model) -> str:
    """Return the hub name or the folder that holds the model.

    Raises:
        UserError: it looks like a folder and is not one, or it holds no model in safetensors.
    """
    folder = local_path(model.path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={model.path} is not a model folder: no config.json in it")
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"model.path={model.path} has no weights in safetensors; a .bin file is a pickle, "
                "which may run anything, and is not read: convert it where you trust it"
            )
        return str(folder)
    if model.path.count("/") != 1 or model.path.startswith((".", "~", "/")):
        raise UserError(
            f"model.path={model.path} is neither a folder nor a hub name of the form org/name"
        )
    return model.path


def _fetch(load: Any, model: Model, **options: Any) -> Any:
    """Call a `from_pretrained` on the model's place; its many exceptions become one clear line."""
    try:
        return load(
            locate(model),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.path={model.path} comes with code of its own, which is not run; take a "
                "model that transformers knows, or read that code and say "
                "model.trust_remote_code=true"
            ) from error
        raise UserError(
            f"model.path={model.path} cannot be loaded ({one_line(error)[:300]}); check the name, "
            "model.revision and the connection to the hub, or give a local folder"
        ) from error


def load_config(model: Model) -> PretrainedConfig:
    """Return the model's own configuration: small, fetched before anything heavy.

    Raises:
        UserError: there is no such model, the hub cannot be reached, or the model needs code of its
            own, which is not trusted.
    """
    if model.trust_remote_code:
        log.warning(
            "model.trust_remote_code=true: WHATEVER CODE COMES WITH %s IS RUN, with all your "
            "rights",
            model.path,
        )
    return _fetch(AutoConfig.from_pretrained, model)


def check_context(config: PretrainedConfig, dataset: Dataset) -> None:
    """Refuse sequences longer than the model's context.

    Raises:
        UserError: `dataset.max_length`, or a prompt with its generated answer, does not fit.
    """
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return
    if dataset.max_length > context:
        raise UserError(
            f"dataset.max_length={dataset.max_length} is above the model's context of {context} "
            "tokens; lower it"
        )
    if dataset.max_prompt_length + dataset.max_new_tokens > context:
        raise UserError(
            f"dataset.max_prompt_length={dataset.max_prompt_length} plus dataset.max_new_tokens="
            f"{dataset.max_new_tokens} are above the model's context of {context} tokens; lower one"
        )


def load_tokenizer(model: Model, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a chat template and a pad token.

    The pad token may be the end-of-sequence token: what is padding is told by the attention mask
    everywhere, so real end-of-sequence tokens stay in the loss.

    Raises:
        UserError: there is no such tokenizer, or it has no end-of-sequence token.
    """
    tokenizer: PreTrainedTokenizerBase = _fetch(AutoTokenizer.from_pretrained, model)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path={model.path}: its tokenizer has no end-of-sequence token")
    if tokenizer.chat_template is None:
        log.info("%s has no chat template, using the default one (docs/method.md)", model.path)
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    if tokenizer.pad_token_id is None:
        log.info("%s has no pad token, padding with %s", model.path, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise UserError(
            f"model.path={model.path}: its tokenizer has {len(tokenizer)} tokens and its weights "
            f"{config.get_text_config().vocab_size}; they do not belong together"
        )
    return tokenizer


def load(config: Config, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model on its device, quantized as asked, ready to be trained.

    Its weights are in `weight_dtype`, and compute in `dtype`, under autocast where they differ.

    Raises:
        UserError: the weights cannot be loaded.
    """
    on = device()
    model: PreTrainedModel = _fetch(
        AutoModelForCausalLM.from_pretrained,
        config.model,
        dtype=weight_dtype(config.optimizer, dtype),
        attn_implementation=resolve_attention(config.model.attention, on, dtype),
        quantization_config=quantization(config.quantization, dtype),
        device_map={"": on},
        # All else is a pickle
        use_safetensors=True,
    )
    keep_4bit_exact(model)
    # Dropout of the base is off, as in TRL; that of adapters is added later and stays
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights as they are stored: names, shapes, and a sample of each.

    A file that was replaced or damaged shows in it; a single changed number need not.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        stride = max(1, len(flat) // NUM_SAMPLED)
        sample = flat[::stride][:NUM_SAMPLED].contiguous().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\0".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weight_dtype(optimizer: Optimizer, dtype: torch.dtype) -> torch.dtype:
    """Return the precision to keep the weights in, for arithmetic in `dtype`.

    Frozen weights are kept in `dtype`. Trained ones are fp32 (master weights), since a bf16 weight
    loses small updates, unless the optimizer rounds them stochastically: our GaLore.
    """
    match optimizer:
        case Lora():
            return dtype
        case Galore(implementation="orpo_lab") if dtype == torch.bfloat16:
            return dtype
    return torch.float32


def quantization(config: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return what transformers hands to bitsandbytes; None for weights as they are."""
    match config:
        case Nf4(double_quantization=double):
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=dtype,
            )
        case Int8(outlier_threshold=threshold):
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return None


def keep_4bit_exact(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights when a model is evaluated on a CPU.

    Where the CPU has avx512_bf16, `Linear4bit.forward` repacks its weights in evaluation mode and
    the next backward pass misreads them: the loss looks right and the gradients are noise
    (bitsandbytes 0.50.2). The attribute is the switch its own code asks.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (not in its type)


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of attention and MLP by name: all but the output head.

    The one rule for what LoRA adapts and GaLore projects. Quantized layers are `nn.Linear` too.

    Raises:
        UserError: there are none.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not found:
        raise UserError(
            f"{type(model).__name__} has no linear layers that could be adapted or projected; "
            "use optimizer=adamw"
        )
    return found
