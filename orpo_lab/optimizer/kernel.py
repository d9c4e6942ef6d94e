"""The Triton kernel that adds an update to a bf16 weight with stochastic rounding, on a GPU.

Triton comes with torch's builds for GPUs, so only `write_back.py` imports this module, and only
there. A program of the kernel computes one tile of the weight. It multiplies the two factors of an
update in TF32 (operands of 11 significant bits, sums in fp32). Neither the product nor the sum with
the weight nor the random numbers are ever stored. The random numbers are those of Philox 4x32-10
(Salmon et al. 2011, doi:10.1145/2063384.2063405), a function of a key and a counter. The counter is
the place in the weight.
"""

# Triton reads the arguments' types at the call: it takes pointers, integers and constants
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a tile's rows and columns, and of columns of the left factor that are read at a time.
# With so many warps a thread has at most 128 registers, and a tile at most 82 KB of shared memory.
TILE = {"height": 64, "width": 128, "depth": 64}
LAUNCH = {"num_warps": 8, "num_stages": 2}


def add_rounded(
    weight: Tensor, factors: tuple[Tensor, ...], keep: float, scale: float, key: int
) -> None:
    """Change a contiguous bf16 weight to `keep * weight + scale * update`; see `write_back`."""
    rows = weight.view(-1, weight.shape[-1] if weight.ndim else 1)
    num_tiles = triton.cdiv(rows.shape[0], TILE["height"]) * triton.cdiv(
        rows.shape[1], TILE["width"]
    )
    if len(factors) == 1:
        left = right = factors[0].view_as(rows)
        rank = 0
    else:
        left, right = factors
        rank = left.shape[1]
    with torch.cuda.device_of(weight):
        _add_rounded[(num_tiles,)](
            rows,
            left,
            right,
            *rows.shape,
            keep,
            scale,
            key,
            *left.stride(),
            *right.stride(),
            rank=rank,
            **TILE,
            **LAUNCH,
        )


@triton.jit(do_not_specialize=["num_rows", "key"])
def _add_rounded(
    weight,
    left,
    right,
    num_rows,
    num_columns,
    keep,
    scale,
    key,
    left_row,
    left_column,
    right_row,
    right_column,
    rank: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,
):
    """Compute one tile. `rank` is 0 where `left` is the update itself. Strides count numbers."""
    tiles_in_row = tl.cdiv(num_columns, width)
    tile_row = tl.program_id(0) // tiles_in_row
    tile_column = tl.program_id(0) % tiles_in_row
    row = (tile_row * height + tl.arange(0, height))[:, None].to(tl.int64)
    column = (tile_column * width + tl.arange(0, width))[None, :]
    place = row * num_columns + column
    inside = (row < num_rows) & (column < num_columns)
    if rank == 0:
        update = tl.load(left + place, inside, 0.0)
    else:
        update = tl.zeros((height, width), tl.float32)
        for first in range(0, rank, depth):
            down = first + tl.arange(0, depth)[:, None]
            across = first + tl.arange(0, depth)[None, :]
            a_inside = (row < num_rows) & (across < rank)
            b_inside = (down < rank) & (column < num_columns)
            a = tl.load(left + row * left_row + across * left_column, a_inside, 0.0)
            b = tl.load(right + down * right_row + column * right_column, b_inside, 0.0)
            update = tl.dot(a.to(tl.float32), b.to(tl.float32), update, input_precision="tf32")
    wide = tl.load(weight + place, inside, 0.0).to(tl.float32) * keep + update * scale
    # Eight numbers in a row share a counter: four random words of two halves each
    eight = tile_column * (width // 8) + tl.arange(0, width // 8)[None, :]
    noise = _sixteen_bits(key, (row * tl.cdiv(num_columns, 8) + eight).to(tl.uint32))
    bits = (wide.to(tl.int32, bitcast=True) + noise) & -65536
    rounded = tl.where(wide == wide, bits.to(tl.float32, bitcast=True), wide)  # NaN stays NaN
    tl.store(weight + place, rounded.to(tl.bfloat16), inside)


@triton.jit
def _sixteen_bits(key, counter):
    """Return uniform random integers below 2**16, eight for every counter [M, N]: [M, 8 N]."""
    a, b, c, d = tl.randint4x(key, counter)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d)).to(tl.uint32, bitcast=True)
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)
