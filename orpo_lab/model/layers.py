"""Linear layers with their adapters, each in one autograd function instead of PEFT's many.

A layer with an adapter computes (LoRA, arXiv:2106.09685, Eq. 3)

    y = x W^T + bias + s dropout(x) A^T B^T

PEFT computes the two terms apart. Its layers on a 4-bit base cast their input and their output
several times, and keep several copies of the input for the backward pass. Here the whole sum is one
function. All its products are in the precision of the arithmetic. The output is in the precision of
the input, so what follows the layer (rotary embedding, activation function) stays as exact as with
PEFT's layers. The layers that read one input (the query, key and value projections; the gate and up
projections) share one narrow copy of the input.

PEFT owns the weights: it makes, saves, loads and merges them. `fused` only exchanges the forward
pass of PEFT's layers for a while.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The largest number of an 8-bit code: a weight is code * scale / LARGEST_CODE
LARGEST_CODE = 127


class _FusedForward:
    """The forward pass that replaces PEFT's, as a base class of the classes in FUSED.

    Attributes:
        of_input: the narrow copy of the input, which the layers of a model share.
        narrow_a: the adapter's A in the precision of the arithmetic, [r, in].
        scaled_b: s times the adapter's B in the precision of the arithmetic, [out, r].
    """

    of_input: "_Input"
    narrow_a: Tensor
    scaled_b: Tensor

    def forward(self: Any, x: Tensor) -> Tensor:
        """Return the layer's output, [..., out], for an input, [..., in], in the input's dtype."""
        name = self.active_adapters[0]
        dropout = self.lora_dropout[name]
        return _Projection.apply(
            x,
            self.of_input.narrow(x, self.narrow_a.dtype),
            self.get_base_layer(),
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.narrow_a,
            self.scaled_b,
            self.scaling[name],
            dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
        )


class _FusedLinear(_FusedForward, lora.Linear):
    """PEFT's layer on a 16-bit or 32-bit base."""


class _FusedLinear4bit(_FusedForward, lora.Linear4bit):
    """PEFT's layer on a 4-bit base."""


class _FusedLinear8bit(_FusedForward, lora.Linear8bitLt):
    """PEFT's layer on an 8-bit base."""


# PEFT's class -> ours. Layers of other classes keep PEFT's forward pass
FUSED: dict[type[Any], type[Any]] = {
    lora.Linear: _FusedLinear,
    lora.Linear4bit: _FusedLinear4bit,
    lora.Linear8bitLt: _FusedLinear8bit,
}
# Classes of base layers of which `dense_weight` can return the weight
BASES = (nn.Linear, Linear4bit, Linear8bitLt)


