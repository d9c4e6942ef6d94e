"""Answers of an OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, OpenAI and others.

The package `openai` sends the requests. It tries again after 408, 409, 429, 5xx, a timeout and a
broken connection, with growing pauses, or after the pause that Retry-After asks for (up to two
minutes). A wrong key, model or address ends the step at once; any other failure is one request's,
and the next call of the step asks again.

The key comes from an environment variable, and is replaced by *** in all that comes back.
"""

import importlib
import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

import openai

from orpo_lab.curate.ask import Answer, Failure, Request
from orpo_lab.curate.folder import storable
from orpo_lab.errors import UserError, one_line
from orpo_lab.redaction import HIDDEN, MIN_LENGTH

# So many requests that fail one after the other end the step: the endpoint is down, or the account
# has nothing left
MAX_FAILED_IN_A_ROW = 20
URL_VARIABLE = "OPENAI_BASE_URL"
# The beginning of the names of the threads that send requests
THREADS = "endpoint"
# The package that sends bytes; which one it is depends on the version of openai
HTTPX: Any = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.split(".")[0])


class Endpoint:
    """A model of an endpoint, as an `Answerer`.

    Args:
        name: the model, as the endpoint calls it.
        url: the base URL; empty: that in the environment.
        url_option: where the user gives the URL, for messages.
        key_variable: the environment variable with the key; where it is not set, no key is sent
            that means anything.
        concurrency: the number of requests at a time.
        rate: the largest number of requests a minute, tries counted one by one; None: no limit.
        timeout: seconds until a reply must be whole.
        retries: further tries of a request.

    Raises:
        UserError: there is no URL, or the URL or the key holds what it should not.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        url_option: str = "--endpoint",
        key_variable: str,
        concurrency: int,
        rate: float | None,
        timeout: float,
        retries: int,
    ) -> None:
        url = check_url(url or os.environ.get(URL_VARIABLE, ""), url_option)
        self.name = name
        self.settings = {"model": name, "endpoint": url}
        self.found = {"openai": openai.__version__}
        self._concurrency = concurrency
        self._key = check_key(os.environ.get(key_variable, "").strip(), key_variable)
        self._key_variable = key_variable
        self._pace = Pace(rate)
        self._timeout, self._retries = timeout, retries

    def answer(
        self, requests: Sequence[Request], have: Collection[str]
    ) -> Iterator[list[tuple[Request, Answer | Failure]]]:
        """Yield each answer when it comes; see `Answerer`.

        Raises:
            UserError: the endpoint cannot be reached, knows neither key nor model, or has failed
                too many times in a row.
        """
        asked = [request for request in requests if request.id not in have]
        if not asked:
            return
        # Closed at the end, whatever the end is: requests on their way are broken off
        with self._connect() as client:
            # The first request goes alone and once: what is wrong with all of them shows at once
            first = self._ask(client.with_options(max_retries=0), asked[0], is_first=True)
            if isinstance(first, Answer):
                yield [(asked.pop(0), first)]
            pool = ThreadPoolExecutor(self._concurrency, THREADS)
            futures = {pool.submit(self._ask, client, one): one for one in asked}
            try:
                yield from self._collect(futures)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _connect(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.settings["endpoint"],
            api_key=self._key or "none",
            http_client=_Timely(self._timeout, event_hooks={"request": [self._pace.wait]}),
            timeout=self._timeout,
            max_retries=self._retries,
        )

    def _collect(
        self, futures: dict[Future[Answer | Failure], Request]
    ) -> Iterator[list[tuple[Request, Answer | Failure]]]:
        num_failed = 0
        for future in as_completed(futures):
            result = future.result()
            yield [(futures[future], result)]
            num_failed = num_failed + 1 if isinstance(result, Failure) else 0
            if isinstance(result, Failure) and num_failed == MAX_FAILED_IN_A_ROW:
                raise UserError(
                    f"{num_failed} requests to {self.settings['endpoint']} failed in a row, the "
                    f"last one since {result.reason}; the same command goes on"
                )

    def _ask(
        self, client: openai.OpenAI, request: Request, *, is_first: bool = False
    ) -> Answer | Failure:
        """Return the answer to a request.

        Raises:
            UserError: no other request would be answered either.
        """
        url = self.settings["endpoint"]
        try:
            reply = client.chat.completions.create(
                model=self.name,
                messages=request.messages,  # type: ignore[arg-type]
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=request.max_new_tokens,
                seed=request.seed,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            known = "is refused" if self._key else "is empty, and a key is asked for"
            raise UserError(
                f"{url}: the key in {self._key_variable} {known}: {self._said(error)}"
            ) from None
        except openai.NotFoundError as error:
            raise UserError(
                f"{url} has no model {self.name}, or no chat completions (most base URLs end in "
                f"/v1): {self._said(error)}"
            ) from None
        except openai.APITimeoutError:
            return Failure(f"the endpoint did not answer in time ({self._timeout:g} s)")
        except openai.APIConnectionError as error:
            why = self._said(error.__cause__ or error)
            # By its name: which package the class comes from depends on the version of openai
            if is_first and type(error.__cause__).__name__ == "ConnectError":
                raise UserError(f"{url} cannot be reached: {why}") from None
            return Failure(f"the connection broke: {why}")
        except openai.APIError as error:
            return Failure(f"the endpoint said: {self._said(error)}")
        # A reply may be nested too deeply for the reader of JSON
        except (ValueError, RecursionError):
            return Failure("the reply is not JSON")
        return self._read(reply)

    def _read(self, reply: Any) -> Answer | Failure:
        try:
            choice = reply.choices[0]
            text, reason = choice.message.content, choice.finish_reason
            num_tokens = reply.usage.completion_tokens if reply.usage else None
        except (AttributeError, LookupError, TypeError):
            return Failure("the reply is no chat completion")
        reason = self._clean(str(reason))
        if not isinstance(text, str) or not text.strip():
            return Failure(f"the answer is empty (finish_reason: {reason})")
        # The package checks no types
        known = num_tokens if isinstance(num_tokens, int) else None
        return Answer(self._clean(text).strip(), reason, known)

    def _said(self, error: BaseException) -> str:
        return one_line(self._clean(str(error)))[:300]

    def _clean(self, text: str) -> str:
        """Return what came back without the key, as text that a file can hold."""
        text = storable(text)
        # Servers without keys are sent any word, such as EMPTY, which an answer may hold
        return text.replace(self._key, HIDDEN) if len(self._key) >= MIN_LENGTH else text


class _Timely(openai.DefaultHttpxClient):
    """Breaks a reply off that is not whole in time.

    The timeouts of httpx are for each read: a byte now and then passes all of them.

    Args:
        seconds: the longest time from a request to the end of its reply.
        options: those of httpx's client.
    """

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._seconds = seconds

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Return the reply, which is read already; the package asks for no streams."""
        end = time.monotonic() + self._seconds
        reply = super().send(request, stream=True, **options)
        parts = []
        try:
            for part in reply.iter_raw():
                parts.append(part)
                if time.monotonic() > end:
                    raise HTTPX.ReadTimeout("the reply came too slowly", request=request)
        finally:
            reply.close()
        return type(reply)(
            reply.status_code, headers=reply.headers, content=b"".join(parts), request=request
        )


