"""Models trained in a compressed form: layers with few parameters, and what turns an artifact of one into a model."""
