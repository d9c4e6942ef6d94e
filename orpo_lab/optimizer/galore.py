"""GaLore: every weight trained, with the optimizer state of a low rank (Zhao et al. 2024,
arXiv:2403.03507, Algorithm 2). Needs torch, and bitsandbytes for 8-bit moments.

The gradient G [m, n] of a weight matrix is projected to R = G Q [m, r], where Q [n, r] is an
orthonormal basis of the directions in which G is largest (side "right"), or to R = P^T G [r, n]
(side "left"). Adam runs on R. Its update is projected back, multiplied by `scale` (the paper's
alpha) and added to the weight. A new basis is taken every `update_proj_gap` steps.

    optimizer = GaLore([{"params": linears, "rank": 128}, {"params": others}], lr=1e-4)

Adam itself is not implemented here. The projected gradients of a group lie one after another in one
flat fp32 tensor. This tensor is the gradient of one flat parameter, whose value before each step is
zero. An existing optimizer (torch's fused AdamW, or the 8-bit AdamW of bitsandbytes) updates the
flat parameter. The parameter's new value is the update that is projected back and added to the
weight (`write_back.py`). A value has memory only while the step of its group lasts.

Weights of half precision that are not projected are updated through the flat parameter too, in full
size. So every moment is kept in fp32 or 8 bits, and every update is added in fp32.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orpo_lab.optimizer.write_back import write_back
from orpo_lab.training.devices import OneDevice, num_processes

Side = Literal["left", "right"]
Group = dict[str, Any]

REFRESHES = ("exact", "randomized", "warm")
PROJ_TYPES = ("std", "reverse_std", "left", "right")
# bitsandbytes quantizes moments in blocks of this many numbers; each weight begins a new block
BLOCK = 256
# bitsandbytes keeps the moments of tensors with fewer numbers in fp32
MIN_8BIT_SIZE = 4096
# Bytes of the two code books of 8-bit moments, which all moments of an optimizer share
CODE_BOOKS = 2 * 256 * 4
KINDS = ("weights", "gradients", "moments", "bases", "updates")
# Number of directions computed in addition to those that are kept, and number of passes over G to
# compute them (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, sections 4.2 and 4.5)
OVERSAMPLING = 16
NUM_PASSES = 2


@dataclass
class _Slot:
    """A weight that is updated through its group's flat parameter, and its place in `flat`."""

    weight: nn.Parameter
    group: int
    """Index of the weight's parameter group."""
    index: int
    """Index among all slots; a part of the seed of the weight's random numbers."""
    side: Side | None
    """None: the weight is not projected."""
    flat: nn.Parameter
    start: int
    shape: tuple[int, ...]
    """Shape of the projected gradient, [m, r] or [r, n]; without projection, of the weight."""
    phase: int = 0
    """The step, within each `update_proj_gap` steps, at which the weight takes a new basis."""
    refreshed: bool = False
    """Whether the weight has taken a new basis for the current step."""

    def view(self, flat: Tensor) -> Tensor:
        """Return this weight's part, in `shape`, of a tensor laid out as the flat parameter."""
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)


