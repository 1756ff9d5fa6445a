"""The Ray session, maps over it, its metrics and progress."""
