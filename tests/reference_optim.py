"""The published equations of the optimisers in float64 NumPy, one entry at a time: nothing here comes from velora.

Legend: M rows, D columns, R rank. A matrix is a list of rows only where that makes the equation plainer.
"""

from __future__ import annotations

import math

import numpy as np


class ReferenceGaLore:
    """GaLore's algorithm 2 with AdamW for one M x D weight; `side` is "left", "right" or "full"."""

    def __init__(self, weight, *, rank, gap, scale, side, betas, eps, weight_decay):
        self.weight, self.rank, self.gap, self.scale, self.side = weight.copy(), rank, gap, scale, side
        self.betas, self.eps, self.weight_decay, self.step = betas, eps, weight_decay, 0
        self.left = self.right = self.first = self.second = None

    def update(self, gradient, lr, signs_like=(None, None)):
        """One step. A singular vector has no sign of its own: it is taken from `signs_like`, a (left, right) pair."""
        if self.step % self.gap == 0:
            self.refresh(gradient, signs_like)
        low = gradient
        low = low if self.left is None else self.left.T @ low
        low = low if self.right is None else low @ self.right.T
        if self.first is None:
            self.first, self.second = np.zeros_like(low), np.zeros_like(low)
        self.step += 1
        direction = np.zeros_like(low)
        beta1, beta2 = self.betas
        for i in range(low.shape[0]):
            for j in range(low.shape[1]):
                self.first[i, j] = beta1 * self.first[i, j] + (1 - beta1) * low[i, j]
                self.second[i, j] = beta2 * self.second[i, j] + (1 - beta2) * low[i, j] ** 2
                correction = math.sqrt(1 - beta2**self.step) / (1 - beta1**self.step)
                direction[i, j] = correction * self.first[i, j] / (math.sqrt(self.second[i, j]) + self.eps)
        direction = direction if self.left is None else self.left @ direction
        direction = direction if self.right is None else direction @ self.right
        self.weight = self.weight - lr * (self.scale * direction + self.weight_decay * self.weight)

    def refresh(self, gradient, signs_like):
        u, _, vt = np.linalg.svd(gradient)
        if self.side != "right":
            self.left = u[:, : self.rank]
            if signs_like[0] is not None:
                self.left = self.left * np.sign((self.left * signs_like[0]).sum(axis=0))
        if self.side != "left":
            self.right = vt[: self.rank]
            if signs_like[1] is not None:
                self.right = self.right * np.sign((self.right * signs_like[1]).sum(axis=1))[:, None]


class ReferenceQGaLore(ReferenceGaLore):
    """Q-GaLore: the projector rounded to four bits, and a gap that doubles where the mean of five cosines is at least 0.4."""

    def __init__(self, weight, **settings):
        super().__init__(weight, **settings)
        self.vector, self.cosines = None, []

    def refresh(self, gradient, signs_like):
        super().refresh(gradient, signs_like)
        new = self.left[:, 0] if self.side == "left" else self.right[0]
        if self.vector is not None:
            cosine = sum(a * b for a, b in zip(new, self.vector, strict=True))
            self.cosines.append(abs(cosine) / math.sqrt(sum(new**2) * sum(self.vector**2)))
            last = self.cosines[-5:]
            if len(last) == 5 and sum(last) / 5 >= 0.4:
                self.gap *= 2
        self.vector = new
        if self.left is not None:
            self.left = in_four_bits(self.left)
        if self.right is not None:
            self.right = in_four_bits(self.right)


def in_four_bits(matrix):
    """Groups of 256 in the order of the rows, each with 16 evenly spaced values that take in its extremes and zero."""
    flat = [float(x) for x in matrix.reshape(-1)]
    rounded = []
    for start in range(0, len(flat), 256):
        group = flat[start : start + 256]
        low, high = min(0.0, *group), max(0.0, *group)
        step = max(high - low, 1e-5) / 15
        zero = round(-low / step)
        rounded += [(min(max(round(x / step) + zero, 0), 15) - zero) * step for x in group]
    return np.array(rounded).reshape(matrix.shape)


