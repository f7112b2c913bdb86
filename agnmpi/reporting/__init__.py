"""Reports for users: terminal, events, records, advice."""
