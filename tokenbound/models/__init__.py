"""A checkpoint or an artifact becomes a replica; a replica turns token windows into losses, entropies and ranks."""
