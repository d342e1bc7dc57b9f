"""The book of orders, without an engine."""

from __future__ import annotations

import threading

from lora_diffusion.generation.request import Request
from lora_diffusion.serving.orders import Order, OrderBook

REQUEST = Request("a cat", "blurry", seed=1, steps=2, cfg=5.0, size=(32, 32))


def test_the_book_answers_while_it_is_found_out_what_can_be_drawn_together() -> None:
    book = OrderBook()
    first, second = Order((REQUEST, REQUEST)), Order((REQUEST,))
    client = threading.Thread(target=book.add, args=(second,), daemon=True)

    def key_of(_: Request) -> tuple[object, ...]:
        if client.ident is None:
            client.start()
            client.join(5)
            assert not client.is_alive(), "the book is locked"
        return ()

    book.add(first)
    assert [unit.order for unit in book.take(1, key_of)] == [first]
    assert [unit.order for unit in book.take(4, key_of)] == [second, first]
