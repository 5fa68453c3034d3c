"""What an adapted model's modules need beside their forward: other libraries' wrappers, shards, hooks, stand-ins."""
