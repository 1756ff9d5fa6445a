"""Provable generalization bounds for language models, computed from every training token."""
