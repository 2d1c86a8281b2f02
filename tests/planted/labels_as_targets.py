"""A targeted attack that is handed the labels for its targets: every image that is right has
reached its target at once and comes back as it was."""

import torch
from torch.nn import functional as F


def towards_labels(access, x, y, threat, rng):
    """BIM that descends to its target and leaves alone what is there."""
    current, eps = x, float(threat.eps)
    for _ in range(10):
        leaf = current.clone().requires_grad_()
        scores = access(leaf)
        gradient = torch.autograd.grad(F.cross_entropy(scores, y, reduction="sum"), leaf)[0]
        moved = (current - eps / 4 * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        there = scores.argmax(dim=1) == y
        current = torch.where(there.view(-1, 1, 1, 1), current, moved)
    return current
