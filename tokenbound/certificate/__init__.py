"""What is claimed, from what, and how anyone checks it."""
