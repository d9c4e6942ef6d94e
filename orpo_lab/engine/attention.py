"""Attention between the tokens of a row of pairs `[prompt | chosen | rejected]`.

The models keep their own layers. On a GPU flex attention skips the blocks that a block mask hides.
Elsewhere an attention call of its own reads each completion of a pair, so that nothing masked is
computed.

Both ways pass a tensor or block mask as `attention_mask`: transformers passes a ready mask of four
dimensions on unchanged. Without a mask, transformers would take the restarting position ids for
packed sequences, and the rejected completion would not see its prompt.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils import is_triton_available

from orpo_lab.errors import UserError

FLEX = "flex_attention"
BY_PAIR = "orpo_lab_by_pair"
# Tokens in a block of flex attention. Rows are padded to a multiple of it: every other length would
# need a compilation of its own
BLOCK = 128
# The smallest head size that the kernels of flex attention support
MIN_FLEX_HEAD = 16
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


def choose(model: PreTrainedModel) -> str:
    """Return the attention implementation for rows: FLEX where it runs, else BY_PAIR."""
    config = model.config.get_text_config()
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    possible = (
        model.device.type == "cuda"
        and model._supports_flex_attn
        and is_triton_available()
        and head_size >= MIN_FLEX_HEAD
    )
    return FLEX if possible else BY_PAIR


def mask(
    implementation: str, micro_batch: Mapping[str, Any], config: PretrainedConfig
) -> Tensor | BlockMask | dict[str, BlockMask]:
    """Return the `attention_mask` of a micro-batch, as the model takes it.

    Args:
        implementation: the name that `choose` returns.
        micro_batch: `sizes`, `parts` and `position_ids` as `packing.Collator` lays them out.
        config: of the model; says how many tokens back each layer attends to.

    Returns:
        For BY_PAIR the sizes, [1, 1, B, 3], on the host. For FLEX a block mask [1, 1, T, T]. Where
        a model has several kinds of layers, a block mask for each kind.
    """
    sizes = micro_batch["sizes"]
    if implementation == BY_PAIR:
        return torch.tensor([[sizes]])
    text = config.get_text_config()
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in sizes)
    masks: dict[str, BlockMask] = {}
    for layer, kind in enumerate(getattr(text, "layer_types", None) or [""]):
        window = _window(text, layer)
        within = window is None or window >= longest  # then the window hides nothing
        masks[kind] = masks.get(kind) or _block_mask(micro_batch, None if within else window)
    return masks if len(masks) > 1 else masks.popitem()[1]


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
        module: the attention layer; its `config` says how many tokens back the layer attends to.
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
    for extra in ("s_aux", "position_bias"):
        if others.get(extra) is not None:
            raise UserError(f"engine=shared_prefix cannot compute {extra}; use engine=trl")
    window = _window(module.config, module.layer_idx)

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
        queries = query[:, :, end : end + rejected]
        behind = (
            torch.cat([heads[:, :, start : start + prompt], heads[:, :, end : end + rejected]], 2)
            for heads in (key, value)
        )
        outputs.append(attend(queries, *behind))
        start = end + rejected
    return torch.cat(outputs, 1), None


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, seen: Any, scaling: Any, softcap: float
) -> Tensor:
    """Compute attention with scores bounded to +-softcap (Gemma 2); sdpa cannot bound scores."""
    key, value = (repeat_kv(heads, query.shape[1] // heads.shape[1]) for heads in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * (scaling / softcap))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)


AttentionInterface.register(BY_PAIR, by_pair)
