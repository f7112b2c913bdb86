"""Loops of your own: the optimizer that they call, and its sessions."""
