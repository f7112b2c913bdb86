"""Who drives a rank."""