class ReferenceFlora:
    """Adafactor for one M x D weight with FLoRA's momentum. `draw(seed)` is A (R x width), `advance(seed)` the next seed."""

    def __init__(self, weight, *, seed, draw, advance, beta1, kappa, sketched, eps, clip, decay, weight_decay, scaled):
        self.weight, self.seed, self.draw, self.advance = weight.copy(), seed, draw, advance
        self.beta1, self.kappa, self.sketched = beta1, kappa, sketched
        self.eps, self.clip, self.decay, self.weight_decay, self.scaled = eps, clip, decay, weight_decay, scaled
        rows, columns = weight.shape
        self.row, self.column, self.step, self.momentum = np.zeros(rows), np.zeros(columns), 0, None

    def down(self, full):
        wide = full.shape[0] < full.shape[1]
        return self.draw(self.seed) @ full if wide else full @ self.draw(self.seed).T

    def up(self, low):
        wide = self.weight.shape[0] < self.weight.shape[1]
        return self.draw(self.seed).T @ low if wide else low @ self.draw(self.seed)

    def update(self, gradient, lr):
        self.step += 1
        beta2 = 1 - self.step**self.decay
        rows, columns = gradient.shape
        for i in range(rows):
            mean = sum(gradient[i, j] ** 2 + self.eps[0] for j in range(columns)) / columns
            self.row[i] = beta2 * self.row[i] + (1 - beta2) * mean
        for j in range(columns):
            mean = sum(gradient[i, j] ** 2 + self.eps[0] for i in range(rows)) / rows
            self.column[j] = beta2 * self.column[j] + (1 - beta2) * mean
        update = np.zeros_like(gradient)
        for i in range(rows):
            for j in range(columns):
                update[i, j] = gradient[i, j] / math.sqrt(self.row[i] * self.column[j] / self.row.mean())
        if self.beta1 is not None:
            update = self.with_momentum(update)
        rms = math.sqrt((update**2).mean())
        update = update / max(1.0, rms / self.clip)
        if self.scaled:
            lr = lr * max(self.eps[1], math.sqrt((self.weight**2).mean()))
        self.weight = self.weight - lr * update - lr * self.weight_decay * self.weight

    def with_momentum(self, update):
        beta1 = self.beta1
        if self.momentum is None:
            self.momentum = np.zeros_like(self.down(update))
        past = self.up(self.momentum)
        if self.step % self.kappa == 0:
            self.seed = self.advance(self.seed)
            self.momentum = self.down(past)
        self.momentum = beta1 * self.momentum + (1 - beta1) * self.down(update)
        return self.up(self.momentum) if self.sketched == "all" else beta1 * past + (1 - beta1) * update


class ReferenceGrass:
    """Grass for one M x D weight, with P as the matrix of the paper. `rows` of None stands for the R largest norms.

    With `rows` given (what was drawn, for each refresh), the scales are those of the sampled selection.
    """

    def __init__(self, weight, *, rank, gap, scale, betas, eps, weight_decay):
        self.weight, self.rank, self.gap, self.scale = weight.copy(), rank, gap, scale
        self.betas, self.eps, self.weight_decay, self.step = betas, eps, weight_decay, 0

    def refresh(self, gradient, rows):
        norms = [math.sqrt(sum(entry**2 for entry in row)) for row in gradient]
        chosen = sorted(range(len(norms)), key=lambda i: -norms[i])[: self.rank] if rows is None else rows
        self.projector = np.zeros((len(norms), self.rank))  # P
        for k, i in enumerate(chosen):
            self.projector[i, k] = 1.0 if rows is None else 1 / math.sqrt(self.rank * norms[i] / sum(norms))
        self.first, self.second = np.zeros((self.rank, gradient.shape[1])), np.zeros((self.rank, gradient.shape[1]))
        self.age = 0

    def update(self, gradient, lr, rows=None):
        if self.step % self.gap == 0:
            self.refresh(gradient, rows)
        self.step, self.age = self.step + 1, self.age + 1
        low = self.projector.T @ gradient
        direction = np.zeros_like(low)
        beta1, beta2 = self.betas
        for i in range(low.shape[0]):
            for j in range(low.shape[1]):
                self.first[i, j] = beta1 * self.first[i, j] + (1 - beta1) * low[i, j]
                self.second[i, j] = beta2 * self.second[i, j] + (1 - beta2) * low[i, j] ** 2
                correction = math.sqrt(1 - beta2**self.age) / (1 - beta1**self.age)
                direction[i, j] = correction * self.first[i, j] / (math.sqrt(self.second[i, j]) + self.eps)
        self.weight = self.weight - lr * (self.scale * self.projector @ direction + self.weight_decay * self.weight)
