"""Keys of `optimizer`: which weights are trained, and how."""

from dataclasses import dataclass

from orpo_lab.config.checks import at_least, check, one_of
from orpo_lab.config.policy import lasting, setting


@dataclass(kw_only=True)
class Optimizer:
    """Base class of all optimizers; never used itself."""

    learning_rate: float = setting()
    weight_decay: float = setting()
    adam_beta1: float = setting()
    adam_beta2: float = setting()
    adam_epsilon: float = setting()

    def __post_init__(self) -> None:
        check(
            0 <= self.learning_rate <= 1e36,
            f"optimizer.learning_rate={self.learning_rate} must be a number of at least 0, and one "
            "whose step fp32 can hold",
        )
        at_least(0, optimizer__weight_decay=self.weight_decay)
        check(self.adam_epsilon > 0, f"optimizer.adam_epsilon={self.adam_epsilon} must be above 0")
        for key in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, key) < 1, f"optimizer.{key} must be in [0, 1)")


@dataclass(kw_only=True)
class Lora(Optimizer):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on unquantized weights."""

    r: int = lasting()
    alpha: float = lasting()
    dropout: float = lasting()

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, optimizer__r=self.r)
        check(self.alpha > 0, f"optimizer.alpha={self.alpha} must be above 0")
        check(0 <= self.dropout < 1, f"optimizer.dropout={self.dropout} must be in [0, 1)")


@dataclass(kw_only=True)
class Qlora(Lora):
    """Low-rank adapters on a quantized base (Dettmers et al. 2023, arXiv:2305.14314)."""


@dataclass(kw_only=True)
class AdamW(Optimizer):
    """AdamW on all parameters, with fp32 master weights."""


@dataclass(kw_only=True)
class Galore(Optimizer):
    """GaLore: all parameters, with low-rank gradients (Zhao et al. 2024, arXiv:2403.03507)."""

    implementation: str = lasting()
    rank: int | None = lasting()
    update_proj_gap: int | None = lasting()
    scale: float = lasting()
    proj_type: str = lasting()
    bits: int = lasting()
    refresh: str | None = lasting()
    stagger_refresh: bool | None = lasting()
    rotate_moments: bool = lasting()
    layerwise: bool = lasting()

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, optimizer__rank=self.rank, optimizer__update_proj_gap=self.update_proj_gap)
        check(self.scale > 0, f"optimizer.scale={self.scale} must be above 0")
        one_of(("std", "reverse_std", "left", "right"), optimizer__proj_type=self.proj_type)
        check(self.bits in (8, 32), f"optimizer.bits={self.bits} must be 8 or 32")
        refresh = self.refresh or "exact"
        one_of(("exact", "randomized", "warm"), optimizer__refresh=refresh)
        one_of(("orpo_lab", "galore_torch"), optimizer__implementation=self.implementation)
        if self.implementation == "galore_torch":
            self._check_galore_torch()

    def _check_galore_torch(self) -> None:
        """Refuse settings that galore-torch 1.0 would ignore or apply wrongly."""
        check(
            self.bits == 32,
            "optimizer.implementation=galore_torch cannot do optimizer.bits=8: its 8-bit class "
            "passes its settings in an order that bitsandbytes has since changed (it would run "
            "with max_unorm=100 and skip_zeros=True); use optimizer.implementation=orpo_lab",
        )
        asked = {
            "layerwise=true": self.layerwise,
            "rotate_moments=true": self.rotate_moments,
            "stagger_refresh=true": self.stagger_refresh,
            f"refresh={self.refresh}": self.refresh not in (None, "exact"),
        }
        for override, is_asked in asked.items():
            check(
                not is_asked,
                f"optimizer.{override} is not in galore-torch, which takes exact bases, all at "
                "once; use optimizer.implementation=orpo_lab",
            )
