"""The pages of `curate votes`: an annotator's, and the owner's."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from orpo_lab.curate.agreement import lines, measure
from orpo_lab.curate.guard import Guard
from orpo_lab.curate.links import OWNER, Links
from orpo_lab.curate.markdown import to_html
from orpo_lab.curate.voting import MAX_NOTE, VoteError, Voting
from orpo_lab.records.markdown import fenced
from orpo_lab.records.templates import environment

STATIC = {"page.css": "text/css", "vote.js": "text/javascript"}
# A note of 2000 characters has at most 12 bytes for each in JSON; the rest of a vote is small
MAX_BODY = 12 * MAX_NOTE + 2000
# A browser stays somebody's for so many days after the link was opened
COOKIE_DAYS = 90
# The owner's page is made anew every 30 seconds: its intervals rest on few resamples
NUM_RESAMPLES = 200
# What the page says of a choice: its name in a vote, the key, and the words
BUTTONS = (
    ("left", "1", "Answer 1 is better"),
    ("right", "2", "Answer 2 is better"),
    ("tie", "t", "Tie"),
    ("both_bad", "b", "Both bad"),
    ("skip", "s", "Skip"),
)


def build(voting: Voting, links: Links, names: Sequence[str] = ()) -> Starlette:
    """Return the application.

    Args:
        voting: what is voted on.
        links: who may come in.
        names: names of this machine that an address may have; see `Guard`.
    """
    pages = Pages(voting, links)
    routes = [
        Route("/", pages.annotator),
        Route("/pair", pages.pair),
        Route("/votes", pages.vote, methods=["POST"]),
        Route("/undo", pages.undo, methods=["POST"]),
        Route("/owner", pages.owner),
        Route("/enter/{token}", pages.enter),
        Route("/static/{name}", pages.static),
    ]
    # Answers other than pages are empty: they tell nothing, and browsers need no words for them
    handlers: dict[Any, Any] = {HTTPException: _say_nothing}
    guard = Middleware(Guard, links=links, names=names)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


class Pages:
    """The routes.

    Args:
        voting: what is voted on.
        links: who may come in.
    """

    def __init__(self, voting: Voting, links: Links) -> None:
        self._voting, self._links = voting, links
        templates = environment("orpo_lab.curate", "web")
        templates.filters |= {"markdown": _markdown, "text": _text}
        self._render = partial(_render, templates)

    def enter(self, request: Request) -> Response:
        """Give the browser the cookie of a link.

        The answer is a page that goes on by itself. A redirect would come without the cookie where
        the link was clicked on another site, since browsers count it as that site's.
        """
        token = request.path_params["token"]
        name = self._links.whose(token)
        if name is None:
            raise HTTPException(404)
        where = "/owner" if name == OWNER else "/"
        answer = self._render("enter.html.jinja", where=where)
        answer.set_cookie(
            self._links.owner_cookie if name == OWNER else self._links.cookie,
            token,
            max_age=COOKIE_DAYS * 86_400,
            httponly=True,
            samesite="strict",
        )
        return answer

    def annotator(self, request: Request) -> Response:
        """Return the page on which an annotator votes."""
        annotator = _annotator(request)
        return self._render(
            "vote.html.jinja",
            annotator=annotator,
            shelf=f"{self._links.cookie}_{annotator}",
            buttons=BUTTONS,
            max_note=MAX_NOTE,
            **self._next(annotator),
        )

    def pair(self, request: Request) -> Response:
        """Return the part of the page that changes: the next pair."""
        return self._render("pair.html.jinja", **self._next(_annotator(request)))

    def _next(self, annotator: str) -> dict[str, Any]:
        turn = self._voting.turn(annotator)
        return {"turn": turn, "pair": self._voting.show(turn.asked) if turn.asked else None}

    async def vote(self, request: Request) -> Response:
        """Keep a vote, and say whether it counts."""
        annotator, sent = await _read(request)
        try:
            counts = await run_in_threadpool(self._voting.take, annotator, sent)
        except VoteError as error:
            return JSONResponse({"reason": str(error)}, status_code=422)
        return JSONResponse({"counts": counts})

    async def undo(self, request: Request) -> Response:
        """Take back a vote."""
        annotator, sent = await _read(request)
        await run_in_threadpool(self._voting.undo, annotator, sent.get("vote"))
        return JSONResponse({})

    def owner(self, request: Request) -> Response:
        """Return the page of the owner: progress, and how far the annotators agree."""
        if not request.state.owner:
            raise HTTPException(404)
        store = self._voting.store
        found = measure(store.comparisons(), store.votes(), NUM_RESAMPLES)
        return self._render("owner.html.jinja", agreement=lines(found), **self._voting.progress())

    def static(self, request: Request) -> Response:
        """Return a file that the pages need."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404)
        content = (files("orpo_lab.curate") / "web" / name).read_bytes()
        return Response(content, media_type=STATIC[name])


def _annotator(request: Request) -> str:
    """Return who asks.

    Raises:
        HTTPException: it is the owner, whose link is not for voting.
    """
    if request.state.annotator is None:
        raise HTTPException(404)
    return request.state.annotator


async def _read(request: Request) -> tuple[str, dict[str, Any]]:
    """Return who has sent something, and what.

    Raises:
        HTTPException: it is too large or no JSON object, or the page was made for somebody else:
            another link was opened in the same browser since.
    """
    annotator = _annotator(request)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413)
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(422) from error
    if not isinstance(sent, dict):
        raise HTTPException(422)
    if sent.get("annotator") != annotator:
        raise HTTPException(409)
    return annotator, sent


def _markdown(text: str) -> Markup:
    """Return a text as harmless HTML."""
    return Markup(to_html(text))


def _text(message: Mapping[str, Any]) -> str:
    """Return what a message says, as Markdown; parts, tool calls and the like as their JSON."""
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    content = message.get("content")
    said = [content] if isinstance(content, str) else [_json(content)] if content else []
    return "\n\n".join([*said, *([_json(others)] if others else [])])


def _json(value: Any) -> str:
    return fenced(json.dumps(value, indent=1, ensure_ascii=False))


async def _say_nothing(_: Request, error: HTTPException) -> Response:
    return Response(status_code=error.status_code)


def _render(templates: jinja2.Environment, name: str, **context: Any) -> HTMLResponse:
    return HTMLResponse(templates.get_template(name).render(context))
