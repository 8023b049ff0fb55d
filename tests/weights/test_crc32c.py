import google_crc32c
import numpy as np
import pytest

from medi3d.weights.crc32c import crc32c, masked_crc32c


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 63, 64, 65, 255, 4096, 4097, 1_000_003])
def test_checksums_are_those_of_the_compiled_package(length):
    content = np.random.default_rng(length).bytes(length)
    assert crc32c(content) == google_crc32c.value(content)


def test_the_published_check_value_and_a_changed_bit():
    assert crc32c(b"123456789") == 0xE3069283
    content = bytearray(10_000)
    whole = crc32c(bytes(content))
    content[5000] ^= 1
    assert crc32c(bytes(content)) != whole


def test_the_mask_is_tensorflows():
    # tsl/lib/hash/crc32c_test.cc: a masked checksum differs, and rotation and shift undo each other
    crc = crc32c(b"foo")
    rotated = (masked_crc32c(b"foo") - 0xA282EAD8) & 0xFFFFFFFF
    assert ((rotated >> 17 | rotated << 15) & 0xFFFFFFFF) == crc != masked_crc32c(b"foo")
