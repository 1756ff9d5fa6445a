"""What a run leaves on storage, on any filesystem that pyarrow knows."""