def check_url(url: str, option: str = "--endpoint") -> str:
    """Return a base URL without a slash at its end.

    Raises:
        UserError: there is none, or it holds a name, a password or a query, which would be recorded
            with every answer.
    """
    if not url:
        raise UserError(f"{option} needs a URL, or {URL_VARIABLE} in the environment")
    try:
        # The client's own reader: that of Python takes addresses which the client refuses
        HTTPX.URL(url)
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
        is_url = parts.scheme in ("http", "https") and has_host
    except (HTTPX.InvalidURL, ValueError):
        is_url = False
    if not is_url:
        raise UserError(f"{option} must be a URL such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"{option} must not hold a name, a password or a query, which every answer would "
            "record; put the key in an environment variable, and name that with --key-variable "
            "(judge.key_variable)"
        )
    return url.rstrip("/")


def check_key(key: str, variable: str) -> str:
    """Return a key.

    Raises:
        UserError: the key holds what the header of a request cannot hold.
    """
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"the key in {variable} holds a line break or another character that no key has; copy "
            "the key once more"
        )
    return key


class Pace:
    """Spaces requests evenly, over all threads.

    Args:
        rate: requests a minute; None: no limit.
    """

    def __init__(self, rate: float | None) -> None:
        self._gap = 60 / rate if rate else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, request: object = None) -> None:
        """Wait until the next request may be sent; the request itself is not read."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._gap
        time.sleep(start - now)
