"""Training, and what is fitted on a finished model."""
