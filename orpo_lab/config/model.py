"""Keys of `model`: which causal language model is used, and where its files are."""

from dataclasses import dataclass
from pathlib import Path

from orpo_lab.config.checks import check, one_of
from orpo_lab.config.policy import free, lasting, location

# The name of the embedded model in conf/model/tiny.yaml: its folder in the package
EMBEDDED = "orpo_lab/tiny"
# The files that a model is loaded from; checkpoints and a README in the folder are not read
MODEL_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.txt",
    "*.py",
)
# In `final/` of a run: the model that the adapter there belongs to, if `model.path` is another one
BASE = "base"
# The files of a run folder that another run starts from
RESULT_FILES = tuple(
    f"{folder}/{pattern}" for folder in ("final", f"final/{BASE}") for pattern in MODEL_FILES
)


@dataclass(kw_only=True)
class Model:
    """A causal language model: a hub name or a local folder."""

    path: str = location(*MODEL_FILES)
    revision: str | None = location()
    attention: str = lasting()
    dtype: str = lasting()
    trust_remote_code: bool = lasting()
    chat_template: str | None = location("*.jinja")
    # Only other keys read these two; the value that a run uses is optimizer.learning_rate
    learning_rate: float = free()
    full_learning_rate: float = free()

    def __post_init__(self) -> None:
        check(bool(self.path.strip()), "model.path is empty; give a hub name or a folder")
        check(self.chat_template != "", "model.chat_template is empty; give a file, or null")
        one_of(("auto", "flash_attention_2", "sdpa", "eager"), model__attention=self.attention)
        one_of(("bf16", "fp16", "fp32"), model__dtype=self.dtype)


def template_path(given: str) -> Path | None:
    """Return the file that `model.chat_template` names; None: the key holds a template's text."""
    return None if "{" in given else Path(given).expanduser()


def local_path(path: str) -> Path:
    """Return the local path of `model.path` or of a dataset; the path need not exist."""
    if path == EMBEDDED:
        return Path(__file__).parents[1] / "tiny"
    return Path(path).expanduser()
