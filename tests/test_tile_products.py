"""Products by tiles against products in fp64."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba import tile_products
from biomamba.layer import product, product_backward
from biomamba.tile_products import LONG, input_gradient, project, weight_gradient

SIZE = st.integers(1, 400)
FP32 = 4e-7  # 7 units in the last place of a sum in fp32


def error(found, left, right):
    """The largest distance of a number of `found` from left @ right in fp64, beyond its own rounding to `found`'s dtype,
    as a share of the sum of the magnitudes that were added: a sum may cancel, its terms' rounding does not."""
    left, right = left.double(), right.double()
    exact = left @ right
    own = torch.finfo(found.dtype).eps / 2 * exact.abs() if found.dtype == torch.bfloat16 else 0
    return float((((found.double() - exact).abs() - own) / (left.abs() @ right.abs()).clamp_min(1e-30)).max())


@settings(deadline=None, max_examples=40)
@given(rows=SIZE, inputs=SIZE, outputs=SIZE, apart=st.sampled_from([0, 3, 16]), kind=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_any_shape_is_the_product_in_fp64(rows, inputs, outputs, apart, kind, seed):
    draw = torch.Generator().manual_seed(seed)
    make = lambda n, m: torch.randn(n, m + apart, generator=draw)[:, :m]
    x, dy, w = make(rows, inputs).bfloat16(), make(rows, outputs).bfloat16(), make(outputs, inputs).to(kind)
    assert error(project(x, w), x, w.bfloat16().T) < FP32
    assert error(input_gradient(dy, w), dy, w.bfloat16()) < FP32
    dw = weight_gradient(dy, x)
    assert dw.dtype == torch.float32 and error(dw, dy.T, x) < FP32


@pytest.mark.parametrize("long", (LONG[1] + 1, 2 * LONG[0] + 5))
def test_all_parts_of_a_long_inner_axis_are_added(long):
    dy, x, w = torch.randn(long, 40).bfloat16(), torch.randn(long, 33).bfloat16(), torch.randn(long, 33)
    assert error(weight_gradient(dy, x), dy.T, x) < FP32
    for dtype in (torch.float32, torch.bfloat16):
        dx = input_gradient(dy.T.contiguous(), w, dtype)
        assert dx.dtype == dtype and error(dx, dy.T, w.bfloat16()) < FP32


def test_a_gradient_is_added_to_what_is_there():
    dy, x, there = torch.randn(90, 70).bfloat16(), torch.randn(90, 40).bfloat16(), torch.randn(70, 48)
    out = there.clone()[:, :40]
    found = weight_gradient(dy, x, out, on=True)
    assert found is out and torch.equal(out, there[:, :40] + weight_gradient(dy, x))


def test_a_projection_fills_its_place_alone():
    x, w, frame = torch.randn(70, 40).bfloat16(), torch.randn(50, 40), torch.full((70, 64), 7.0).bfloat16()
    assert project(x, w, frame[:, 3:53]).data_ptr() == frame[:, 3:].data_ptr()
    assert torch.equal(frame[:, 3:53], project(x, w)) and (frame[:, :3] == 7).all() and (frame[:, 53:] == 7).all()


def test_digits_depend_neither_on_threads_nor_on_other_rows():
    x, dy, w = torch.randn(300, 96).bfloat16(), torch.randn(300, 500).bfloat16(), torch.randn(500, 96)
    y, dx, dw, threads = project(x, w), input_gradient(dy, w), weight_gradient(dy, x), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(project(x, w), y) and torch.equal(input_gradient(dy, w), dx) and torch.equal(weight_gradient(dy, x), dw)
    finally: torch.set_num_threads(threads)
    assert torch.equal(project(x[70:], w), y[70:]) and torch.equal(input_gradient(dy[70:], w), dx[70:])


def test_a_nan_stays_in_its_row_and_column():
    x, w = torch.randn(65, 40).bfloat16(), torch.randn(70, 40)
    x[3, 39], w[69, 0] = float("nan"), float("inf")
    broken = ~project(x, w).isfinite()
    assert broken[3].all() and broken[:, 69].all()
    assert int(broken.sum()) == 65 + 70 - 1


def test_a_layer_multiplies_by_tiles(monkeypatch):
    monkeypatch.setattr(tile_products, "tiles", lambda: True)
    x, dy, w = torch.randn(2, 50, 64), torch.randn(2, 50, 96), torch.randn(96, 64)
    y, (dx, dw) = product(x, w, torch.bfloat16), product_backward(dy, x, w, torch.bfloat16)
    rows, back = x.bfloat16().flatten(0, 1), dy.bfloat16().flatten(0, 1)
    assert torch.equal(y.flatten(0, 1), project(rows, w)) and torch.equal(dx.flatten(0, 1).bfloat16(), input_gradient(back, w)) and torch.equal(dw, weight_gradient(back, rows))
    assert error(dx.flatten(0, 1).bfloat16(), back, w.bfloat16()) < FP32
