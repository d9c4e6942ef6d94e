"""The embedded tiny model: its weights, its tokenizer, and `make.py`, the script that made them."""
