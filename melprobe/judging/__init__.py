"""The verdict: what is asked of a matched pair, the evidence, and what it allows to be claimed."""
