"""What is done to somebody else's model, and undone: its state, its blocks, its experts, its shards, its weights."""
