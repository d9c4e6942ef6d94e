"""A module for each family of faults, with a function `faults`."""
