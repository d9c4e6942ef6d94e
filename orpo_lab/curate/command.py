"""Make a preference data set of one's own: `python -m orpo_lab curate STEP FOLDER ...`.

The steps work on one folder (orpo_lab/curate/folder.py), and each goes on where it was interrupted.
"""

# For each step the module with its `add_arguments` and `run`, and what the step does. A module is
# imported only when its step is called; most modules need packages of the extra `curate`
STEPS = {
    "prompts": ("orpo_lab.curate.prompts", "take prompts from files, and warn of near-duplicates"),
    "candidates": ("orpo_lab.curate.candidates", "have a model or an endpoint answer the prompts"),
    "votes": ("orpo_lab.curate.server", "serve the page on which people compare two answers"),
    "judge": ("orpo_lab.curate.judge", "have an LLM vote as one more annotator"),
    "agreement": ("orpo_lab.curate.agreement", "say how far the annotators agree"),
    "pairs": ("orpo_lab.curate.pairs", "write pairs.jsonl and its data card"),
}
