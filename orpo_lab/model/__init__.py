"""Load a model that can be trained, and its tokenizer, from a folder or from the hub."""
