"""The tokenizer and the weights: all that a folder says, and nothing drawn at random."""

import contextlib
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file

from orpo_lab import quantization
from orpo_lab.config import Config, Dataset, Galore, Lora, Model, Optimizer, local_path
from orpo_lab.data import Data
from orpo_lab.data.render import DEFAULT_CHAT_TEMPLATE
from orpo_lab.errors import UserError, one_line

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# What loading somebody's files may end in: files cut short, settings that contradict each other,
# a package that a model needs
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError)

# Of transformers' table of weights that are missing or over, and of tied ones that are all missing
SAID_IN_A_LINE = ("LOAD REPORT", "absent from the checkpoint")

# Numbers of each weight that a fingerprint is of
NUM_SAMPLED = 256
# What Git leaves in the place of a file that is stored elsewhere begins like this
LFS_POINTER = b"version https://git-lfs"
# Share of a model's layers that may lie outside linear layers: routers, scans
MAX_OUTSIDE = 0.1
# Of the median length of an embedding: below it one was never trained
UNTRAINED = 0.01


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


def resolve_attention(
    name: str, on: torch.device, dtype: torch.dtype, *, has_flash: bool = True
) -> str | None:
    """Return the attention kernel: flash_attention_2 where asked for or automatic, and possible.

    Args:
        name: `model.attention`.
        on: the device.
        dtype: precision of the arithmetic.
        has_flash: whether the architecture knows flash attention.

    Returns:
        The kernel's name. None: transformers chooses sdpa, or eager for a model that has no sdpa.
    """
    possible = (
        has_flash
        and on.type == "cuda"
        and dtype != torch.float32
        and importlib.util.find_spec("flash_attn") is not None
    )
    if name in ("auto", "flash_attention_2") and possible:
        return "flash_attention_2"
    if name == "flash_attention_2":
        log.info(
            "model.attention: flash_attention_2 needs its package, a GPU, bf16 or fp16, and a "
            "model that knows it; using sdpa"
        )
    return "eager" if name == "eager" else None


def locate(model: Model) -> str:
    """Return the hub name or the folder that holds the model.

    Raises:
        UserError: it looks like a folder and is not one, or it holds no model in safetensors.
    """
    folder = local_path(model.path)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            return str(folder)  # and `load_config` says what to do
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={model.path} is not a model folder: no config.json in it")
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"model.path={model.path} has no weights in safetensors; a .bin file is a pickle, "
                "which may run anything, and is not read: convert it where you trust it"
            )
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as opened:
                if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise UserError(
                        f"{file} is a pointer of git-lfs, not the weights: run git lfs pull there"
                    )
        return str(folder)
    if model.path.count("/") != 1 or model.path.startswith((".", "~", "/")):
        raise UserError(
            f"model.path={model.path} is neither a folder nor a hub name of the form org/name"
        )
    return model.path


def _refuse_adapter(model: Model) -> None:
    """Refuse a place with an adapter: transformers would put it on a base without a word."""
    file = find_adapter_config_file(locate(model), revision=model.revision)
    if file is None:
        return
    try:
        base = json.loads(Path(file).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise UserError(
        f"model.path={model.path} holds an adapter of {base or 'some base'}, not a model alone; to "
        "go on from the adapter, merge it into its base (peft's merge_and_unload) and save that in "
        "a folder; to begin from the base, give the base in a folder without adapter_config.json"
    )


def _fetch(load: Any, model: Model, **options: Any) -> Any:
    """Call a `from_pretrained` on the model's place; its many exceptions become one clear line."""
    place = locate(model)
    try:
        return load(
            place,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.path={model.path} comes with code of its own, which is not run; take a "
                "model that transformers knows, or read that code and say "
                "model.trust_remote_code=true"
            ) from error
        remedy = "check that its files are whole and belong together"
        if not Path(place).is_dir():
            remedy = (
                "check the name, model.revision and the connection to the hub, or give a local "
                "folder"
            )
        raise UserError(
            f"model.path={model.path} cannot be loaded ({one_line(error)[:300]}); {remedy}"
        ) from error


def load_config(model: Model) -> PretrainedConfig:
    """Return the model's own configuration: small, fetched before anything heavy.

    Raises:
        UserError: there is no such model, the hub cannot be reached, the model needs code of its
            own, which is not trusted, or there is an adapter.
    """
    if model.trust_remote_code:
        log.warning(
            "model.trust_remote_code=true: WHATEVER CODE COMES WITH %s IS RUN, with all your "
            "rights",
            model.path,
        )
    _refuse_adapter(model)
    return _fetch(AutoConfig.from_pretrained, model)


def check_context(config: PretrainedConfig, dataset: Dataset) -> None:
    """Refuse sequences longer than the model's context.

    Raises:
        UserError: `dataset.max_length`, or a prompt with its generated answer, does not fit.
    """
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    about = "the model's context"
    turn = _context_of_short_rope(text)
    if turn is not None and (context is None or turn < context):
        context = turn
        about = "the length above which its longrope reads a row otherwise, all rows beside it too,"
    if context is None:
        return
    if dataset.max_length > context:
        raise UserError(
            f"dataset.max_length={dataset.max_length} is above {about} of {context} tokens; lower "
            "it"
        )
    if dataset.max_prompt_length + dataset.max_new_tokens > context:
        raise UserError(
            f"dataset.max_prompt_length={dataset.max_prompt_length} plus dataset.max_new_tokens="
            f"{dataset.max_new_tokens} are above {about} of {context} tokens; lower one"
        )


def _context_of_short_rope(config: PretrainedConfig) -> int | None:
    """Return the length up to which longrope turns positions in one way; None: it is not longrope.

    Above it transformers takes other frequencies for the whole batch, so that a pair's
    log-probabilities would depend on the pairs beside it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    lengths = [
        one["original_max_position_embeddings"]
        for one in kinds
        if one.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)


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
    _check_vocabulary(model, tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def _check_vocabulary(model: Model, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Refuse a tokenizer of another model; tokens added for other uses may be over (Gemma 3 1B).

    Raises:
        UserError: its vocabulary, its end or its padding is beyond the model's embeddings.
    """
    ends = [int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)]
    if tokenizer.vocab_size > num_rows or max(ends) >= num_rows:
        raise UserError(
            f"model.path={model.path}: its tokenizer has {len(tokenizer)} tokens and its weights "
            f"{num_rows}; they do not belong together"
        )
    if len(tokenizer) > num_rows:
        spare = [str(tokenizer.decode([i])) for i in range(num_rows, len(tokenizer))]
        log.warning(
            "%s: %s of its tokenizer have no row in its embeddings; a text with one of them would "
            "be refused",
            model.path,
            ", ".join(spare[:3]) + (" and others" if len(spare) > 3 else ""),
        )


