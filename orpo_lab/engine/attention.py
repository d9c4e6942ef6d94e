"""Attention between the tokens of a row of pairs `[prompt | chosen | rejected]`.

The models keep their own layers, and call one of three attention functions. None of them computes
masked scores:

- VARLEN: flash attention over sequences of unequal numbers of queries and keys, in bf16 and fp16 on
  a GPU. Each completion of a pair is a sequence of its own, with the prompt's keys in front.
- FLEX: flex attention, on GPUs where VARLEN is not possible, for fp32, and for bounded scores. Flex
  attention skips the blocks that a block mask hides.
- BY_PAIR: elsewhere, an attention call of its own for each completion of a pair.

FLEX and BY_PAIR get a tensor or a block mask as `attention_mask`: transformers passes a ready mask
of four dimensions on unchanged. Without a mask, transformers would take the restarting position
ids for packed sequences, and the rejected completion would not see its prompt. VARLEN needs no
mask, and transformers makes none for an attention function that transformers does not know. VARLEN
gets its `sequences` as a keyword argument, which transformers passes on to attention functions.
"""

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils import is_triton_available

from orpo_lab.errors import UserError

VARLEN = "orpo_lab_varlen"
FLEX = "flex_attention"
BY_PAIR = "orpo_lab_by_pair"
# Tokens in a block of flex attention. Rows are padded to a multiple of it: every other length would
# need a compilation of its own. Flash attention gets the longest length as a multiple of it
BLOCK = 128
# The smallest head size that the kernels of flex attention support
MIN_FLEX_HEAD = 16
# What flash attention's kernels support: GPUs from Ampere on, and head sizes up to the largest that
# are a multiple of a number
MIN_FLASH_GPU = (8, 0)
MAX_FLASH_HEAD, FLASH_HEAD_MULTIPLE = 256, 8
# From torch 2.12 on, fewer key heads than heads are an error unless they are announced
GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
# The window that `flash_error` tries; so narrow that the window hides some of a few tokens
NARROW = 5
# Kinds of layers whose attention a mask over pairs of tokens describes fully
EXPRESSIBLE = {"full_attention", "sliding_attention"}


def check(model: PreTrainedModel) -> None:
    """Refuse a model that would read a row differently from each of its sequences alone.

    Raises:
        UserError: a mask and position ids cannot describe the model's attention, or the model's
            loss has another part; the text says which.
    """
    config = model.config.get_text_config()
    parameters = inspect.signature(type(model).forward).parameters
    others = set(getattr(config, "layer_types", None) or ()) - EXPRESSIBLE
    reasons = {
        "it is an encoder and a decoder": config.is_encoder_decoder,
        "it takes no position_ids, so positions cannot restart": "position_ids" not in parameters,
        "its attention is biased by distance in the row (alibi)": getattr(config, "alibi", False),
        "it carries a state from token to token": getattr(model, "_is_stateful", False),
        "its attention cannot be exchanged": not model._supports_attention_backend
        or not model._can_set_attn_implementation(),
        "its attention looks ahead": getattr(config, "use_bidirectional_attention", False)
        or not getattr(config, "is_causal", True),
        f"it has layers of {', '.join(sorted(others))}": others,
        "its loss includes that of a router": getattr(config, "output_router_logits", False),
    }
    for reason, holds in reasons.items():
        if holds:
            name = type(model).__name__
            raise UserError(f"engine=shared_prefix cannot train {name}: {reason}; use engine=trl")


