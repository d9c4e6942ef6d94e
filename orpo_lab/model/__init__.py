"""From a folder or a hub name to a model that can be trained, and its tokenizer."""