def check_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, data: Data) -> None:
    """Refuse texts with a token that has no embedding.

    Raises:
        UserError: a pair has one.
    """
    num_rows = config.get_text_config().vocab_size
    if len(tokenizer) <= num_rows:
        return
    for rows in (data.train, data.held_out):
        for row in rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
            beyond = [i for ids in row.values() for i in ids if i >= num_rows]
            if beyond:
                token = tokenizer.convert_ids_to_tokens(beyond[0])
                raise UserError(
                    f"a pair holds the token {token}, which has no row in the model's embeddings; "
                    "take it out of the data"
                )


def load(config: Config, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model on its device, quantized as asked, ready to be trained.

    Its weights are those of its folder, all of them, in `weight_dtype`; they compute in `dtype`,
    under autocast where the two differ.

    Raises:
        UserError: the weights cannot be loaded, are not those that the model's configuration tells
            of, are stored in another quantization, or the base draws at random in training.
    """
    on = device()
    own: PretrainedConfig = _fetch(AutoConfig.from_pretrained, config.model)
    quantization.check(config, own)
    _switch_off_dropout(own)
    options: dict[str, Any] = {}
    asked = quantization.settings(config.quantization, dtype)
    if asked is not None and quantization.stored(own) is None:
        # None, given by name, would switch off transformers' own reading of quantized weights
        options["quantization_config"] = asked
    architecture = AutoModelForCausalLM._model_mapping.get(type(own), None)
    has_flash = getattr(architecture, "_supports_flash_attn", True)
    with _tables_hidden():
        model, found = _fetch(
            AutoModelForCausalLM.from_pretrained,
            config.model,
            config=own,
            dtype=weight_dtype(config.optimizer, dtype),
            attn_implementation=resolve_attention(
                config.model.attention, on, dtype, has_flash=has_flash
            ),
            device_map={"": on},
            # All else is a pickle
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    _check_complete(config.model, found)
    if config.model.attention != "eager" and model.config._attn_implementation == "eager":
        log.info("model.attention: %s has no sdpa, using eager", type(model).__name__)
    if asked is not None:
        quantization.prepare(model, dtype)
    # Dropout of the base is off, as in TRL; that of adapters is added later and stays
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.get_text_config().use_cache = False
    model.config.pad_token_id = tokenizer.pad_token_id
    _check_steady(model)
    _make_savable(model)
    if isinstance(config.optimizer, Lora):
        _warn_of_untrained(model, tokenizer)
    return model


@contextlib.contextmanager
def _tables_hidden() -> Iterator[None]:
    """Keep what transformers says of missing weights from the terminal: one line refuses them."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in SAID_IN_A_LINE)

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _check_complete(model: Model, found: dict[str, Any]) -> None:
    """Check that a folder held every weight of its model and no other.

    transformers draws those that are missing at random and drops those that nothing takes; what is
    tied or known to be of no use is in neither list.

    Args:
        model: where the weights are.
        found: what `from_pretrained` tells of loading.

    Raises:
        UserError: weights are missing, over or of another size.
    """
    sizes = [
        f"{name} is {list(there)} there and {list(expected)} by its config.json"
        for name, there, expected in sorted(found["mismatched_keys"])
    ]
    lists = {
        "of other sizes": sizes,
        "missing": sorted(found["missing_keys"]),
        "not of this model": sorted(found["unexpected_keys"]),
    }
    faults = [
        f"{len(names)} weights are {fault} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for fault, names in lists.items()
        if names
    ]
    if faults:
        raise UserError(
            f"model.path={model.path}: its weights are not those that its config.json describes: "
            f"{'; '.join(faults)}; give the whole folder of one causal language model"
        )


def _switch_off_dropout(config: PretrainedConfig) -> None:
    """Set every probability of dropout and every jitter of a configuration to 0.

    Many models read theirs in functions, where no `nn.Dropout` shows (OPT, Phi MoE).
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _switch_off_dropout(value)
        elif isinstance(value, float) and any(word in name for word in ("drop", "jitter")):
            setattr(config, name, 0.0)


def _check_steady(model: PreTrainedModel) -> None:
    """Read a few tokens in training mode, under two seeds, and refuse a base that tells them apart.

    Raises:
        UserError: its results depend on chance, as where a dropout stayed on, or it reads nothing.
    """
    ids = (
        torch.arange(3, 19, device=model.device)[None]
        % model.get_input_embeddings().weight.shape[0]
    )

    def read(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(input_ids=ids, use_cache=False).logits.float().nan_to_num()

    name, was_training = type(model).__name__, model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.train()
        with torch.no_grad(), torch.random.fork_rng(devices):
            first, again, other = read(1), read(1), read(2)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{name} cannot read a text as it was loaded ({one_line(error)[:200]}); take a causal "
            "language model, or for one whose layers cannot be quantized another optimizer"
        ) from error
    finally:
        model.train(was_training)
    # On a GPU some sums are added in any order
    if (first - other).abs().max() > 10 * (first - again).abs().max():
        raise UserError(
            f"{name} draws at random in training what its configuration cannot switch off, so that "
            "a pair's loss would be another each time; take another model"
        )


def _make_savable(model: PreTrainedModel) -> None:
    """Unset what transformers took from generation_config.json and would refuse to write.

    Settings of sampling beside `do_sample: false` have no effect, and stop `save_pretrained`.
    """
    own = model.generation_config
    if own is None:
        return
    try:
        own.validate(strict=True)
    except ValueError as error:
        idle = re.findall(r"^- `(\w+)`:", str(error), flags=re.MULTILINE)
        for name in idle:
            setattr(own, name, None)
        if not idle:  # it contradicts itself in another way; the tokens are what matters
            model.generation_config = GenerationConfig(
                bos_token_id=own.bos_token_id,
                eos_token_id=own.eos_token_id,
                pad_token_id=own.pad_token_id,
            )
        log.info(
            "generation_config.json contradicts itself, which cannot be saved; left out: %s",
            ", ".join(idle) or "all but the special tokens",
        )


def _warn_of_untrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of special tokens that every text holds and whose embeddings were never trained.

    Adapters leave embeddings as they are, so such a token stays without a meaning.
    """
    template = str(tokenizer.chat_template)
    ids = {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.content in template or index == tokenizer.eos_token_id
    }
    rows = model.get_input_embeddings().weight
    lengths = rows.detach().float().norm(dim=1)
    limit = UNTRAINED * lengths.median()
    untrained = [i for i in sorted(ids) if i < len(lengths) and lengths[i] <= limit]
    if untrained:
        log.warning(
            "the embeddings of %s are (nearly) zero: this base was never trained on them, and "
            "adapters cannot change that; take a model trained on its chat template, or train all "
            "weights (optimizer=galore, adamw)",
            ", ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in untrained),
        )


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


def projections(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers of attention and MLP by name: all but the output head.

    The one rule for what LoRA adapts and GaLore projects. Quantized layers are `nn.Linear` too;
    GPT-2's `Conv1D` is one by another name. Of a model that also sees or hears, only the layers of
    its language model are meant.

    Raises:
        UserError: there are none, or most of the model is outside of them.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    modules = dict(_language_modules(model))
    found = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    name = type(model).__name__
    if not found:
        raise UserError(
            f"{name} has no linear layers that could be adapted or projected; use optimizer=adamw"
        )
    inside = sum(_num_weights(layer) for layer in found.values())
    outside = sum(
        weight.numel()
        for module in modules.values()
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding | _ConvNd)
        for weight in module.parameters(recurse=False)
        if weight.ndim >= 2
    )
    if outside > MAX_OUTSIDE * (inside + outside):
        raise UserError(
            f"{name} has {outside / (inside + outside):.0%} of its layers' weights outside of "
            "linear layers, as experts in one parameter are: adapters, GaLore and quantization "
            "would pass them by; use optimizer=adamw"
        )
    return found


def _language_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the modules by name; of a model with several towers, those of its language model."""
    if isinstance(model, PreTrainedModel) and model.config.get_text_config() is not model.config:
        kept = {id(module) for module in model.get_decoder().modules()}
        return (one for one in model.named_modules() if id(one[1]) in kept)
    return model.named_modules()


def _num_weights(layer: nn.Module) -> int:
    """Return how many weights a layer has, also where two share a byte."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return sum(weight.numel() for weight in layer.parameters())
