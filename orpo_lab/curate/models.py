"""Open the models that the user names: local ones, or those of an endpoint."""

import argparse

from orpo_lab import environment
from orpo_lab.config.checks import check
from orpo_lab.curate.ask import Answerer
from orpo_lab.errors import UserError
from orpo_lab.upstream import import_libraries

# Seconds
MAX_TIMEOUT = 86_400.0


def open_model(name: str, options: argparse.Namespace) -> Answerer:
    """Return the model of a name, by the options of `ask.add_arguments`.

    Raises:
        UserError: an option is out of range, there is no such model, or a local model cannot be
            loaded.
    """
    if options.endpoint is not None:
        from orpo_lab.curate.endpoint import Endpoint

        return Endpoint(
            name,
            options.endpoint,
            key_variable=options.key_variable,
            concurrency=options.concurrency,
            rate=options.rate,
            timeout=options.timeout,
            retries=options.retries,
        )
    environment.settle()
    environment.use_one_device(None)
    import_libraries()
    from orpo_lab.curate.local import Local  # imports torch, after the environment is settled

    return Local(name, options.revision, options.dtype, options.batch_size)


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that are out of range, before anything is loaded.

    Raises:
        UserError: an option is out of range.
    """
    try:
        check(options.batch_size > 0, f"--batch-size {options.batch_size} must be above 0")
        check(options.concurrency > 0, f"--concurrency {options.concurrency} must be above 0")
        check(options.rate is None or options.rate > 0, f"--rate {options.rate} must be above 0")
        is_in_range = 0 < options.timeout <= MAX_TIMEOUT
        check(is_in_range, f"--timeout {options.timeout:g} must be above 0, and a day at most")
        check(options.retries >= 0, f"--retries {options.retries} must not be negative")
    except ValueError as error:
        raise UserError(str(error)) from error
