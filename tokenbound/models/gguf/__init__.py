"""Checkpoints of llama.cpp: the metadata of a GGUF file to a config of transformers, its tensors to a model's."""
