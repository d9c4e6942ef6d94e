"""What stands before every route of the page: who may ask, and what every answer says."""

import ipaddress
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orpo_lab.curate.links import OWNER, Links

# Only our own script and style run, nothing is loaded from elsewhere, and nobody may frame the page
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Links of an answer are not looked up before somebody follows them
    "X-DNS-Prefetch-Control": "off",
}


class Guard:
    """Answer only those who came in by a link; everybody else gets an empty 404.

    What passes has `state.annotator` and `state.owner`: the name of the annotator, or None, and
    whether the owner asks.

    Args:
        app: what is guarded.
        links: the tokens.
        names: names of this machine, besides localhost and IP addresses, that an address may have.
    """

    def __init__(self, app: ASGIApp, links: Links, names: Sequence[str] = ()) -> None:
        self._app, self._links = app, links
        self._names = {name.lower() for name in ("localhost", socket.gethostname(), *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            return
        refusal = self._refusal(Request(scope))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self._app if refusal is None else Response(status_code=refusal)
        await answer(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> int | None:
        """Return the status with which a request is refused; None where it may pass."""
        # A page of a stranger whose name resolves to this machine would otherwise be asked for
        # under that name, and could read the answer
        if not self._is_ours(request.headers.get("host", "")):
            return 421
        if request.method not in ("GET", "HEAD") and not _is_from_the_page(request.headers):
            return 403
        annotator = self._links.whose(request.cookies.get(self._links.cookie, ""))
        owner = self._links.whose(request.cookies.get(self._links.owner_cookie, ""))
        request.state.annotator = None if annotator == OWNER else annotator
        request.state.owner = owner == OWNER
        if request.state.annotator or request.state.owner:
            return None
        return None if request.url.path.startswith("/enter/") else 404

    def _is_ours(self, host: str) -> bool:
        name = host.lower().rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in self._names
        return True


def _is_from_the_page(headers: Headers) -> bool:
    """Return whether a request that changes something comes from the page itself.

    A form of another page cannot send JSON, and a script of another page names its own origin.
    """
    origins = {f"{scheme}://{headers.get('host', '')}" for scheme in ("http", "https")}
    return (
        headers.get("origin") in origins
        and headers.get("content-type", "").partition(";")[0].strip() == "application/json"
    )
