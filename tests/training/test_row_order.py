"""The order of the rows: of an epoch, and of windows in it."""

from promptkd.training.row_order import EpochOrder


def test_the_order_of_an_epoch_belongs_to_its_seed_alone():
    orders = set()
    for seed in range(4):
        for epoch in range(4):
            order = tuple(EpochOrder(32, seed, lambda epoch=epoch: epoch))
            assert sorted(order) == list(range(32))
            orders.add(order)
    assert len(orders) == 16  # with seed + epoch there would be 7


def test_the_epoch_is_asked_for_when_an_order_begins():
    epoch = 0
    order = EpochOrder(16, 0, lambda: epoch)
    first, again = list(order), list(order)
    epoch = 1
    assert first == again == list(EpochOrder(16, 0, lambda: 0))
    assert list(order) == list(EpochOrder(16, 0, lambda: 1)) != first


def test_a_window_is_given_once_per_micro_batch_and_what_fills_none_is_left_out():
    order = EpochOrder(7, 0, lambda: 0, window=3, repeats=2)
    given = list(order)
    assert len(order) == len(given) == 12
    assert given[:3] == given[3:6]
    assert given[6:9] == given[9:]
    assert len({*given}) == 6
    assert [*given[:3], *given[6:9]] == list(EpochOrder(7, 0, lambda: 0))[:6]  # windows cut the epoch's own order
    assert list(EpochOrder(4, 0, lambda: 0, window=2, shuffle=False)) == [0, 1, 2, 3]
