"""Typed configs: one YAML file per command, unknown keys refused."""
