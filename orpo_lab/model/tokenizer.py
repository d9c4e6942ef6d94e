"""Load the tokenizer; check that tokenizer, texts and the model's context fit together."""

import logging

from jinja2 import TemplateError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from orpo_lab.config.dataset import Dataset
from orpo_lab.config.model import Model, template_path
from orpo_lab.data import Data
from orpo_lab.data.template import DEFAULT_CHAT_TEMPLATE, variables
from orpo_lab.errors import UserError, one_line
from orpo_lab.model.source import fetch

log = logging.getLogger(__name__)

# An embedding shorter than this share of the median length was never trained
UNTRAINED = 0.01


def check_context(config: PretrainedConfig, dataset: Dataset) -> None:
    """Refuse sequences longer than the model's context.

    Raises:
        UserError: `dataset.max_length`, or a prompt with its generated answer, does not fit.
    """
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    about = "the model's context"
    turn = _context_of_short_rope(text)
    if turn is not None and (context is None or turn < context):
        context = turn
        about = "the length above which its longrope reads a row otherwise, all rows beside it too,"
    if context is None:
        return
    if dataset.max_length > context:
        raise UserError(
            f"dataset.max_length={dataset.max_length} is above {about} of {context} tokens; set "
            f"dataset.max_length={context} or less, or choose another model"
        )
    if dataset.max_prompt_length + dataset.max_new_tokens > context:
        raise UserError(
            f"dataset.max_prompt_length={dataset.max_prompt_length} plus dataset.max_new_tokens="
            f"{dataset.max_new_tokens} are above {about} of {context} tokens; lower one"
        )


def _context_of_short_rope(config: PretrainedConfig) -> int | None:
    """Return the length in tokens up to which longrope uses its short frequencies.

    If a sequence is longer, transformers uses other frequencies for the whole batch. Then the
    log-probabilities of a pair would depend on the other pairs of the batch. None: the model does
    not use longrope.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(nested for nested in rope.values() if isinstance(nested, dict))]
    lengths = [
        settings["original_max_position_embeddings"]
        for settings in kinds
        if settings.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)


def load_tokenizer(model: Model, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a chat template and a pad token.

    The pad token may be the end-of-sequence token: padding is always marked by the attention mask,
    so real end-of-sequence tokens stay in the loss.

    Raises:
        UserError: there is no tokenizer, the tokenizer has no end-of-sequence token, the tokenizer
            does not belong to the model, or `model.chat_template` is no chat template.
    """
    tokenizer: PreTrainedTokenizerBase = fetch(AutoTokenizer.from_pretrained, model)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path={model.path}: its tokenizer has no end-of-sequence token")
    if model.chat_template is not None:
        tokenizer.chat_template = read_template(model.chat_template)
    if tokenizer.chat_template is None:
        log.info("%s has no chat template, using the default one (docs/method.md)", model.path)
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    if tokenizer.pad_token_id is None:
        log.info("%s has no pad token, padding with %s", model.path, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    _check_vocabulary(model, tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def read_template(given: str) -> str:
    """Return the text of the chat template that `model.chat_template` names or holds.

    Raises:
        UserError: there is no such file, or the text is no chat template.
    """
    path = template_path(given)
    key = "model.chat_template" if path is None else f"model.chat_template={given}"
    try:
        text = given if path is None else path.read_text(encoding="utf-8")
        names = variables(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{key} cannot be read ({one_line(error)}); give a .jinja file, or the text of a "
            "template"
        ) from error
    except TemplateError as error:
        raise UserError(f"{key} is not a template: {one_line(error)}") from error
    if "messages" not in names:
        raise UserError(f"{key} never reads messages, so every conversation would be the same text")
    return text


def _check_vocabulary(model: Model, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Refuse a tokenizer that does not belong to the model.

    Added tokens without an embedding are allowed (Gemma 3 1B has one), with a warning.

    Args:
        model: names the model in messages.
        tokenizer: with a pad token.
        num_rows: number of the model's embeddings.

    Raises:
        UserError: the base vocabulary has more tokens than there are embeddings, or the
            end-of-sequence or the pad token has no embedding.
    """
    ends = [int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)]
    if tokenizer.vocab_size > num_rows or max(ends) >= num_rows:
        raise UserError(
            f"model.path={model.path}: its tokenizer has {len(tokenizer)} tokens and its weights "
            f"{num_rows}; they do not belong together"
        )
    if len(tokenizer) > num_rows:
        spare = [str(tokenizer.decode([i])) for i in range(num_rows, len(tokenizer))]
        log.warning(
            "%s: %s of its tokenizer have no row in its embeddings; a text with one of them would "
            "be refused",
            model.path,
            ", ".join(spare[:3]) + (" and others" if len(spare) > 3 else ""),
        )


def check_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, data: Data) -> None:
    """Refuse pairs with a token that has no embedding.

    Raises:
        UserError: a pair has such a token.
    """
    num_rows = config.get_text_config().vocab_size
    if len(tokenizer) <= num_rows:
        return
    for rows in (data.train, data.held_out):
        for row in rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
            beyond = [i for ids in row.values() for i in ids if i >= num_rows]
            if beyond:
                token = tokenizer.convert_ids_to_tokens(beyond[0])
                raise UserError(
                    f"a pair holds the token {token}, which has no row in the model's embeddings; "
                    "take it out of the data"
                )


def warn_of_untrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of special tokens in the chat template, and of an EOS, that were never trained.

    Adapters do not train embeddings, so such a token would stay without meaning.
    """
    template = str(tokenizer.chat_template)
    ids = {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.content in template or index == tokenizer.eos_token_id
    }
    rows = model.get_input_embeddings().weight
    lengths = rows.detach().float().norm(dim=1)
    limit = UNTRAINED * lengths.median()
    untrained = [i for i in sorted(ids) if i < len(lengths) and lengths[i] <= limit]
    if untrained:
        log.warning(
            "the embeddings of %s are (nearly) zero: this base was never trained on them, and "
            "adapters cannot change that; take a model trained on its chat template, or train all "
            "weights (optimizer=galore, adamw)",
            ", ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in untrained),
        )
