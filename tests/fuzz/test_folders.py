"""A short run of the fuzzer; by hand it takes any number of mutants."""

from fuzz.folders import FAULTS, REFUSED, SAME, fuzz, table


def test_mutated_folders_are_refused_or_what_they_were(tmp_path):
    counts, faults = fuzz(tmp_path, 0, range(300))
    print(table(counts))
    assert not faults
    total = {
        result: sum(n for (_, found), n in counts.items() if found == result) for result in (REFUSED, SAME, *FAULTS)
    }
    assert total[REFUSED] > 150 and total[SAME] > 20