class GaLore(torch.optim.Optimizer):
    """AdamW on projected gradients.

    A parameter group with a `rank` is projected. A group without a `rank` gets plain AdamW. Groups
    may have their own `lr`, `betas`, `eps`, `weight_decay`, and if projected their own `rank`,
    `update_proj_gap`, `scale` and `proj_type`. The weights of a group must share device and dtype.

    Weight decay is decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101) and acts on the whole
    weight, as in torch's AdamW. bf16 weights are rounded stochastically: an update below half a
    unit in the last place still changes the weight on average. A weight without a gradient is
    treated as if its gradient were zero.

    A new basis is taken in the backward pass, from the gradient of the first micro-batch.

    If several processes train together, there are two ways. With `processes`, each process projects
    its own gradients, and the processes average the projected ones (`average`): the projection is
    linear, so the mean of the projections is the projection of the mean. A full gradient is
    averaged only where its weight takes a new basis, one weight after another. So for a matrix
    [m, n] with m <= n a step sends r / m of the bytes of the gradient. Without `processes` the
    caller averages full gradients, as torch's DistributedDataParallel does; then a new basis is
    taken in `step`.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator, after the bias correction (as in torch's AdamW).
        weight_decay: each step multiplies a weight by 1 - lr * weight_decay.
        rank: number of columns of a basis; None: not projected.
        update_proj_gap: number of steps from one basis to the next (the paper's T).
        scale: factor of the projected updates (the paper's alpha).
        proj_type: "std" projects the smaller side of a matrix, "reverse_std" the larger side.
            "left" and "right" always project that side.
        bits: 32, or 8 for bitsandbytes' block-wise quantized moments.
        refresh: "exact" takes a basis by a full SVD. "randomized" takes it by subspace iteration
            from random directions, "warm" by subspace iteration from the last basis.
        stagger_refresh: spread the refreshes of the weights over `update_proj_gap` steps. The first
            basis is always taken at the first step.
        rotate_moments: express the moments in the new basis. The first moment is multiplied by
            Q_old^T Q_new. The second moment is multiplied by the squared entries of this matrix, as
            if directions were uncorrelated. False: the moments stay unchanged, as in the paper.
        layerwise: project each gradient as soon as autograd has computed it, add it up in rank r,
            and free it. Then no other code sees the gradients, so this optimizer clips them.
        max_grad_norm: in layer-wise mode and with `processes`, clip the norm of the projected
            gradients; 0: never.
        refresh_in_backward: False: take bases in `step`, where gradients are unscaled (fp16).
        processes: averages projected gradients over all processes; None: there is one process, or
            the caller averages full gradients.
        seed: of random directions and stochastic rounding; must be the same on every process.

    Raises:
        ValueError: an unknown or impossible setting.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        *,
        bits: int = 32,
        refresh: str = "warm",
        stagger_refresh: bool = True,
        rotate_moments: bool = False,
        layerwise: bool = False,
        max_grad_norm: float = 0.0,
        refresh_in_backward: bool = True,
        processes: OneDevice | None = None,
        seed: int = 0,
    ) -> None:
        if refresh not in REFRESHES:
            raise ValueError(f"refresh={refresh!r} is not one of {', '.join(REFRESHES)}")
        if bits not in (8, 32):
            raise ValueError(f"bits={bits} is neither 8 nor 32")
        is_alone = num_processes() == 1
        if layerwise and processes is None and not is_alone:
            raise ValueError(
                "layerwise=True frees each gradient in the backward pass, before the caller could "
                "average it; give processes=..., or layerwise=False"
            )
        if layerwise and not refresh_in_backward:
            raise ValueError("layerwise=True needs refresh_in_backward=True")
        if max_grad_norm and not (layerwise or processes):
            raise ValueError(
                "max_grad_norm is for layerwise=True and for processes; otherwise clip with "
                "torch.nn.utils.clip_grad_norm_ as for any optimizer"
            )
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
        }
        self._slots: list[_Slot] = []
        self._inner_groups: list[Group] = []
        super().__init__(params, settings)
        self.refresh = refresh
        self.rotate_moments = rotate_moments
        self.layerwise, self.processes = layerwise, processes
        self.max_grad_norm = max_grad_norm
        self.bits = bits
        self.seed = seed
        self.num_steps = 0
        self.grad_norm: Tensor | None = None
        """Where GaLore clips, the norm of the last step's projected gradients before clipping."""
        self.inner = _adamw(self._inner_groups, bits)
        self._has_gradients = False
        """Whether a gradient has been added to a flat gradient since these were last zero."""
        if stagger_refresh:
            projected = [slot for slot in self._slots if slot.side]
            for i, slot in enumerate(projected):
                slot.phase = i * self._setting(slot, "update_proj_gap") // len(projected)
        for slot in self._slots:
            if layerwise or (slot.side and refresh_in_backward and is_alone):
                self._hook(slot)

    @property
    def clips(self) -> bool:
        """Whether gradients are projected before they are clipped, so that `step` clips them."""
        return self.layerwise or self.processes is not None

    def add_param_group(self, param_group: Group) -> None:
        """Lay out the flat parameter of a group; the constructor calls this for every group.

        Raises:
            ValueError: a setting is unknown, the weights do not fit (see `_lay_out`), or the
                constructor has ended already.
        """
        unknown = set(param_group) - {*self.defaults, "params"}
        if unknown:
            raise ValueError(f"unknown setting of a parameter group: {', '.join(sorted(unknown))}")
        if hasattr(self, "inner"):
            raise ValueError("GaLore takes all its parameter groups when it is made")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["proj_type"] not in PROJ_TYPES:
            raise ValueError(f"proj_type={group['proj_type']!r}: not of {', '.join(PROJ_TYPES)}")
        half = (torch.bfloat16, torch.float16)
        through_flat = [p for p in group["params"] if group["rank"] or p.dtype in half]
        direct = [p for p in group["params"] if not group["rank"] and p.dtype not in half]
        inner = [*self._lay_out(group, through_flat), *direct]
        self._inner_groups.append({"params": inner, **_adam_settings(group)})

    def _lay_out(self, group: Group, weights: list[nn.Parameter]) -> list[nn.Parameter]:
        """Give every weight a place in one flat parameter, and return a list of that parameter.

        Without weights the list is empty.

        Raises:
            ValueError: devices or dtypes differ, the dtype is fp16, a rank does not fit, or a
                weight to project is not a matrix.
        """
        if not weights:
            return []
        if len({(p.device, p.dtype) for p in weights}) > 1:
            raise ValueError("the weights of one parameter group must share device and dtype")
        if weights[0].dtype == torch.float16:
            raise ValueError("fp16 weights have too little range to be trained; use bf16 or fp32")
        sides = [_side(p, group["proj_type"]) if group["rank"] else None for p in weights]
        shapes = [_shape(p, s, group["rank"]) for p, s in zip(weights, sides, strict=True)]
        sizes = [-(-math.prod(shape) // BLOCK) * BLOCK for shape in shapes]
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        flat = nn.Parameter(torch.empty(sum(sizes), dtype=wide, device=weights[0].device))
        flat.grad = torch.zeros_like(flat)
        flat.untyped_storage().resize_(0)
        for i, weight in enumerate(weights):
            slot = _Slot(
                weight=weight,
                group=len(self.param_groups) - 1,
                index=len(self._slots),
                side=sides[i],
                flat=flat,
                start=sum(sizes[:i]),
                shape=shapes[i],
            )
            self._slots.append(slot)
            if slot.side:
                length = weight.shape[1] if slot.side == "right" else weight.shape[0]
                basis = torch.eye(length, group["rank"], dtype=weight.dtype, device=weight.device)
                self.state[weight]["basis"] = basis
        return [flat]

    def _setting(self, slot: _Slot, key: str) -> Any:
        return self.param_groups[slot.group][key]

    def _hook(self, slot: _Slot) -> None:
        """Let autograd call `_take` as soon as it has added a gradient to the weight's gradient.

        After the optimizer is deleted the hook does nothing, so another optimizer may train the
        model.

        The hook has a weak reference to the optimizer, and no reference to the weight. Python's
        garbage collector does not see the references of such a hook (torch 2.13). A reference cycle
        through the hook would never be freed.
        """
        optimizer, index = weakref.ref(self), slot.index

        @torch.no_grad()
        def collect(weight: Tensor) -> None:
            galore = optimizer()
            if galore is None:
                return
            assert weight.grad is not None
            if galore.layerwise:
                galore._take(galore._slots[index], weight.grad)
            else:
                galore._refresh_if_due(galore._slots[index], weight.grad)

        slot.weight.register_post_accumulate_grad_hook(collect)

    def _take(self, slot: _Slot, gradient: Tensor) -> None:
        """Project a gradient, after taking a new basis from it if that is due, and free it."""
        self._refresh_if_due(slot, gradient)
        self._project(slot, gradient)
        slot.weight.grad = None

    @torch.no_grad()
    def average(self) -> None:
        """Average the gradients of a step over all processes; before, project what is not yet.

        Without `processes` nothing is done.
        """
        if self.processes is None:
            return
        if not self.layerwise:
            for slot in self._slots:
                gradient = slot.weight.grad
                if gradient is None:
                    # Another process may have a gradient, and may wait to average it
                    gradient = torch.zeros_like(slot.weight)
                self._take(slot, gradient)
        self.processes.average_gradients(self._inner_parameters())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight once, and return what `closure` returned."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        if self.clips:
            self._clip()
        else:
            for slot in self._slots:
                if slot.weight.grad is not None:
                    self._refresh_if_due(slot, slot.weight.grad)
                    self._project(slot, slot.weight.grad)
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update(_adam_settings(ours))  # where a scheduler writes
        for i in range(len(self.param_groups)):
            self._update_group(i)
        self._clear()
        self.num_steps += 1
        return loss

    def _clip(self) -> None:
        """Take the norm of the projected gradients, and clip it if it is to be clipped."""
        self.grad_norm = nn.utils.get_total_norm(self.gradients())
        if self.max_grad_norm:
            parameters = self._inner_parameters()
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, self.grad_norm)

    def _update_group(self, index: int) -> None:
        """Let the inner optimizer update one group, and write the updates into the weights.

        The groups take their steps one after another, so that the flat values of two groups never
        exist at once.
        """
        slots = [slot for slot in self._slots if slot.group == index]
        for flat in _flats(slots):
            flat.untyped_storage().resize_(flat.nbytes)
            flat.data.zero_()
        groups = self.inner.param_groups
        self.inner.param_groups = groups[index : index + 1]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = groups
        for slot in slots:
            self._write_back(slot)
        for flat in _flats(slots):
            flat.untyped_storage().resize_(0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, including those that are projected already."""
        super().zero_grad(set_to_none)
        self._clear()

    def drop_gradients(self) -> None:
        """Drop the gradients of a step that begins again, but keep the bases taken for this step.

        The moments may have been rotated into such a basis. A second basis for the same step would
        rotate them again.
        """
        super().zero_grad()
        self._clear_flat()

    def _clear(self) -> None:
        self._clear_flat()
        for slot in self._slots:
            slot.refreshed = False

    def _clear_flat(self) -> None:
        if self._has_gradients:
            for flat in _flats(self._slots):
                assert flat.grad is not None
                flat.grad.zero_()
        self._has_gradients = False

    def memory(self) -> dict[str, dict[str, int]]:
        """Return bytes of "projected" weights and of "others", each by the names in KINDS.

        `gradients` are at their peak: all full gradients and all projected gradients. In layer-wise
        mode only the largest of the full gradients counts, and a step begins after its end.
        `updates` are the values of the flat parameters, each of which exists during the step of its
        group alone. The two code books of bitsandbytes, 1 KiB each, are shared, and counted with
        the first moments that use them.
        """
        account = {name: dict.fromkeys(KINDS, 0) for name in ("projected", "others")}
        code_books = CODE_BOOKS
        for i, group in enumerate(self.param_groups):
            row = account["projected" if group["rank"] else "others"]
            inner = self.inner.param_groups[i]["params"]
            slots = [slot for slot in self._slots if slot.group == i]
            in_flight = [slot.weight.nbytes for slot in slots]
            bases = [self.state[slot.weight]["basis"] for slot in slots if slot.side]
            row["weights"] += sum(p.nbytes for p in group["params"])
            row["gradients"] += sum(p.nbytes for p in inner)
            row["gradients"] += max(in_flight, default=0) if self.layerwise else sum(in_flight)
            row["bases"] += sum(basis.nbytes for basis in bases)
            row["updates"] += slots[0].flat.nbytes if slots else 0
            row["moments"] += sum(moment_bytes(p, self.bits) for p in inner)
            if self.bits == 8 and any(p.numel() >= MIN_8BIT_SIZE for p in inner):
                row["moments"] += code_books
                code_books = 0
        return account

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the next step uses; projected ones where `step` clips them."""
        if self.clips:
            parameters = self._inner_parameters()
        else:
            parameters = [p for group in self.param_groups for p in group["params"]]
        return [p.grad for p in parameters if p.grad is not None]

    def freed(self) -> list[nn.Parameter]:
        """Return the weights whose gradients are freed in the backward pass (layer-wise mode)."""
        return [slot.weight for slot in self._slots] if self.layerwise else []

    def _inner_parameters(self) -> list[nn.Parameter]:
        return [p for group in self._inner_groups for p in group["params"]]

    def _project(self, slot: _Slot, gradient: Tensor) -> None:
        """Project a gradient, and add it to the weight's part of the flat gradient."""
        assert slot.flat.grad is not None
        if slot.side is None:
            low = gradient
        elif slot.side == "right":
            low = gradient @ self.state[slot.weight]["basis"]
        else:
            low = self.state[slot.weight]["basis"].mT @ gradient
        slot.view(slot.flat.grad).add_(low)
        self._has_gradients = True

    def _write_back(self, slot: _Slot) -> None:
        """Apply weight decay to the weight, and add the update that the flat parameter holds."""
        factors: tuple[Tensor, ...] = (slot.view(slot.flat),)
        if slot.side == "right":
            factors = (*factors, self.state[slot.weight]["basis"].mT)
        elif slot.side == "left":
            factors = (self.state[slot.weight]["basis"], *factors)
        keep = 1 - self._setting(slot, "lr") * self._setting(slot, "weight_decay")
        scale = self._setting(slot, "scale") if slot.side else 1.0
        write_back(slot.weight, factors, keep=keep, scale=scale, key=self._key(slot, purpose=0))

    def _refresh_if_due(self, slot: _Slot, gradient: Tensor) -> None:
        if slot.side is None or slot.refreshed:
            return
        gap = self._setting(slot, "update_proj_gap")
        if self.num_steps == 0 or self.num_steps % gap == slot.phase:
            if self.processes:
                # Projected and averaged once more, the mean stays as it is
                self.processes.average_([gradient])
            self._refresh(slot, gradient)
            slot.refreshed = True

    def _refresh(self, slot: _Slot, gradient: Tensor) -> None:
        """Take a new basis from a gradient; keep the old one if the SVD fails or is not finite."""
        basis, rank = self.state[slot.weight]["basis"], self._setting(slot, "rank")
        wide = gradient.to(slot.flat.dtype)
        try:
            if self.refresh == "exact":
                u, _, vh = torch.linalg.svd(wide, full_matrices=False)
                new = vh[:rank].mT if slot.side == "right" else u[:, :rank]
            else:
                matrix = wide if slot.side == "right" else wide.mT
                last = None if self.refresh == "randomized" or self.num_steps == 0 else basis
                generator = torch.Generator(wide.device).manual_seed(self._key(slot, purpose=1))
                new = iterated_basis(matrix, rank, last, generator)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return
        new = torch.where(new.isfinite().all(), new, basis)
        if self.rotate_moments and self.num_steps:
            self._rotate_moments(slot, basis.to(new.dtype).mT @ new)
        basis.copy_(new)

    def _rotate_moments(self, slot: _Slot, turn: Tensor) -> None:
        """Express both moments in a new basis, given Q_old^T Q_new [r, r]."""
        state = self.inner.state[slot.flat]
        for names, matrix in ((_FIRST, turn), (_SECOND, turn.square())):
            moment = _read_moment(state, names, slot)
            turned = moment @ matrix if slot.side == "right" else matrix.mT @ moment
            _write_moment(state, names, slot, turned)

    def _key(self, slot: _Slot, *, purpose: int) -> int:
        """Return the key of random numbers, which depends only on seed, step, weight and `purpose`.

        So the numbers are the same after a resume, on every process, and in any order of autograd.
        """
        key = hash((self.seed, self.num_steps, slot.index, purpose))
        return key % 2**63

    def state_dict(self) -> dict[str, Any]:
        """Return bases, moments and counts, as tensors and plain values: nothing to unpickle."""
        counted = {"num_steps": torch.tensor(self.num_steps), "inner": self.inner.state_dict()}
        return {**super().state_dict(), **counted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state is of an optimizer with another `rank` or `proj_type`.
        """
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key in ("rank", "proj_type"):
                if saved[key] != group[key]:
                    raise ValueError(f"the state is of {key}={saved[key]}, not {group[key]}")
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.inner.load_state_dict(state_dict["inner"])
        self.num_steps = int(state_dict["num_steps"])
        for slot in self._slots:
            slot.refreshed = False


# For each moment: its name in the state of torch's AdamW, its name in the state of bitsandbytes'
# AdamW, and there the names of its code book and of its block scales
_FIRST = ("exp_avg", "state1", "qmap1", "absmax1")
_SECOND = ("exp_avg_sq", "state2", "qmap2", "absmax2")


def _read_moment(state: dict[str, Any], names: tuple[str, ...], slot: _Slot) -> Tensor:
    """Return a weight's part of a moment, in fp32 and in the shape of the projected gradient."""
    plain, stored, code, scales = names
    moment = state[plain if plain in state else stored]
    part = slot.view(moment)
    if moment.dtype != torch.uint8:
        return part
    from bitsandbytes import functional

    return functional.dequantize_blockwise(
        part.contiguous(), absmax=state[scales][_blocks(slot)], code=state[code], blocksize=BLOCK
    )


def _write_moment(
    state: dict[str, Any], names: tuple[str, ...], slot: _Slot, value: Tensor
) -> None:
    """Write a weight's part of a moment back; the inverse of `_read_moment`."""
    plain, stored, code, scales = names
    moment = state[plain if plain in state else stored]
    if moment.dtype != torch.uint8:
        slot.view(moment).copy_(value)
        return
    from bitsandbytes import functional

    quantized, how = functional.quantize_blockwise(
        value.contiguous(), code=state[code], blocksize=BLOCK
    )
    slot.view(moment).copy_(quantized)
    state[scales][_blocks(slot)] = how.absmax


def _blocks(slot: _Slot) -> slice:
    """Return the indices of a weight's quantization blocks; no block belongs to two weights."""
    first = slot.start // BLOCK
    return slice(first, first + -(-math.prod(slot.shape) // BLOCK))


def moment_bytes(parameter: Tensor, bits: int) -> int:
    """Return the bytes of both moments of a parameter, with step count or block scales."""
    if bits == 32:
        return 2 * parameter.nbytes + 4  # torch counts steps in an fp32 tensor
    if parameter.numel() < MIN_8BIT_SIZE:
        return 2 * 4 * parameter.numel()
    return 2 * parameter.numel() + 2 * 4 * -(-parameter.numel() // BLOCK)


def iterated_basis(
    matrix: Tensor, rank: int, last: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Approximate the first `rank` right singular vectors of `matrix` [m, n], as columns [n, r].

    Subspace iteration (Halko, Martinsson and Tropp 2011, Algorithm 4.4) starts from the columns of
    `last` [n, r] and some random columns. Without `last` all columns are random.
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    num_random = width - (0 if last is None else rank)
    random = torch.randn(
        matrix.shape[1], num_random, generator=generator, dtype=matrix.dtype, device=matrix.device
    )
    directions = random if last is None else torch.cat([last.to(matrix.dtype), random], dim=1)
    for _ in range(NUM_PASSES):
        directions, triangle = torch.linalg.qr(matrix.mT @ (matrix @ directions))
    # The left singular vectors of `triangle` sort the directions by their share of the gradient
    return directions @ torch.linalg.svd(triangle).U[:, :rank]


def _side(weight: Tensor, proj_type: str) -> Side:
    """Return the side of a weight's basis; a right basis reduces the number of columns.

    Raises:
        ValueError: the weight is not a matrix.
    """
    if weight.ndim != 2:
        raise ValueError(f"only matrices can be projected, not a weight of {tuple(weight.shape)}")
    tall = weight.shape[0] >= weight.shape[1]
    sides: dict[str, Side] = {
        "std": "right" if tall else "left",
        "reverse_std": "left" if tall else "right",
        "left": "left",
        "right": "right",
    }
    return sides[proj_type]


def _shape(weight: Tensor, side: Side | None, rank: int) -> tuple[int, ...]:
    """Return the shape of the projected gradient; without a side, the shape of the weight.

    Raises:
        ValueError: the rank is below 1, or above the smaller side of the weight.
    """
    if side is None:
        return weight.shape
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank={rank} does not fit a weight of {tuple(weight.shape)}")
    return (weight.shape[0], rank) if side == "right" else (rank, weight.shape[1])


def _flats(slots: list[_Slot]) -> list[nn.Parameter]:
    """Return the flat parameters of some weights, each once."""
    return list({id(slot.flat): slot.flat for slot in slots}.values())


def _adam_settings(group: Group) -> Group:
    return {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}


def _adamw(groups: list[Group], bits: int) -> torch.optim.Optimizer:
    if bits == 8:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups)
    return torch.optim.AdamW(groups, fused=True)
