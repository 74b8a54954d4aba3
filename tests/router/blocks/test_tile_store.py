"""Tiles: asked once for all that wait, from a worker that still has them, and gone when encoded."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from support.fake_runner import fake_image

from vlmserve.models.batch import ImageRef, ImageTiles
from vlmserve.router.blocks.image_pool import ImageKey, ImagePool
from vlmserve.router.blocks.tile_store import TileStore
from vlmserve.router.errors import MalformedFrameError
from vlmserve.router.messages import AddRequest, ImagePiece, NeedImage


@dataclass(eq=False)
class Answer:
    """An answer of a worker's request about pictures of these names."""

    worker_id: int
    request: AddRequest
    lacking: set[ImageKey] = field(default_factory=set)

    @property
    def image_keys(self) -> list[ImageKey]:
        return [ImageKey.of(image, self.request.tenant) for image in self.request.images]


def answer(worker_id: int, request_id: str, *names: str, tenant: str = "") -> Answer:
    images: list[ImageRef] = [fake_image(name, 2).ref for name in names]
    return Answer(
        worker_id,
        AddRequest(
            request_id=request_id, prompt_token_ids=[1], max_tokens=1, images=images, tenant=tenant
        ),
    )


class Bench:
    """A store, and the questions that it asked: (worker, request, picture's hash)."""

    def __init__(self) -> None:
        self.pool = ImagePool(16)
        self.questions: list[tuple[int, NeedImage]] = []
        self.store: TileStore[Answer] = TileStore(
            self.pool, lambda *asked: self.questions.append(asked)
        )

    @property
    def asked(self) -> list[tuple[int, str, bytes]]:
        return [(worker, one.request_id, one.content_hash) for worker, one in self.questions]

    def reply(self, number: int, name: str, begin: int = 0, end: int | None = None) -> list[Answer]:
        worker_id, question = self.questions[number]
        data = fake_image(name, 2).data[begin:end]
        piece = ImagePiece(question=question.question, offset=begin, data=data)
        return self.store.receive(worker_id, piece)

    def encode(self, one: Answer) -> None:
        """A step encodes all images of this answer."""
        for entry in self.pool.acquire(one.image_keys):
            assert self.store.take(entry.key).data == fake_data(entry.key)
            entry.is_encoded = True
            self.store.forget_encoded(entry.key)
            self.pool.release([entry])


def fake_data(key: ImageKey) -> bytes:
    names = {fake_image(name, 2).content_hash: fake_image(name, 2).data for name in "pqr"}
    return names[key.content_hash]


def digest(name: str) -> bytes:
    return fake_image(name, 2).content_hash


def test_an_image_is_asked_once_for_all_that_wait_and_forgotten_when_it_is_encoded() -> None:
    bench = Bench()
    first, second, third = answer(1, "a", "p"), answer(1, "b", "p", "q"), answer(2, "a", "p")
    assert [bench.store.want(one) for one in (first, second, third)] == [True, True, True]
    assert bench.asked == [(1, "a", digest("p")), (1, "b", digest("q"))]
    assert bench.reply(0, "p") == [first, third]
    assert bench.reply(1, "q") == [second]
    assert bench.store.num_bytes == 2 * 24
    assert not bench.store.want(second)
    bench.encode(second)
    assert bench.store.num_bytes == bench.store.num_images == 0
    assert not bench.store.want(answer(3, "c", "q", "p"))
    assert len(bench.questions) == 2


def test_an_image_that_was_evicted_is_asked_for_again() -> None:
    bench = Bench()
    one = answer(1, "a", "p")
    bench.store.want(one)
    bench.reply(0, "p")
    bench.encode(one)
    assert not bench.store.want(one)
    bench.pool.release(bench.pool.acquire(answer(1, "x", *"rstuvwyz").image_keys))
    assert bench.store.want(one)
    assert bench.asked == [(1, "a", digest("p"))] * 2
    assert bench.reply(1, "p") == [one]


def test_row_38_tenants_share_no_tiles() -> None:
    bench = Bench()
    bench.store.want(answer(1, "a", "p"))
    bench.store.want(answer(1, "b", "p", tenant="t"))
    assert bench.asked == [(1, "a", digest("p")), (1, "b", digest("p"))]


def test_the_next_that_waits_is_asked_where_the_first_request_ended() -> None:
    """Its worker drops what no request has any more, in the middle of the image too."""
    bench = Bench()
    first, second, third = answer(1, "a", "p"), answer(1, "b", "p"), answer(2, "c", "p")
    for one in (first, second, third):
        bench.store.want(one)
    assert bench.reply(0, "p", 0, 10) == []
    bench.store.leave(first)
    assert bench.asked[1:] == [(1, "b", digest("p"))]
    assert bench.reply(0, "p", 10) == []  # what was on its way
    bench.store.leave(second)
    assert bench.asked[2:] == [(2, "c", digest("p"))]
    assert bench.reply(2, "p", 0, 10) == []
    assert bench.reply(2, "p", 10) == [third]
    bench.store.leave(third)
    assert bench.store.num_bytes == bench.store.num_images == 0


def test_another_answer_of_the_same_request_keeps_the_question() -> None:
    bench = Bench()
    first, second = answer(1, "a", "p"), answer(1, "a", "p")
    bench.store.want(first)
    bench.store.want(second)
    bench.reply(0, "p", 0, 10)
    bench.store.leave(first)
    assert len(bench.questions) == 1
    assert bench.reply(0, "p", 10) == [second]


def test_a_picture_twice_in_a_prompt_comes_once() -> None:
    bench = Bench()
    one = answer(1, "a", "p", "p")
    assert bench.store.want(one)
    assert len(bench.questions) == 1
    assert bench.reply(0, "p") == [one]


@pytest.mark.parametrize(("begin", "end"), [(4, 8), (12, 24)])
def test_bytes_that_do_not_continue_what_is_here_are_a_fault_of_the_worker(
    begin: int, end: int
) -> None:
    bench = Bench()
    bench.store.want(answer(1, "a", "p"))
    bench.reply(0, "p", 0, 8)
    with pytest.raises(MalformedFrameError, match="an image of 24, of which 8 are here"):
        bench.reply(0, "p", begin, end)


def test_more_bytes_than_the_image_has_are_a_fault_of_the_worker() -> None:
    bench = Bench()
    bench.store.want(answer(1, "a", "p"))
    piece = ImagePiece(question=bench.questions[0][1].question, offset=0, data=bytes(25))
    with pytest.raises(MalformedFrameError):
        bench.store.receive(1, piece)


def test_another_worker_cannot_reply() -> None:
    """A tenant's picture comes from where its request came from."""
    bench = Bench()
    one = answer(1, "a", "p")
    bench.store.want(one)
    piece = ImagePiece(question=bench.questions[0][1].question, offset=0, data=bytes(24))
    assert bench.store.receive(2, piece) == []
    assert one.lacking


def test_tiles_of_a_caller_in_this_process_are_not_asked_for() -> None:
    bench = Bench()
    image = fake_image("p", 2)
    one = answer(1, "a")
    one.request.images.append(image)
    assert not bench.store.want(one)
    assert isinstance(bench.store.take(one.image_keys[0]), ImageTiles)
    assert bench.questions == []
