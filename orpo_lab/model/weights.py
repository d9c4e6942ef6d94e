"""Load a model's weights; check that all come from its folder and none is drawn at random."""

import contextlib
import hashlib
import logging
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from orpo_lab.config import Config
from orpo_lab.config.model import Model
from orpo_lab.config.optimizer import Lora
from orpo_lab.errors import UserError, one_line
from orpo_lab.model import quantization
from orpo_lab.model.precision import resolve_attention, resolve_device, weight_dtype
from orpo_lab.model.source import fetch
from orpo_lab.model.tokenizer import warn_of_untrained

log = logging.getLogger(__name__)

# Words of two log records of transformers: the table of missing or unexpected weights, and the
# report of tied weights that are all missing
SAID_IN_A_LINE = ("LOAD REPORT", "absent from the checkpoint")
# How many numbers of each weight the fingerprint reads
NUM_SAMPLED = 256


def load_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    on: torch.device | None = None,
) -> PreTrainedModel:
    """Return the base model on a device, quantized as `quantization` says, ready to be trained.

    All its weights come from its folder, and are stored in the precision of `weight_dtype`. The
    arithmetic is in `dtype`, by autocast if the two precisions differ.

    Args:
        config: the run's configuration.
        tokenizer: with a pad token.
        dtype: precision of the arithmetic.
        on: the device; None: the one that the run computes on.

    Raises:
        UserError: the weights cannot be loaded, do not fit the model's own configuration, or are
            stored in another quantization; or the base draws random numbers in training mode.
    """
    on = on or resolve_device()
    own: PretrainedConfig = fetch(AutoConfig.from_pretrained, config.model)
    quantization.check(config, own)
    switch_off_dropout(own)
    options: dict[str, Any] = {}
    asked = quantization.settings(config.quantization, dtype)
    if asked is not None and quantization.stored(own) is None:
        # None, given by name, would switch off transformers' own reading of quantized weights
        options["quantization_config"] = asked
    architecture = AutoModelForCausalLM._model_mapping.get(type(own), None)
    has_flash = getattr(architecture, "_supports_flash_attn", True)
    with _tables_hidden():
        model, found = fetch(
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
    # The dropout of the base is off, as in TRL. The adapters, added later, keep their dropout
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.get_text_config().use_cache = False
    model.config.pad_token_id = tokenizer.pad_token_id
    _check_steady(model)
    _make_savable(model)
    if isinstance(config.optimizer, Lora):
        warn_of_untrained(model, tokenizer)
    return model


@contextlib.contextmanager
def _tables_hidden() -> Iterator[None]:
    """Inside this context, hide the tables in which transformers reports missing weights.

    `_check_complete` refuses such weights in one line.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in SAID_IN_A_LINE)

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _check_complete(model: Model, found: dict[str, Any]) -> None:
    """Check that a folder holds every weight of its model, and no others.

    transformers draws missing weights at random, and ignores unexpected weights. Its lists of both
    leave out tied weights and weights that are known to be useless.

    Args:
        model: names the folder in messages.
        found: the loading information that `from_pretrained` returns.

    Raises:
        UserError: weights are missing, unexpected, or of another size.
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


def switch_off_dropout(config: PretrainedConfig) -> None:
    """Set every dropout probability and every jitter of a configuration to 0.

    Many models (OPT, Phi MoE) use these numbers in functions, without an `nn.Dropout` module.
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            switch_off_dropout(value)
        elif isinstance(value, float) and any(word in name for word in ("drop", "jitter")):
            setattr(config, name, 0.0)


def _check_steady(model: PreTrainedModel) -> None:
    """Refuse a base whose results in training mode depend on the random seed.

    The base reads a few tokens under two seeds, and the results are compared.

    Raises:
        UserError: the results differ, for example because a dropout is still on; or the model
            cannot read the tokens.
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
    # On a GPU the order of some sums varies, so the same seed may give slightly different results
    if (first - other).abs().max() > 10 * (first - again).abs().max():
        raise UserError(
            f"{name} draws at random in training what its configuration cannot switch off, so that "
            "a pair's loss would be another each time; take another model"
        )


def _make_savable(model: PreTrainedModel) -> None:
    """Unset the settings of generation_config.json with which `save_pretrained` would fail.

    For example, sampling settings together with `do_sample: false` have no effect, but make
    `save_pretrained` raise an error.
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
        if not idle:  # another contradiction; only the special tokens matter
            model.generation_config = GenerationConfig(
                bos_token_id=own.bos_token_id,
                eos_token_id=own.eos_token_id,
                pad_token_id=own.pad_token_id,
            )
        log.info(
            "generation_config.json contradicts itself, which cannot be saved; left out: %s",
            ", ".join(idle) or "all but the special tokens",
        )


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights as stored: names, shapes, dtypes, and a sample of each.

    The hash changes if a file is replaced or damaged. It may stay the same if only a single number
    changes.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        stride = max(1, len(flat) // NUM_SAMPLED)
        sample = flat[::stride][:NUM_SAMPLED].contiguous().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\0".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_loaded(model: nn.Module, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Check that every trained weight was loaded.

    A tied weight has several names. Libraries report some of these names as missing, although the
    weight was loaded under another name.

    Args:
        model: the model that the weights are for.
        missing: names of the model's weights that the file does not have.
        unexpected: names of weights in the file that the model does not have.

    Raises:
        UserError: a trained weight is missing, or the file has unexpected weights.
    """
    weights = {
        name: weight
        for name, weight in model.named_parameters(remove_duplicate=False)
        if weight.requires_grad
    }
    loaded = {id(weight) for name, weight in weights.items() if name not in missing}
    lost = [name for name, weight in weights.items() if id(weight) not in loaded]
    if lost or unexpected:
        names = ", ".join([*lost, *unexpected][:3])
        raise UserError(f"the checkpoint's weights are not this model's ({names}); start a new run")
