"""Take the model of a finished run: `python -m orpo_lab export RUN [--merge] [--push org/name]`.

The folder that is written holds the adapter of the run, or a whole model (`--merge`, or if the run
trained all weights), with its tokenizer, chat template, generation settings, a model card and
`export.json`. transformers, vLLM and the converter of llama.cpp read it. Before the folder is in
place, the model is read from it and compared with the run (`check`): an export that does not
answer like its run is refused, and leaves nothing.
"""

import argparse
from pathlib import Path

from orpo_lab import environment
from orpo_lab.errors import UserError
from orpo_lab.export.place import check_free
from orpo_lab.stop import Stop
from orpo_lab.upstream import import_libraries

# The folder in the run folder that is written if --to names none
FOLDER = "export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help=f"a new folder (default: RUN/{FOLDER})"
    )
    parser.add_argument(
        "--merge", action="store_true", help="write a whole model, with the adapter merged in"
    )
    parser.add_argument(
        "--into",
        choices=("dequantized", "16bit"),
        help="base that the adapter of a quantized run is merged into: the numbers that it was "
        "trained on (the default), or the weights before they were quantized",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="precision of a whole model's weights (default: the narrower of its base's and the "
        "run's)",
    )
    parser.add_argument(
        "--base",
        metavar="ORG/NAME[@REVISION]",
        help="name on the hub of an adapter's base, if the run read the base from a folder",
    )
    parser.add_argument("--push", metavar="ORG/NAME", help="upload the export to the hub")
    parser.add_argument("--private", action="store_true", help="make the new repository private")


def run(options: argparse.Namespace) -> None:
    """Write the export, check it, put it in place, and upload it.

    Raises:
        UserError: the run or an argument is wrong, the disk is too full, the export does not answer
            like its run, or the hub does not take it.
        OSError: the folder cannot be written to.
        Stopped: a signal ended the export, of which nothing is left then.
    """
    target = options.to or options.run / FOLDER
    if target.is_symlink():
        # A rename would replace the link, and leave empty what the link points to
        target = target.resolve()
    check_free(target)
    if options.private and not options.push:
        raise UserError("--private is for --push; leave it out")
    environment.settle()
    environment.use_one_device(None)
    import_libraries()
    from orpo_lab.export import hub
    from orpo_lab.export.write import Order, write
    from orpo_lab.finished import FinishedRun

    if options.push:
        hub.check(options.push)
    finished = FinishedRun(options.run)
    order = Order.of(options, finished, target)
    print(order.words)
    with Stop().listening():
        for line in write(finished, order, target):
            print(line)
    print(f"export   {target}")
    if options.push:
        print(f"pushed   {hub.push(target, options.push, private=options.private)}")
