from __future__ import annotations

import pytest
import torch

from secateur.blocks.precision import products_of_bfloat16
from secateur.runs.device import resolve_device, resolve_dtype
from secateur.runs.errors import SecateurError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:", "tpu:0", ""])
def test_unknown_devices_are_named(name: str) -> None:
    with pytest.raises(SecateurError, match="is no device"):
        resolve_device(name)


def test_missing_device_is_found_before_work_starts() -> None:
    with pytest.raises(SecateurError, match="There is no device cuda:99"):
        resolve_device("cuda:99")


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(SecateurError, match="float16 is no dtype"):
        resolve_dtype("float16", CPU)  # type: ignore[arg-type]


def test_products_of_bfloat16_values_are_exact_and_the_setting_is_restored() -> None:
    x = torch.randn(300, 64).bfloat16().float()
    before = x.T @ x
    with products_of_bfloat16(CPU):
        fast = x.T @ x
    exact = x.double().T @ x.double()
    torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(x.T @ x, before)
