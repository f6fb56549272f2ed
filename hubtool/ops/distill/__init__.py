"""Distilling: what two pipelines differ in besides the weights that an extraction takes, above all the tokens of the tuned one."""
