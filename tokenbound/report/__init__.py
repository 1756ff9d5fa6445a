"""Certificates for people: terminal, one-line rows, HTML."""
