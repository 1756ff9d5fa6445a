"""The distributed side: the only folder that imports Ray."""
