"""Pairwise comparison of answers by a judge, and how far the judge can be believed."""
