import logging
from typing import Any

import pytest

from orpo_lab.errors import one_line
from orpo_lab.redaction import RedactingFormatter, redact

# The shapes of tokens, none of them one
TOKENS = {
    "Hugging Face": "hf_" + "aB3" * 11,
    "W&B": "wandb_v1_" + "aB3_" * 10,
    "W&B of old": "0123456789abcdef" * 2 + "01234567",
    "GitHub": "ghp_" + "b4" * 18,
    "GitHub, fine-grained": "github_pat_" + "11A_b" * 12,
    "GitLab": "glpat-" + "x1_" * 8,
    "OpenAI": "sk-" + "aB3" * 16,
    "OpenAI, by project": "sk-proj-" + "aB-3" * 16,
    "Anthropic": "sk-ant-" + "aB-3" * 16,
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "Slack": "xoxb-" + "123456789012-abcdef",
    "Google": "AIza" + "aB3-_" * 7,
    "JWT": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0" + ".c2lnbmF0dXJl",
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("text", ["{}", "see {}!", "a_{}", "name={},seed=1", "/path/{}/x", "'{}'"])
def test_what_looks_like_a_token_is_masked_wherever_it_stands(token: str, text: str) -> None:
    nested = {"path": [text.format(token)], "deep": {"one": (text.format(token),)}}
    assert token not in str(redact(nested))
    assert "***" in str(redact(nested))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pass@host/x", "https://***@host/x"),
        ("https://me:p@ss@host/x", "https://***@host/x"),
        ("/here/https:/me:pass@host/x", "/here/https:/***@host/x"),
        ("s3://0123456789abcdef0123@host", "s3://***@host"),
        ("GET /x?a=1&token=abcdef&b=2", "GET /x?a=1&token=***&b=2"),
        ("WANDB_API_KEY=local-abcdef run", "WANDB_API_KEY=*** run"),
        ("{'password': 'abcdef'}", "{'password': '***'}"),
        ("my_secret_key = abcdef", "my_secret_key = ***"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer ***"),
    ],
)
def test_what_stands_where_a_secret_belongs_is_masked(text: str, masked: str) -> None:
    assert redact(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "org/name",
        "task-0123456789abcdefghijklmn",
        "sk-learn-pairs-binarized-v2",
        "rlhf_ultrafeedbackbinarized",
        "outputs/20261125-101112-tiny-qlora-beta0.1-constant",
        "the model has no pad token, padding with <|im_end|>",
        "https://host/x/y@main",
        "ssh://git@host/x",
        "dataset.max_new_tokens=1000000 num_tokens=123456",
        "a" * 64,
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_keys_say_what_is_secret_and_what_is_a_commit() -> None:
    commit = TOKENS["W&B of old"]
    values: dict[str, Any] = {"api_key": "abc", "hub.token": "abc", "password": None, "beta": 0.1}
    assert redact(values) == {"api_key": "***", "hub.token": "***", "password": None, "beta": 0.1}
    assert redact({"token": ["abc", "de"], "tags": ["abc"]}) == {
        "token": ["***"] * 2,
        "tags": ["abc"],
    }
    commits = {"git_commit": f"{commit} (modified)", "model": {"revision": commit}}
    assert redact(commits) == commits
    assert redact({"revision": TOKENS["GitHub"]}) == {"revision": "***"}


def test_the_values_of_secret_environment_variables_are_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "no shape at all")
    monkeypatch.setenv("HF_TOKEN", "no shape")
    monkeypatch.setenv("SHORT_TOKEN", "beta")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true-or-false")
    assert redact("a no shape at all b no shape c beta d true-or-false") == (
        "a *** b *** c beta d true-or-false"
    )


def test_messages_that_are_cut_are_masked_first() -> None:
    token = TOKENS["Hugging Face"]
    assert "hf_" not in one_line(ValueError(f"no\n{token}"))[:10]


def test_log_lines_are_masked_with_their_arguments_and_tracebacks() -> None:
    token = TOKENS["GitHub"]
    try:
        raise ValueError(token)
    except ValueError as error:
        record = logging.LogRecord("a", 20, "b", 1, "see %s", (token,), (ValueError, error, None))
    said = RedactingFormatter().format(record)
    assert token not in said
    assert "see ***" in said
