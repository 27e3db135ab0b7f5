"""What the machine could reach at most: its matrix products, its memory, and the FLOPs that a token takes.

Limits are measured in the process of the row that they belong to, before and after it; the larger one counts.
"""
import time
from collections.abc import Callable

import torch

from biomamba.plan import linear_weights, scan_flops
from biomamba.recipe import Recipe

# The scan is counted as with chunks of 64 tokens, whatever chunk the code takes: C·Bᵀ and its product with x inside each chunk (whole
# squares), the state that a chunk adds, and what it reads from the state before it. Upstream's chunk of 256 would count a quarter more.
CHUNK = 64
SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 3352, 768), (1024, 768, 1536), (1024, 12288, 768))  # rows, columns, inner


def flops_per_token(
    recipe: Recipe,
    gradients: bool = True,  # forward and backward; False: forward alone
) -> int:
    "6 FLOPs (forward alone: 2) for each weight of a linear layer, the head included, and the scan's matrix products; no credit for recomputation."
    return (3 if gradients else 1) * (2 * linear_weights(recipe) + scan_flops(recipe, CHUNK))


def best_seconds(
    work: Callable[[], object],
    budget: float,  # seconds to spend
) -> float:
    "The fastest of as many calls as fit the budget, at least three."
    work()
    times, began = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < budget:
        start = time.perf_counter(); work()
        times.append(time.perf_counter() - start)
    return min(times)


def matrix_peak(
    dtype: torch.dtype,
    quick: bool = False,
) -> float:  # FLOPs a second
    "The fastest matrix product of this machine in a dtype, over several shapes, as a linear layer computes it; of bf16 at least that in fp32, which holds its numbers too."
    speeds = [matrix_peak(torch.float32, quick)] if dtype == torch.bfloat16 else []
    for n, m, k in ((64, 64, 64),) if quick else SHAPES:
        x, w = torch.randn(n, k, dtype=dtype), torch.randn(m, k, dtype=dtype)
        speeds.append(2 * n * m * k / best_seconds(lambda: torch.nn.functional.linear(x, w), 0.0 if quick else 0.4))
    return max(speeds)


def reads_per_second(
    size: int,  # bytes
    quick: bool = False,
) -> float:
    "How often a second the machine reads so many bytes: the faster of a sum and a matrix-vector product."
    block = torch.ones(size // 4 // 1024, 1024)
    vector, budget = torch.ones(1024), 0.0 if quick else 1.0
    return 1 / min(best_seconds(lambda: block.sum(), budget), best_seconds(lambda: block @ vector, budget))
