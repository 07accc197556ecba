"""FELRec at scale: data, model, training and evaluation. Start with ``training/step.py``."""
