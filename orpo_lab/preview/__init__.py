"""Look at preference data before training: rows as the model will see them, lengths, faults."""
