"""Keys of `method`: which objective is optimised."""

from dataclasses import dataclass
from typing import ClassVar

from orpo_lab.config.checks import at_least, check, one_of
from orpo_lab.config.policy import free, setting


@dataclass(kw_only=True)
class Method:
    """Base class of the methods of alignment; never used itself."""

    title: ClassVar[str] = ""
    """The method's name and paper, for the card of a trained model."""
    reads_beta: ClassVar[bool] = True
    """Whether the loss depends on beta."""
    more_beta_is_more_preference: ClassVar[bool] = True
    """Whether a higher beta moves the model further towards the chosen answers. True for ORPO,
    where beta is the weight of a loss. False for a method like DPO, where beta keeps the model near
    its start."""
    margin: ClassVar[str] = "rewards/margins"
    """The metric by which an adaptive beta tells how far the model separates a pair. Rewards are
    read at a beta of 1, so the margin does not depend on beta."""
    reads_unpaired: ClassVar[bool] = False
    """Whether the method can learn from single completions with a label."""
    least_beta: ClassVar[float] = 0.0
    """The smallest beta that the method is defined for."""

    # Only other keys read these two; a run uses `beta` and `optimizer.learning_rate`
    default_beta: float = free()
    learning_rate_factor: float = free()

    @property
    def learns_at_beta_zero(self) -> bool:
        """Whether the loss has a gradient at a beta of 0."""
        return True

    def _check_likelihood(self, nll_scope: str, nll_mean: str) -> None:
        one_of(("prompt_and_completion", "completion"), method__nll_scope=nll_scope)
        one_of(("tokens", "sequences"), method__nll_mean=nll_mean)

    def _check_smoothing(self, label_smoothing: float) -> None:
        check(
            0 <= label_smoothing < 0.5,
            f"method.label_smoothing={label_smoothing} must be at least 0 and below 0.5",
        )


@dataclass(kw_only=True)
class OrpoMethod(Method):
    """ORPO, with the choice of how its equations are read (see docs/method.md)."""

    title: ClassVar[str] = "ORPO (Hong, Lee and Thorne 2024, arXiv:2403.07691)"
    margin: ClassVar[str] = "log_odds_chosen"

    nll_scope: str = setting()
    nll_mean: str = setting()
    penalty: str = setting()
    log_odds_scale: float = setting()

    def __post_init__(self) -> None:
        self._check_likelihood(self.nll_scope, self.nll_mean)
        one_of(("log_sigmoid", "log_odds"), method__penalty=self.penalty)
        check(
            self.log_odds_scale > 0,
            f"method.log_odds_scale={self.log_odds_scale} must be above 0",
        )
        check(
            self.penalty == "log_sigmoid" or self.log_odds_scale == 1,
            "method.log_odds_scale is inside the log-sigmoid, which method.penalty=log_odds does "
            "not have; set beta instead",
        )


@dataclass(kw_only=True)
class SftMethod(Method):
    """Supervised fine-tuning on the chosen completions; beta is not read."""

    title: ClassVar[str] = "supervised fine-tuning on the chosen answers"
    reads_beta: ClassVar[bool] = False
    reads_unpaired: ClassVar[bool] = True

    nll_scope: str = setting()
    nll_mean: str = setting()

    def __post_init__(self) -> None:
        self._check_likelihood(self.nll_scope, self.nll_mean)


@dataclass(kw_only=True)
class DpoMethod(Method):
    """DPO: beta keeps the model near its start, the reference."""

    title: ClassVar[str] = "DPO (Rafailov et al. 2023, arXiv:2305.18290)"
    more_beta_is_more_preference: ClassVar[bool] = False

    label_smoothing: float = setting()

    def __post_init__(self) -> None:
        self._check_smoothing(self.label_smoothing)

    @property
    def learns_at_beta_zero(self) -> bool:
        """Never: beta is a factor of the gradient."""
        return False


@dataclass(kw_only=True)
class IpoMethod(Method):
    """IPO: the margin over the reference goes to 1 / (2 beta); beta is the paper's tau."""

    title: ClassVar[str] = "IPO (Azar et al. 2023, arXiv:2310.12036)"
    more_beta_is_more_preference: ClassVar[bool] = False
    # 1 / (2 beta) and its square stay finite in fp32
    least_beta: ClassVar[float] = 1e-6


@dataclass(kw_only=True)
class SimpoMethod(Method):
    """SimPO: beta scales the difference of mean log-probabilities, which gamma is compared with."""

    title: ClassVar[str] = "SimPO (Meng, Xia and Chen 2024, arXiv:2405.14734)"

    gamma: float = setting()
    sft_weight: float = setting()

    def __post_init__(self) -> None:
        at_least(0, method__gamma=self.gamma, method__sft_weight=self.sft_weight)

    @property
    def learns_at_beta_zero(self) -> bool:
        """Whether there is an SFT term; beta is a factor of the other term's gradient."""
        return self.sft_weight > 0


@dataclass(kw_only=True)
class CpoMethod(Method):
    """CPO: DPO with a uniform reference, and L_SFT beside it.

    Nothing holds the model near its start but L_SFT. The preference term's gradient by the margin
    m is beta sigmoid(-beta m), which rises with beta while beta m is below 1.28.
    """

    title: ClassVar[str] = "CPO (Xu et al. 2024, arXiv:2401.08417)"

    sft_weight: float = setting()
    label_smoothing: float = setting()

    def __post_init__(self) -> None:
        at_least(0, method__sft_weight=self.sft_weight)
        self._check_smoothing(self.label_smoothing)

    @property
    def learns_at_beta_zero(self) -> bool:
        """Whether there is an SFT term; beta is a factor of the other term's gradient."""
        return self.sft_weight > 0


@dataclass(kw_only=True)
class KtoMethod(Method):
    """KTO: each completion is compared with the reference on its own; beta as in DPO."""

    title: ClassVar[str] = "KTO (Ethayarajh et al. 2024, arXiv:2402.01306)"
    more_beta_is_more_preference: ClassVar[bool] = False
    reads_unpaired: ClassVar[bool] = True

    desirable_weight: float = setting()
    undesirable_weight: float = setting()

    def __post_init__(self) -> None:
        at_least(
            0,
            method__desirable_weight=self.desirable_weight,
            method__undesirable_weight=self.undesirable_weight,
        )
        check(
            self.desirable_weight > 0 or self.undesirable_weight > 0,
            "method.desirable_weight and method.undesirable_weight are both 0, so nothing would be "
            "learned; give one of them a weight above 0",
        )

    @property
    def learns_at_beta_zero(self) -> bool:
        """Never: beta is a factor of the gradient."""
        return False


METHODS: dict[str, type[Method]] = {
    "orpo": OrpoMethod,
    "sft": SftMethod,
    "dpo": DpoMethod,
    "ipo": IpoMethod,
    "kto": KtoMethod,
    "simpo": SimpoMethod,
    "cpo": CpoMethod,
}
