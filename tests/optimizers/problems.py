"""Small optimization problems that the tests of the optimizers share."""

import torch


def random_problem(shapes, *, num_steps, dtype=torch.float64, seed=0):
    """Return parameters, and for each step one gradient for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]
    rows = [
        [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes] for _ in range(num_steps)
    ]
    return params, rows


def run(optimizer, params, rows):
    """Step once for each row of gradients."""
    for row in rows:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def apple_in_double(param, gradients, *, lr, betas, alpha, beta3_warmup, alpha_warmup, eps, weight_decay):
    """The equations, one line each, for one parameter: what every path is held against."""
    import math

    b1, b2, b3_end = betas
    p = param.double().clone()
    m1, m2, nu = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)

    def f(beta):
        return math.log(0.5) / math.log(beta + 1e-8) - 1

    for t, g in enumerate(gradients, start=1):
        g = g.double()
        a = alpha if not alpha_warmup or t >= alpha_warmup else t / alpha_warmup * alpha
        b3 = b3_end
        if beta3_warmup and t < beta3_warmup:
            x = t / beta3_warmup
            b3 = 0.5 ** (1 / ((1 - x) * f(b1) + x * f(b3_end) + 1))
        m1 = b1 * m1 + (1 - b1) * g
        m2 = b3 * m2 + (1 - b3) * g
        nu = b2 * nu + (1 - b2) * g * g
        update = (m1 / (1 - b1**t) + a * m2) / (nu.sqrt() / math.sqrt(1 - b2**t) + eps)
        p = p - lr * (update + weight_decay * p)
    return p, m2
