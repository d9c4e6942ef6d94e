"""Serve the page on which people compare two answers: `curate votes FOLDER --annotators ann,ben`.

The command prints a link for each annotator and a link for the owner, and serves until it is
stopped. It may be stopped, or killed, at any time: a vote that the page has called saved is on the
disk, and every other vote is sent again.
"""

import argparse
import ipaddress
import socket
from pathlib import Path

import uvicorn

from orpo_lab.curate.folder import VOTES
from orpo_lab.curate.links import OWNER, Links, read_names
from orpo_lab.curate.page import build
from orpo_lab.curate.store import Store
from orpo_lab.curate.voting import Voting
from orpo_lab.errors import UserError, one_line

DEFAULT_VOTES_PER_PAIR = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the step to a parser."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the curation")
    parser.add_argument(
        "--annotators",
        metavar="NAMES",
        help="who votes, such as ann,ben; each gets a link (default: those of the last time)",
    )
    parser.add_argument(
        "--votes-per-pair",
        type=int,
        metavar="N",
        help=f"how many annotators see each pair (default: {DEFAULT_VOTES_PER_PAIR}, or all)",
    )
    parser.add_argument(
        "--repeats",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of pairs that an annotator sees twice, for self-agreement (default: 0.1)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="the port (default: 8000; 0: any)")


def run(options: argparse.Namespace) -> None:
    """Serve the page until somebody stops it.

    Raises:
        UserError: there is nothing to vote on, an argument is out of range, or the address cannot
            be listened on.
    """
    annotators = _annotators(options)
    voting = Voting(
        options.folder, annotators, _votes_per_pair(options, annotators), _repeats(options)
    )
    links = Links(options.folder, annotators)
    listening = _listen(options.host, options.port)
    print("\n".join(_greeting(voting, links, options.host, listening.getsockname()[1])), flush=True)
    config = uvicorn.Config(
        build(voting, links, names=[options.host]),
        # The address of a link holds a token: no request is logged
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _annotators(options: argparse.Namespace) -> list[str]:
    if options.annotators is not None:
        return read_names(options.annotators)
    is_new = not (options.folder / VOTES).is_file()
    known = set() if is_new else {one.annotator for one in Store(options.folder).assignments()}
    if not known:
        raise UserError("nobody votes yet; say who does: --annotators ann,ben")
    return sorted(known)


def _votes_per_pair(options: argparse.Namespace, annotators: list[str]) -> int:
    if options.votes_per_pair is None:
        return min(DEFAULT_VOTES_PER_PAIR, len(annotators))
    if not 1 <= options.votes_per_pair <= len(annotators):
        raise UserError(
            f"--votes-per-pair={options.votes_per_pair} must be from 1 to {len(annotators)}, the "
            "number of annotators"
        )
    return options.votes_per_pair


def _repeats(options: argparse.Namespace) -> float:
    if not 0 <= options.repeats <= 0.5:
        raise UserError(f"--repeats={options.repeats} must be from 0 to 0.5, such as 0.1")
    return options.repeats


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UserError(f"--port={port} must be from 0 to 65535, such as 8000")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port} cannot be listened on: {one_line(error)}; choose another"
        ) from error


def _greeting(voting: Voting, links: Links, host: str, port: int) -> list[str]:
    """Return the lines that the command prints: the counts, a warning, and the links."""
    progress = voting.progress()
    paths = links.paths()
    width = max(map(len, paths))
    lines = [
        f"{progress['num_comparisons']} pairs, {len(paths) - 1} annotators, "
        f"{progress['num_votes']} votes so far. Give each annotator their link, and nobody else:"
    ]
    lines += [f"  {name:{width}}  {_address(host, port)}{path}" for name, path in paths.items()]
    lines.append(f"The link of {OWNER} shows progress and agreement. Ctrl+C ends; votes stay.")
    if not _is_local(host):
        lines.append(
            f"WARNING: --host={host} lets other machines in, over plain HTTP: who reads along on "
            "the network reads the links; an ssh tunnel to 127.0.0.1 is safer"
        )
    return lines


def _address(host: str, port: int) -> str:
    # Nobody can open 0.0.0.0 or ::, which mean all addresses of this machine
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
