"""The embedded tiny model: weights, tokenizer, and `make.py`, the script that made both."""
