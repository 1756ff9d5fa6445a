"""What a run will cost and may show, before it is paid for."""
