"""The measurement measures: both rows, both sides. The bar itself is `make bench`'s to hold."""

from bench.dukpt import measure


def test_measuring_gives_a_row_for_each_cipher_with_its_rival() -> None:
    rows = measure(seconds=0.1)
    assert [("TDES" in str(row["name"]), "AES-128" in str(row["name"])) for row in rows] == [
        (True, False),
        (False, True),
    ]
    for row in rows:
        value, rival, ratio = row["value"], row["rival"], row["ratio"]
        assert isinstance(value, int)
        assert isinstance(rival, int)
        assert value > 0
        assert ratio == round(value / rival, 3) or abs(value / rival - float(str(ratio))) < 0.01
