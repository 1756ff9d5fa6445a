"""The main job: prepare, score, reduce, certify, rescore."""
