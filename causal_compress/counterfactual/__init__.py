"""Counterfactuals: the nearest input of another class, made by a conditional GAN, and what its changes tell."""
