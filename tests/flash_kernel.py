"""Flash attention's kernels for a CPU, on which torch has none.

A mock for what cannot exist here. torch's own `varlen_attn`, its registration with autograd and
with the compiler stay as they are. Only the two kernels below them, `_flash_attention_forward` and
`_flash_attention_backward`, are replaced: by their documented semantics, in plain matrix products.
Like the kernels of a GPU, these kernels refuse what a GPU refuses, and leave memory undefined
(here: NaN) where no sequence covers a token. Unlike the kernels of a GPU, they take fp32 and fp64,
so that results can be compared exactly.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import library as operators


@contextmanager
def on_cpu() -> Iterator[None]:
    """Have the kernels on the CPU inside this context."""
    replaced = operators.Library("aten", "IMPL")
    replaced.impl("_flash_attention_forward", without_autocast(forward), "CPU")
    replaced.impl("_flash_attention_backward", without_autocast(backward), "CPU")
    try:
        yield
    finally:
        replaced._destroy()


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast from the kernel's own matrix products."""

    def run(*args: Any, **settings: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return kernel(*args, **settings)

    return run


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output [T, heads, D], the log of the sums of exponentials, and three unused."""
    check(query, key, value, cu_q, cu_k, max_q, max_k)
    assert dropout == 0
    output = torch.full_like(query, math.nan)
    log_sums = query.new_full((query.shape[1], len(query)), math.nan, dtype=torch.float32)
    for of_queries, of_keys in sequences(cu_q, cu_k):
        weights, values, _ = attend(query[of_queries], key[of_keys], value[of_keys], settings)
        output[of_queries] = (weights @ values).transpose(0, 1).to(query.dtype)
    nothing = query.new_empty(0)
    return output, log_sums, nothing, nothing, nothing


def backward(
    slope: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    *random: Tensor,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, by the derivative of softmax."""
    check(query, key, value, cu_q, cu_k, max_q, max_k)
    assert slope.dtype == query.dtype
    gradients = [torch.full_like(heads, math.nan) for heads in (query, key, value)]
    for of_queries, of_keys in sequences(cu_q, cu_k):
        queries, keys = query[of_queries], key[of_keys]
        weights, values, wide_keys = attend(queries, keys, value[of_keys], settings)
        slopes = slope[of_queries].transpose(0, 1).to(weights.dtype)
        of_weights = slopes @ values.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        of_scores = of_scores * settings["scale"]
        wide_queries = queries.transpose(0, 1).to(weights.dtype)
        found = of_scores @ wide_keys, of_scores.mT @ wide_queries, weights.mT @ slopes
        for gradient, where, each in zip(
            gradients, (of_queries, of_keys, of_keys), found, strict=True
        ):
            grouped = each.unflatten(0, (gradient.shape[1], -1)).sum(1)
            gradient[where] = grouped.transpose(0, 1).to(gradient.dtype)
    return gradients[0], gradients[1], gradients[2]


def check(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> None:
    """Refuse what the kernels of a GPU refuse, and a longest length that is not the longest."""
    assert query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape
    assert query.shape[2] == key.shape[2] <= 256
    assert query.shape[2] % 8 == 0
    assert query.shape[1] % key.shape[1] == 0
    assert all(heads.stride(-1) == 1 for heads in (query, key, value))
    for cumulated, states, longest in ((cu_q, query, max_q), (cu_k, key, max_k)):
        assert cumulated.dtype == torch.int32
        assert cumulated.is_contiguous()
        assert int(cumulated[-1]) <= len(states)
        assert longest >= int(cumulated.diff().max())
    # A single query takes another way, which has no backward pass for grouped heads
    assert max_q > 1


def sequences(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield for each sequence where its queries and where its keys are."""
    starts = zip(cu_q.numpy().tolist(), cu_k.numpy().tolist(), strict=True)
    begin = next(starts)
    for end in starts:
        yield slice(begin[0], end[0]), slice(begin[1], end[1])
        begin = end


def attend(
    query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, values and keys of one sequence, [heads, ...], in fp32 or wider.

    A query sees the keys from `window_size_left` before its own place to `window_size_right` behind
    it; -1: all. The last query's own place is that of the last key.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    queries = query.transpose(0, 1).to(wide)
    keys, values = (
        heads.transpose(0, 1).to(wide).repeat_interleave(groups, 0) for heads in (key, value)
    )
    ahead = torch.arange(len(key)) - torch.arange(len(key) - len(query), len(key))[:, None]
    left, right = settings["window_size_left"], settings["window_size_right"]
    seen = ((left < 0) | (ahead >= -left)) & ((right < 0) | (ahead <= right))
    scores = (queries @ keys.mT * settings["scale"]).masked_fill(~seen, -math.inf)
    return scores.softmax(-1), values, keys
