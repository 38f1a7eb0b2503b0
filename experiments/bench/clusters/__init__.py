"""Clusters of a bench's own, as processes of this machine."""
