"""Answers of a local model: a model folder, a hub name, or the result of a run.

The randomness of an answer is its own: one number in [0, 1) for every token, drawn from the
request's seed. The token is the one at which the summed probabilities, in the order of the
vocabulary, pass that number. So an answer does not depend on the order of the requests, and on the
other requests of its batch only through rounding. A batch is a fixed block of the requests. So
what is answered after an interruption is, on the same machine, bit for bit what would have been
answered without.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from orpo_lab import api
from orpo_lab.config import Config
from orpo_lab.config.optimizer import Lora
from orpo_lab.curate.ask import Answer, Failure, Request
from orpo_lab.data import template
from orpo_lab.errors import one_line
from orpo_lab.evaluate import Choose, answer, turn_ends
from orpo_lab.finished import read_config
from orpo_lab.model.precision import resolve_device, resolve_dtype
from orpo_lab.model.source import load_config
from orpo_lab.model.start import origin_of
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.model.weights import fingerprint


class Local:
    """A model on this machine, as an `Answerer`.

    Args:
        name: a run folder, a model folder or a hub name.
        revision: of a model of the hub; None: its default branch.
        dtype: auto, bf16, fp16 or fp32.
        batch_size: how many answers are written at a time.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """

    def __init__(self, name: str, revision: str | None, dtype: str, batch_size: int) -> None:
        self.name = name
        self.settings = {"model": name, "revision": revision, "dtype": dtype}
        self._batch_size = batch_size
        self._on = resolve_device()
        if dtype == "auto":
            dtype = "bf16" if self._on.type == "cuda" else "fp32"
        self._dtype = resolve_dtype(dtype, self._on)
        config = _config_of(name, revision, dtype)
        self._template_kwargs = config.dataset.template_kwargs
        origin = origin_of(config)
        own = load_config(origin.base.model)
        self._tokenizer = load_tokenizer(origin.config.model, own)
        origin.check_tokenizer(self._tokenizer)
        if not template.is_own(self._tokenizer):
            print(f"{name} has no chat template of its own, the default one is used")
        self._network = origin.load_as_left(self._tokenizer, self._dtype).eval()
        self._ends = turn_ends(self._network, self._tokenizer, self._template_kwargs)
        self._context = getattr(own.get_text_config(), "max_position_embeddings", None)
        self.found = {
            "weights": fingerprint(self._network)[:16],
            "precision": str(self._dtype).removeprefix("torch."),
            "device": self._on.type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if self._template_kwargs:
            self.found["template_kwargs"] = dict(self._template_kwargs)

    def answer(
        self, requests: Sequence[Request], have: Collection[str]
    ) -> Iterator[list[tuple[Request, Answer | Failure]]]:
        """Yield the answers of each block of requests; see `Answerer`."""
        for start in range(0, len(requests), self._batch_size):
            block = requests[start : start + self._batch_size]
            if all(request.id in have for request in block):
                continue
            found = zip(block, self._of_block(block), strict=True)
            yield [(request, one) for request, one in found if request.id not in have]

    def _of_block(self, block: Sequence[Request]) -> list[Answer | Failure]:
        prompts: dict[int, list[int]] = {}
        results: dict[int, Answer | Failure] = {}
        for number, request in enumerate(block):
            ids = self._encode(request)
            if isinstance(ids, Failure):
                results[number] = ids
            else:
                prompts[number] = ids
        if prompts:
            results |= self._generate(prompts, block)
        return [results[number] for number in range(len(block))]

    def _encode(self, request: Request) -> list[int] | Failure:
        """Return the token ids of a conversation and the generation prompt, or what is wrong."""
        try:
            text = template.apply(
                self._tokenizer, request.messages, self._template_kwargs, ask=True
            )
        except template.REFUSALS as error:
            return Failure(f"the chat template refuses the prompt: {one_line(error)[:200]}")
        # What is longer than the context is said below, for people
        ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if self._context is not None and len(ids) + request.max_new_tokens > self._context:
            return Failure(
                f"the prompt's tokens and --max-new-tokens {request.max_new_tokens} are more than "
                f"the model's context of {self._context}"
            )
        return ids

    def _generate(
        self, prompts: dict[int, list[int]], block: Sequence[Request]
    ) -> dict[int, Answer]:
        limit = block[0].max_new_tokens
        with (
            torch.no_grad(),
            torch.autocast(self._on.type, self._dtype, enabled=self._dtype != torch.float32),
        ):
            written = answer(
                self._network,
                self._tokenizer,
                prompts,
                limit,
                self._ends,
                choose_by(block, limit, self._on),
            )
        return {number: self._answer(ids, limit) for number, ids in written.items()}

    def _answer(self, ids: list[int], limit: int) -> Answer:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        # Without a token that ends the answer, the answer is as long as it may be
        return Answer(text.strip(), "length" if len(ids) == limit else "stop", len(ids))


def _config_of(name: str, revision: str | None, dtype: str) -> Config:
    """Return the configuration of a run that would begin with the model.

    The weights are stored in the precision of the arithmetic, as under an adapter; nothing is
    trained.
    """
    loaded = api.compose("optimizer=lora", "quantization=none").config
    folder = Path(name)
    if not (folder / "config.yaml").is_file():
        model = replace(loaded.model, path=name, revision=revision, dtype=dtype)
        return replace(loaded, model=model)
    run = read_config(folder)
    if isinstance(run.optimizer, Lora):
        return replace(run, start_from=str(folder.resolve()))
    model = replace(loaded.model, path=str(folder / "final"), dtype=dtype)
    return replace(loaded, model=model)


def choose_by(requests: Sequence[Request], limit: int, on: torch.device) -> Choose:
    """Return the function that chooses the next tokens of answers of at most `limit` tokens."""
    # In fp32: the largest number is so far below 1 that its products below never round to 1
    uniforms = np.stack(
        [np.random.default_rng(one.seed).random(limit, np.float32) for one in requests]
    )
    draws, temperatures, top_ps = (
        torch.tensor(values, dtype=torch.float64, device=on)
        for values in (
            uniforms,
            [request.temperature for request in requests],
            [request.top_p for request in requests],
        )
    )

    def choose(numbers: list[int], position: int, logits: Tensor) -> Tensor:
        return sample(logits, temperatures[numbers], top_ps[numbers], draws[numbers, position])

    return choose


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Return the tokens at which the summed probabilities pass given numbers, [B].

    The smallest token k with P(token <= k) > u, where P is softmax(logits / temperature) on its
    most likely tokens whose probabilities reach `top_p`, and 0 elsewhere.

    Args:
        logits: [B, V].
        temperature: [B]; 0: the token with the largest logit.
        top_p: [B], in (0, 1].
        uniform: [B], in [0, 1).
    """
    greedy = temperature == 0
    scaled = logits.double() / torch.where(greedy, 1.0, temperature)[:, None]
    probabilities = scaled.softmax(-1)
    if (top_p < 1).any():
        probabilities = _most_likely(probabilities, top_p)
    summed = probabilities.cumsum(-1)
    chosen = torch.searchsorted(summed, (uniform * summed[:, -1])[:, None], right=True)[:, 0]
    return torch.where(greedy, logits.argmax(-1), chosen)


def _most_likely(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Return the probabilities, with 0 for tokens beyond the most likely that reach `top_p`."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    # A token stays if those before it do not reach top_p yet; so the first one always stays
    keeps = ordered.cumsum(-1) - ordered < top_p[:, None]
    return torch.zeros_like(probabilities).scatter_(1, order, ordered * keeps)
