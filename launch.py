"""Run an experiment: `python launch.py [option ...]`, e.g. `launch.py optimizer=galore`."""

# Hydra's completion for fish looks for the text "@hydra.main" in this file
from orpo_lab.launch import main

if __name__ == "__main__":
    main()
