"""Keys of `quantization`: how the frozen base weights are stored."""

from dataclasses import dataclass

from orpo_lab.config.checks import at_least
from orpo_lab.config.policy import lasting


@dataclass(kw_only=True)
class Quantization:
    """How the frozen base weights are stored."""


@dataclass(kw_only=True)
class Nf4(Quantization):
    """4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314)."""

    double_quantization: bool = lasting()


@dataclass(kw_only=True)
class Int8(Quantization):
    """LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339)."""

    outlier_threshold: float = lasting()

    def __post_init__(self) -> None:
        at_least(0, quantization__outlier_threshold=self.outlier_threshold)


@dataclass(kw_only=True)
class Unquantized(Quantization):
    """Weights in `model.dtype`, or in fp32 where they are trained themselves."""
