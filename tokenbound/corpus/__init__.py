"""Sources to documents to token ids to windows to shards; the plan is pure, only readers touch storage."""
