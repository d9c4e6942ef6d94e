"""The dial of beta: all mixtures between the results of two runs that differ in beta alone."""
