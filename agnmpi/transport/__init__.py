"""Transports: the ends of a worker and of a center, behind one contract (`base`)."""