def possible(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Return the attention implementations for rows that are possible, the fastest one first.

    Args:
        model: on its device.
        dtype: precision of the arithmetic.
    """
    config, device = model.config.get_text_config(), model.device
    return possible_on(
        torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dtype,
        head_size=_head_size(config),
        bounds_scores=getattr(config, "attn_logit_softcapping", None) is not None,
        knows_flex=model._supports_flex_attn and is_triton_available(),
    )


def _head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def possible_on(
    gpu: tuple[int, int] | None,
    dtype: torch.dtype,
    *,
    head_size: int,
    bounds_scores: bool,
    knows_flex: bool,
) -> list[str]:
    """Return what `possible` returns, for plain values.

    Args:
        gpu: compute capability of the GPU, major and minor; None: the device is no GPU.
        dtype: precision of the arithmetic.
        head_size: numbers in a query or a key of one head.
        bounds_scores: whether the model bounds its attention scores (Gemma 2).
        knows_flex: whether flex attention is installed and the model can call it.
    """
    is_flash = (
        gpu is not None
        and gpu >= MIN_FLASH_GPU
        and dtype in (torch.bfloat16, torch.float16)
        and head_size % FLASH_HEAD_MULTIPLE == 0
        and head_size <= MAX_FLASH_HEAD
        and not bounds_scores
    )
    is_flex = gpu is not None and knows_flex and head_size >= MIN_FLEX_HEAD
    found = {VARLEN: is_flash, FLEX: is_flex, BY_PAIR: True}
    return [name for name, holds in found.items() if holds]


class Sequences(NamedTuple):
    """The sequences of a row, as `packing.sequences` describes them."""

    places: Tensor
    first: Tensor
    second: Tensor
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    longest: int
    """At least the number of keys of the longest sequence, a multiple of BLOCK."""


def inputs(
    implementation: str, micro_batch: Mapping[str, Any], config: PretrainedConfig
) -> dict[str, Any]:
    """Return what a model has to know of a micro-batch's row, as arguments of its forward pass.

    The arguments are those of `mask`.
    """
    if implementation == VARLEN:
        # The kernel takes any upper bound. Few different bounds are few different compiled graphs
        longest = micro_batch["longest"] + -micro_batch["longest"] % BLOCK
        fields = {name: micro_batch[name] for name in Sequences._fields}
        return {"sequences": Sequences(**fields)._replace(longest=longest)}
    return {"attention_mask": mask(implementation, micro_batch, config)}


def mask(
    implementation: str, micro_batch: Mapping[str, Any], config: PretrainedConfig
) -> Tensor | BlockMask | dict[str, BlockMask]:
    """Return the `attention_mask` of a micro-batch, as the model takes it.

    Args:
        implementation: FLEX or BY_PAIR.
        micro_batch: as `packing.Collator` lays it out, on the model's device.
        config: of the model; says how many tokens back each layer attends to.

    Returns:
        For BY_PAIR the sizes, [1, 1, B, 3], on the host. For FLEX a block mask [1, 1, T, T]. Where
        a model has several kinds of layers, a block mask for each kind.
    """
    if implementation == BY_PAIR:
        return torch.tensor([[micro_batch["sizes"]]])
    text = config.get_text_config()
    masks: dict[str, BlockMask] = {}
    for layer, kind in enumerate(getattr(text, "layer_types", None) or [""]):
        window = _window(text, layer)
        # A window as wide as the longest sequence hides nothing
        within = window is None or window >= micro_batch["longest"]
        masks[kind] = masks.get(kind) or _block_mask(micro_batch, None if within else window)
    return masks if len(masks) > 1 else masks.popitem()[1]


def tell_windows(model: PreTrainedModel) -> None:
    """Note in each attention layer, as `row_window`, how many tokens back the layer attends to.

    VARLEN and BY_PAIR read the note. They must not read `layer_idx`: a compiled layer would then
    fit no other layer.
    """
    config = model.config.get_text_config()
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is not None and layer < config.num_hidden_layers:
            module.row_window = _window(config, layer)


def _window(config: PretrainedConfig, layer: int) -> int | None:
    """Return how many tokens a token attends to, itself included; None: all tokens before it."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _block_mask(micro_batch: Mapping[str, Tensor], window: int | None) -> BlockMask:
    parts, positions = micro_batch["parts"], micro_batch["position_ids"]
    width = positions.shape[1]

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        own, other = parts[query], parts[key]
        # The rejected completion (part 2) does not see the chosen one (part 1) of the same pair
        seen = (query >= key) & (own // 3 == other // 3) & ~((own % 3 == 2) & (other % 3 == 1))
        if window is not None:
            seen = seen & (positions[0, query] - positions[0, key] < window)
        return seen

    return create_block_mask(sees, 1, None, width, width, device=positions.device)


def varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    *,
    sequences: Sequences,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of all sequences of a row in one call of flash attention.

    The arguments are those of `by_pair`, but for two.

    Args:
        attention_mask: not used.
        sequences: of the row.

    Returns:
        The output in bf16 or fp16, [1, T, heads, D], and None in place of the attention weights.

    Raises:
        UserError: see `by_pair`.
        NotImplementedError: the layer bounds its scores.
    """
    _refuse(others)
    if softcap is not None:
        raise NotImplementedError("flash attention cannot bound scores")
    window = module.row_window
    # Under autocast queries and keys leave the rotary embedding in fp32. The kernel takes 16 bits
    on = query.device.type
    autocast = torch.is_autocast_enabled(on)
    dtype = torch.get_autocast_dtype(on) if autocast else value.dtype
    # [1, heads, T, D] -> [T, heads, D]
    queries, keys, values = (heads[0].transpose(0, 1).to(dtype) for heads in (query, key, value))
    spread = (sequences.places, sequences.first, sequences.second)
    # Aligned to the lower right: the queries of a sequence belong to the last of its keys
    output: Any = varlen_attn(
        queries,
        _Spread.apply(keys, *spread),
        _Spread.apply(values, *spread),
        sequences.cu_seq_q,
        sequences.cu_seq_k,
        sequences.longest,
        sequences.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **GROUPED,
    )
    return output[None], None


class _Spread(torch.autograd.Function):
    """Keys or values in the row's order -> in the order of its sequences, prompts twice.

    The gradient is gathered, not scattered: a sum in a fixed order, without atomic additions.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return [S, heads, D] of `states` [T, heads, D]; see `Sequences` for the others."""
        ctx.save_for_backward(first, second)
        return states.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        first, second = ctx.saved_tensors
        copied = (second >= 0)[:, None, None]
        of_copy = gradient.index_select(0, second.clamp_min(0)).where(copied, 0)
        return gradient.index_select(0, first) + of_copy, None, None, None


def by_pair(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of each completion of each pair behind its prompt, in separate calls.

    The signature is that of an attention function of transformers.

    Args:
        module: the attention layer, with the window that `tell_windows` notes.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, D].
        attention_mask: the sizes of each pair's parts, [1, 1, B, 3], as `mask` returns them.
        scaling: factor of the attention scores.
        softcap: tanh bounds the scores to +-softcap; None: no bound.
        others: not used, except to refuse what is not supported.

    Returns:
        The output, [1, T, heads, D], and None in place of the attention weights.

    Raises:
        UserError: the layer needs `s_aux` (attention sinks) or `position_bias`.
    """
    _refuse(others)
    window = module.row_window

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output; the queries belong to the last tokens of the keys."""
        num, num_keys = queries.shape[2], keys.shape[2]
        seen = None
        if num < num_keys or window is not None or softcap is not None:
            places = torch.arange(num_keys, device=queries.device)
            distance = places[num_keys - num :, None] - places
            seen = ((distance >= 0) & (distance < (window or num_keys)))[None, None]
        if softcap is not None:
            return _softcapped(queries, keys, values, seen, scaling, softcap)
        return sdpa_attention_forward(module, queries, keys, values, seen, scaling=scaling)[0]

    outputs = []
    start = 0
    for prompt, chosen, rejected in attention_mask[0, 0].tolist():
        end = start + prompt + chosen
        row = (query, key, value)
        outputs.append(attend(*(states[:, :, start:end] for states in row)))
        if not rejected:
            start = end
            continue
        queries = query[:, :, end : end + rejected]
        behind = (
            torch.cat([heads[:, :, start : start + prompt], heads[:, :, end : end + rejected]], 2)
            for heads in (key, value)
        )
        outputs.append(attend(queries, *behind))
        start = end + rejected
    return torch.cat(outputs, 1), None


def _refuse(others: Mapping[str, Any]) -> None:
    """Refuse what no attention function for rows can compute."""
    for extra in ("s_aux", "position_bias"):
        if others.get(extra) is not None:
            raise UserError(f"engine=shared_prefix cannot compute {extra}; use engine=trl")


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, seen: Any, scaling: Any, softcap: float
) -> Tensor:
    """Compute attention with scores bounded to +-softcap (Gemma 2); sdpa cannot bound scores."""
    key, value = (repeat_kv(heads, query.shape[1] // heads.shape[1]) for heads in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * (scaling / softcap))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)


def flash_error(
    model: PreTrainedModel, micro_batch: Mapping[str, Any], dtype: torch.dtype
) -> float:
    """Return how much VARLEN differs from BY_PAIR in fp32, on random numbers.

    The result is the largest relative error (Frobenius norm) of the output and of the gradients of
    queries, keys and values. The numbers have the shape of the model's heads, with a window where
    the model has windows. Trained weights would be a worse trial: where a head attends to one token
    alone, the gradients of its queries are nothing but rounding.

    Args:
        model: on a GPU.
        micro_batch: a row as `packing.Collator` lays it out, on the GPU; gives numbers of tokens.
        dtype: bf16 or fp16.

    Raises:
        RuntimeError: the kernel does not run on this GPU.
    """
    config = model.config.get_text_config()
    num = config.num_attention_heads
    num_keys = getattr(config, "num_key_value_heads", None) or num
    width, size = micro_batch["position_ids"].shape[1], _head_size(config)
    numbers = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, width, size, generator=numbers).to(model.device, dtype)
        for heads in (num, num_keys, num_keys)
    ]
    errors = []
    for window in (None, NARROW) if getattr(config, "sliding_window", None) else (None,):
        layer = SimpleNamespace(
            row_window=window, num_key_value_groups=num // num_keys, is_causal=True
        )
        exact, seen = (
            with_gradients(function, layer, each, inputs(name, micro_batch, config))
            for function, name, each in (
                (by_pair, BY_PAIR, [heads.float() for heads in states]),
                (varlen, VARLEN, states),
            )
        )
        errors += [(a - b).norm() / b.norm() for a, b in zip(seen, exact, strict=True)]
    return float(torch.stack(errors).max())


def with_gradients(
    function: Any, layer: Any, states: Sequence[Tensor], told: Mapping[str, Any]
) -> list[Tensor]:
    """Return an attention function's output, and the gradients of half its squared norm, in fp32.

    Args:
        function: `varlen`, `by_pair`, or another attention function of transformers.
        layer: takes the place of the attention layer.
        states: queries, keys and values, [1, heads, T, D] each.
        told: what `inputs` returns.
    """
    with torch.enable_grad():
        leaves = [heads.detach().requires_grad_() for heads in states]
        told = {"attention_mask": None, **told}
        output = function(layer, *leaves, scaling=leaves[0].shape[-1] ** -0.5, **told)[0]
        gradients = torch.autograd.grad(output, leaves, output.detach())
    return [each.detach().float() for each in (output, *gradients)]


AttentionInterface.register(VARLEN, varlen)
AttentionInterface.register(BY_PAIR, by_pair)
