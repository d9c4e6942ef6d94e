"""Will it fit, and how long will it take? Memory and time of a run by part, without its weights."""
