"""A preference data set of one's own: prompts -> candidates -> votes -> agreement -> pairs."""
