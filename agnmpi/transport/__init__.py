"""How a commit travels."""
