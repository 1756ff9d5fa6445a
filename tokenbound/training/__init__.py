"""Training of hypotheses that are meant to be short: the plain torch side, free of Ray."""
