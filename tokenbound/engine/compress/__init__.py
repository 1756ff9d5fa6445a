"""A checkpoint becomes an artifact: calibration, rate search, encoding."""