class _Input:
    """The input that the last layer read, and its narrow copy, for the next layer."""

    def __init__(self) -> None:
        self.wide: Tensor | None = None
        self.copy: Tensor | None = None

    def narrow(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` in `dtype`, without an autograd graph; copied once for layers in a row."""
        if x.dtype == dtype:
            return x.detach()
        if torch.compiler.is_compiling():  # the compiler finds equal casts by itself
            return x.detach().to(dtype)
        if x is not self.wide or self.copy is None:
            self.wide, self.copy = x, x.detach().to(dtype)
        return self.copy

    def forget(self) -> None:
        """Drop both tensors."""
        self.wide = self.copy = None


def fusible(model: Any) -> list[Any]:
    """Return the layers of a model whose forward pass `fused` can exchange, in the model's order.

    These have one plain adapter, which is not merged, on a linear layer. A layer of which this is
    not true (transposed weights of GPT-2, DoRA, a bias in the adapter) keeps PEFT's forward pass.
    """
    return [module for module in model.modules() if _is_fusible(module)]


def _is_fusible(module: Any) -> bool:
    if type(module) not in FUSED:
        return False
    names = module.active_adapters
    return (
        type(module.get_base_layer()) in BASES
        and not module.disable_adapters
        and not module.merged
        and len(names) == 1
        and names[0] in module.lora_A
        and names[0] not in module.lora_variant
        and module.lora_B[names[0]].bias is None
    )


@contextlib.contextmanager
def fused(layers: list[Any], dtype: torch.dtype) -> Iterator[None]:
    """Inside this context, let layers compute with their adapters in one function each.

    The adapters are cast to `dtype` once, at the beginning. So no optimizer step may be taken
    inside the context.

    Args:
        layers: the layers that `fusible` returns.
        dtype: precision of the arithmetic.
    """
    of_input = _Input()
    classes = [type(layer) for layer in layers]
    for layer, theirs in zip(layers, classes, strict=True):
        name = layer.active_adapters[0]
        layer.of_input = of_input
        layer.narrow_a = layer.lora_A[name].weight.detach().to(dtype)
        layer.scaled_b = (layer.lora_B[name].weight.detach() * layer.scaling[name]).to(dtype)
        layer.__class__ = FUSED[theirs]
    try:
        yield
    finally:
        of_input.forget()
        for layer, theirs in zip(layers, classes, strict=True):
            layer.__class__ = theirs
            del layer.of_input, layer.narrow_a, layer.scaled_b


def dense_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight of a base layer, dequantized, [out, in].

    The forward pass of bitsandbytes' 8-bit layer also rounds its input to 8 bits on a GPU. The
    weight here is the one that its backward pass uses everywhere, and its forward pass on a CPU.

    Args:
        base: one of the classes in BASES.
        dtype: of the result.
    """
    weight: Any = base.weight
    if isinstance(base, Linear4bit):
        # Where processes share the weight, only the layer has kept the constants of its blocks
        constants = getattr(weight, "quant_state", base.quant_state)
        return dequantize_4bit(weight.detach(), constants).to(dtype)
    if isinstance(base, Linear8bitLt):
        # The first forward pass moves the codes from the weight to the layer's state
        holder = base.state if base.state.CB is not None else weight
        return holder.CB.to(dtype).mul_(holder.SCB[:, None] * (1 / LARGEST_CODE))
    return weight.detach().to(dtype)


class _Projection(torch.autograd.Function):
    """A linear layer and its adapter; the gradients are those of the equation above.

    With dy the gradient of y, and d = dropout(x):

        dA = (dy s B)^T d        dB = s dy^T (d A^T)        dx = dy W + dropout'(dy s B A)

    For the backward pass the narrow input, d A^T and the mask are kept. The weight is dequantized
    again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        narrow: Tensor,
        base: nn.Linear,
        full_a: Tensor,
        full_b: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """Return y, [..., out], rounded to the dtype of `a` and then cast to that of x.

        Args:
            ctx: what the backward pass reads.
            x: the input, [..., in], which gets the gradient.
            narrow: the input in the dtype of `a`, without a graph.
            base: the frozen layer, with or without a bias.
            full_a: A as it is trained, [r, in], which gets the gradient.
            full_b: B as it is trained, [out, r], which gets the gradient.
            a: A in the precision of the arithmetic.
            b: s B in the precision of the arithmetic.
            scaling: s.
            dropout: the probability that an element of the adapter's input is set to zero.
        """
        rows = narrow.reshape(-1, narrow.shape[-1])
        dropped, mask = rows, None
        if dropout:
            dropped, mask = torch.native_dropout(rows, dropout, True)
        low = dropped @ a.mT
        # The small term first: the large sum is then rounded only once
        if base.bias is None:
            y = low @ b.mT
        else:
            y = torch.addmm(base.bias.detach().to(a.dtype), low, b.mT)
        y.addmm_(rows, dense_weight(base, a.dtype).mT)
        ctx.save_for_backward(rows, low, mask)
        ctx.base, ctx.a, ctx.b = base, a, b
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.scaling, ctx.dropout = scaling, dropout
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B.

        The gradient of x is in the dtype of x, in which autograd adds it to those of other layers.
        The gradients of A and B are cast by autograd.
        """
        rows, low, mask = ctx.saved_tensors
        a, b, scaling = ctx.a, ctx.b, ctx.scaling
        dy = gradient.reshape(-1, gradient.shape[-1]).to(a.dtype)
        of_low = dy @ b
        # With beta=0 the first argument only gives the shape
        of_b = torch.addmm(b, dy.mT, low, beta=0, alpha=scaling)
        dropped = rows if mask is None else _drop(rows, mask, ctx.dropout)
        of_a = of_low.mT @ dropped
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = product(dy, dense_weight(ctx.base, dy.dtype), ctx.dtype)
            if mask is not None:
                of_x.add_(_drop(product(of_low, a, ctx.dtype), mask, ctx.dropout))
            elif of_x.dtype == a.dtype:
                of_x.addmm_(of_low, a)
            else:
                of_x.add_(product(of_low, a, ctx.dtype))
            of_x = of_x.view(ctx.shape)
        return of_x, None, None, of_a, of_b, None, None, None, None


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of two narrow matrices, [N, M] and [M, K], in `dtype` without rounding.

    A GPU writes its fp32 accumulators. A CPU has no such kernel (torch 2.13).
    """
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _drop(rows: Tensor, mask: Tensor, dropout: float) -> Tensor:
    return (rows * mask).mul_(1 / (1 - dropout))
