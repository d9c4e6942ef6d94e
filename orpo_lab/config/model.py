"""Keys of `model`: which causal language model, and where it lies."""

from dataclasses import dataclass
from pathlib import Path

from orpo_lab.config.checks import check, one_of
from orpo_lab.config.policy import free, lasting, location

# conf/model/tiny.yaml names the embedded model by its place in the package
EMBEDDED = "orpo_lab/tiny"
# What a model is loaded from; checkpoints and a README beside it are not read
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")


@dataclass(kw_only=True)
class Model:
    """A causal language model: a hub name or a local folder."""

    path: str = location(*MODEL_FILES)
    revision: str | None = location()
    attention: str = lasting()
    dtype: str = lasting()
    trust_remote_code: bool = lasting()
    # Read by other keys only: what a run takes of them stands in optimizer.learning_rate
    learning_rate: float = free()
    full_learning_rate: float = free()

    def __post_init__(self) -> None:
        check(bool(self.path.strip()), "model.path is empty; give a hub name or a folder")
        one_of(("auto", "flash_attention_2", "sdpa", "eager"), model__attention=self.attention)
        one_of(("bf16", "fp16", "fp32"), model__dtype=self.dtype)


def local_path(path: str) -> Path:
    """Return where a path lies that is not on the hub; whether something does is another matter."""
    if path == EMBEDDED:
        return Path(__file__).parents[1] / "tiny"
    return Path(path).expanduser()
