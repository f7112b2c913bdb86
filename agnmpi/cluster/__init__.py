"""The ranks of a communicator: who serves, who trains, where they run."""
