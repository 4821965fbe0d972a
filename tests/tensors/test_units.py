"""Sizes as users write them, and numbers as people read them."""

import pytest

from ota_kernels.errors import RecipeError
from ota_kernels.sizes import format_bytes, format_count, format_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("1000000", 10**6),
        (1000000, 10**6),
        ("1", 1),
        ("7B", 7),
        ("3kB", 3000),
        ("3KiB", 3 * 2**10),
        ("2TB", 2 * 10**12),
        ("2TiB", 2**41),
        ("1PB", 10**15),
        ("1PiB", 2**50),
        ("0.1GB", 10**8),
        ("0.0015kB", 1),
        (" 5 gb ", 5 * 10**9),
        ("5GIB", 5 * 2**30),
    ],
)
def test_parse_size_reads(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-5GB",
        "0",
        "0GB",
        "0.0001kB",
        "5 potatoes",
        "5G",
        "1e9",
        ".5GB",
        "5.GB",
        "1,5GB",
        "1_000",
        "nan",
        "\N{ARABIC-INDIC DIGIT FIVE}GB",
        "9" * 5000,
        0,
        -1,
        True,
        1.5,
        None,
    ],
)
def test_parse_size_names_what_it_refuses_and_shows_an_example(text):
    with pytest.raises(RecipeError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert "5GB" in str(caught.value)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (34_100_000_000, "34.1 GB"),
        (2 * 10**12, "2.0 TB"),
        (5 * 10**18, "5000.0 PB"),
    ],
)
def test_format_bytes(n, text):
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1500, "1.5 K"),
        (248_054_784, "248.1 M"),
        (7_241_732_096, "7.2 B"),
        (405 * 10**9, "405.0 B"),
    ],
)
def test_format_count(n, text):
    assert format_count(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.388, "0.39 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125.2, "2 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
