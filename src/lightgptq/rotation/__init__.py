"""Offline rotations folded into the weights: a plain model in, a plain model out that computes the same."""
