"""Is one setting better than another? From run folders to a verdict and a report."""
