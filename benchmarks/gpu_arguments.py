"""The command line of the benchmarks for a GPU: nothing, or `--small` to check them elsewhere."""

import argparse

import torch


def device_and_size(description: str) -> tuple[str, bool]:
    """Read the command line; return the device, and whether to measure a small case.

    Without a GPU only a small case is measured.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="a small case, on any device")
    small = parser.parse_args().small
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not small:
        parser.error("no GPU here; --small checks the script without one")
    return device, small


def name_of(device: str) -> str:
    """Return the name of the GPU, or cpu."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"
