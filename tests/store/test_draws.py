"""The register of draws: each ordinal has one holder, whoever writes at once; repeats are free; growth pays once."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenbound.bounds.codes import elias_delta_bits
from tokenbound.demo import demo_certificate
from tokenbound.errors import InputError, MismatchError
from tokenbound.store import filesystem as files
from tokenbound.store.draws import Configuration, Register, shipped_draws
from tokenbound.store.run import sha256_hex

CORPUS = "a" * 64


def digest(name: str) -> str:
    return sha256_hex(name.encode())


def wanted(name: str, group: str = "group", evaluation: int | None = None) -> Configuration:
    return Configuration((digest(name),), digest(group), evaluation, {"name": name})


def test_configurations_are_counted_and_repeats_are_free(anywhere: str) -> None:
    register = Register(anywhere, [CORPUS])
    assert [register.assign(wanted(name)).ordinal for name in ("a", "b", "a", "c", "b")] == [1, 2, 1, 3, 2]
    again = Register(anywhere, [CORPUS])
    assert again.look_up(wanted("c")) == again.assign(wanted("c"))
    assert again.look_up(wanted("d")) is None
    assert again.check(wanted("d")) == 4
    assert again.look_up(wanted("d")) is None, "asking enters nothing"
    assert Register(anywhere, ["b" * 64]).assign(wanted("c")).ordinal == 1, "another corpus has a count of its own"


def test_a_number_below_the_registers_is_refused_with_the_cure(tmp_path: Path) -> None:
    register = Register(str(tmp_path), [CORPUS])
    for name in "abc":
        register.assign(wanted(name))
    with pytest.raises(InputError) as refused:
        register.assign(wanted("d"), 3)
    assert str(refused.value) == (
        f"what.bound.trial: 3 is below 4, the number of this configuration in the register of draws {register.uri}; "
        "set it to auto, or at least 4"
    )
    with pytest.raises(InputError, match="set it to auto, 2, or at least 4"):
        register.assign(wanted("b"), 1)
    assert register.assign(wanted("b"), 2).ordinal == 2
    assert register.assign(wanted("d"), 9).counted_by == "config"
    assert register.assign(wanted("d")).ordinal == 9
    assert register.assign(wanted("d"), 9).ordinal == 9
    assert register.assign(wanted("e")).ordinal == 10


def test_a_draw_from_a_grown_corpus_pays_for_all_before(tmp_path: Path) -> None:
    grown = [CORPUS, "b" * 64]
    Register(str(tmp_path), grown[:1]).assign(wanted("short"))
    register = Register(str(tmp_path), grown)
    assert register.assign(wanted("long")).ordinal == 2
    assert register.assign(wanted("short")).ordinal == 1, "what holds at all lengths was entered at an earlier one"
    earlier = Configuration((digest("short"), digest("short, longer now")), digest("group"))
    assert register.assign(earlier).ordinal == 1, "a holdout that grew is the same model on the same holdout"


def test_the_evaluations_of_a_growing_corpus_are_counted_too(tmp_path: Path) -> None:
    lengths = ["a" * 64, "b" * 64, "c" * 64]
    nights = [Register(str(tmp_path), lengths[: night + 1]) for night in range(3)]
    assert nights[0].evaluation() == 1
    assert [nights[0].assign(wanted(f"0 {m}", evaluation=1)).ordinal for m in "xy"] == [1, 2]
    assert nights[0].evaluation() == 1, "another model of the same night"
    assert nights[1].evaluation() == 2
    assert [nights[1].assign(wanted(f"1 {m}", evaluation=2)).ordinal for m in "xy"] == [1, 2], "their draw pays"
    other = nights[1].assign(wanted("another claim", "another group", 2))
    assert other.ordinal == 3
    by_hand = nights[1].assign(wanted("by hand"))
    assert by_hand.ordinal == 4
    assert [nights[2].assign(wanted(f"2 {m}", evaluation=3)).ordinal for m in "xyz"] == [1, 2, 5]
    with pytest.raises(InputError, match=r"what\.sample\.evaluation: 2 is below 3, .* set it to at least 3"):
        nights[2].assign(wanted("late", evaluation=2))


TRIES = st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.integers(0, 2))


@settings(max_examples=25, deadline=None)
@given(tries=st.lists(TRIES, max_size=12))
def test_no_more_than_delta_is_ever_spent(
    tmp_path_factory: pytest.TempPathFactory, tries: list[tuple[int, int, bool, int]]
) -> None:
    """Claims, models, nights and draws by hand in any order: the sum over all events of a failure stays below one."""
    cache, lengths = str(tmp_path_factory.mktemp("register")), [f"{night}" * 64 for night in range(4)]
    corpus, draws = dict[tuple[str, int], float](), dict[tuple[object, ...], float]()
    for night, model, nightly, claim in sorted(tries, key=lambda one: one[0]):
        register = Register(cache, lengths[: night + 1])
        evaluation = register.evaluation() if nightly else None
        name = f"{night} {model} {claim} {evaluation}"
        ordinal = register.assign(wanted(name, f"claim {claim}", evaluation)).ordinal
        weight = 2.0 ** -elias_delta_bits(ordinal)
        corpus[f"claim {claim}", ordinal] = weight
        draws[name, ordinal] = weight / (1 if evaluation is None else evaluation * (evaluation + 1))
    assert math.fsum(corpus.values()) <= 1
    assert math.fsum(draws.values()) <= 1


class Writers:
    """Some writers whose every read and write of the register is interleaved at random."""

    def __init__(self, seed: int, count: int, folder: Path) -> None:
        import threading

        self.random, self.turn = random.Random(seed), threading.Condition()
        self.waiting: set[int] = set()
        self.alive, self.next = set(range(count)), 0
        self.threading, self.found = threading, dict[int, int]()
        steps = {name: self.paced(getattr(Register, name)) for name in ("entries", "_write")}
        self.register = type("PacedRegister", (Register,), steps)
        threads = [threading.Thread(target=self.run, args=(number, folder)) for number in range(count)]
        self.names = {thread.name: number for number, thread in enumerate(threads)}
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(self.found) == count

    def paced(self, step):  # type: ignore[no-untyped-def]
        def wait_for_a_turn(*args):  # type: ignore[no-untyped-def]
            me = self.names[self.threading.current_thread().name]
            with self.turn:
                self.waiting.add(me)
                self.choose()
                self.turn.wait_for(lambda: self.next == me)
                self.waiting.discard(me)
                self.next = -1
                result = step(*args)
                return result

        return wait_for_a_turn

    def choose(self) -> None:
        """When everybody waits, or is done, one of those who wait goes on."""
        if self.waiting == self.alive and self.waiting:
            self.next = self.random.choice(sorted(self.waiting))
            self.turn.notify_all()

    def run(self, number: int, folder: Path) -> None:
        try:
            self.found[number] = self.register(str(folder), [CORPUS]).assign(wanted(f"{number % 3}")).ordinal
        finally:
            with self.turn:
                self.alive.discard(number)
                self.waiting.discard(number)
                self.choose()


@pytest.mark.parametrize("seed", range(40))
def test_writers_at_once_never_share_an_ordinal(seed: int, tmp_path: Path) -> None:
    """Four writers, two of them of the same configuration."""
    found = Writers(seed, 4, tmp_path).found
    holders: dict[int, set[int]] = defaultdict(set)
    for number, ordinal in found.items():
        holders[ordinal].add(number % 3)
    assert all(len(names) == 1 for names in holders.values()), found
    for number in range(3):
        assert Register(str(tmp_path), [CORPUS]).assign(wanted(f"{number}")).ordinal in found.values()


def test_a_writer_that_died_leaves_a_bid_that_harms_nobody(tmp_path: Path) -> None:
    register = Register(str(tmp_path), [CORPUS])
    register._write(1, wanted("dead"), "-00000000.bid")
    assert register.assign(wanted("alive")).ordinal == 2
    assert register.assign(wanted("dead")).ordinal == 1, "it goes on where it died"
    register._write(3, wanted("other"), "-00000000.bid")
    register._write(3, wanted("another"), "-00000000.bid")
    assert len({3, *(register.assign(wanted(name)).ordinal for name in ("other", "another"))}) == 3


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    register = Register(str(tmp_path), [CORPUS])
    register.assign(wanted("a"))
    filesystem, path = files.resolve(f"{register.uri}/notes.txt")
    files.write_bytes(filesystem, path, b"mine")
    with pytest.raises(MismatchError, match=r"notes\.txt is not an entry of the register"):
        register.assign(wanted("b"))


def test_a_register_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "draws").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"how\.cache: the register of draws .* cannot be written .* choose a cache"):
        Register(str(tmp_path), [CORPUS]).assign(wanted("a"))


def test_what_the_authors_tried_is_counted(tmp_path: Path) -> None:
    """The package's own artifacts were sampled on the corpus that its certificate names: fourteen before the demo."""
    shipped = shipped_draws()
    ours = demo_certificate().tokens_sha256
    assert sorted(shipped.values()) == [3, 3, 14]
    assert shipped[ours] == 14
    first = Register(str(tmp_path), [ours]).assign(wanted("demo"))
    assert (first.ordinal, first.shipped) == (15, 14)
    with pytest.raises(InputError, match="14 is below 16"):
        Register(str(tmp_path), [ours]).assign(wanted("mine"), 14)
