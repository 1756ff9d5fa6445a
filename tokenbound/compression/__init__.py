"""A checkpoint to an artifact whose bytes are the code length, and back."""
