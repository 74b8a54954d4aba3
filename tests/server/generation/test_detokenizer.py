"""From token ids to pieces of text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.http_side import meta_like_tokenizer

from vlmserve.router.messages import AddRequest, SequenceOutput
from vlmserve.server.errors import InternalError
from vlmserve.server.generation.answer_stream import AnswerStream
from vlmserve.server.generation.detokenizer import Detokenizer, Piece, StopStrings
from vlmserve.server.generation.events import Finish, TextDelta
from vlmserve.server.generation.token_text import TokenReader
from vlmserve.server.prompts.processor import Processor

TOKENIZER = meta_like_tokenizer()
TOKENIZER.encode_special_tokens = True  # no text here is to become a special token
READER = TokenReader(TOKENIZER)
EOT = 128009
SPECIAL_IDS = Processor(TOKENIZER, None, [EOT]).special_ids


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def pieces_of(token_ids, stops=()):
    """The pieces of a whole answer; the last is the flush, absent after a stop."""
    detokenizer, cutter = Detokenizer(TOKENIZER, SPECIAL_IDS), StopStrings(stops)
    pieces = []
    for token_id in token_ids:
        pieces.append(cutter.push(detokenizer.push(token_id)))
        if pieces[-1].stop is not None:
            return pieces
    tail = cutter.push(detokenizer.flush())
    return [*pieces, tail if tail.stop is not None else Piece(tail.text + cutter.flush())]


def test_pieces_joined_are_the_plain_text():
    text = "What is in this image? Ein Bär 🐻, 熊."
    assert "".join(piece.text for piece in pieces_of(ids_of(text))) == text


@pytest.mark.parametrize("character", ["é", "熊", "🐻", "👩‍👩‍👧"])
def test_a_character_split_over_tokens_comes_whole(character):
    token_ids = ids_of(character)
    assert len(token_ids) > 1
    texts = [piece.text for piece in pieces_of(token_ids)]
    assert "".join(texts) == character
    assert not any("�" in text for text in texts)


def test_half_a_character_at_the_end_is_flushed():
    token_ids = ids_of("a🐻")[:-1]
    assert [piece.text for piece in pieces_of(token_ids)][-1] == "�"


def test_a_long_run_of_broken_bytes_is_not_decoded_over_and_over(monkeypatch):
    """Each token once decoded all that came before it in the run."""
    (half, *_) = ids_of("🐻")
    num_decoded = 0

    class CountingStream:
        def __init__(self, **_):
            self.num_ids = 0

        def step(self, tokenizer, token_id):
            nonlocal num_decoded
            self.num_ids += 1
            num_decoded += self.num_ids

    detokenizer = Detokenizer(TOKENIZER)
    texts = [detokenizer.push(half) for _ in range(500)]
    assert "".join(texts) + detokenizer.flush() == "�" * 500

    monkeypatch.setattr("vlmserve.server.generation.detokenizer.DecodeStream", CountingStream)
    detokenizer = Detokenizer(TOKENIZER, SPECIAL_IDS)
    for _ in range(1000):
        detokenizer.push(half)
        detokenizer.push(EOT)
    assert num_decoded < 1000 * 70


def test_a_character_after_a_long_run_of_broken_bytes_comes_whole():
    bear = ids_of("🐻")
    for num_broken in range(60, 70):
        pieces = pieces_of([bear[0]] * num_broken + bear + ids_of("x"))
        assert "".join(piece.text for piece in pieces) == "�" * num_broken + "🐻x"


def test_special_tokens_have_no_text():
    token_ids = [*ids_of("a"), EOT, 128256, *ids_of("b")]
    assert "".join(piece.text for piece in pieces_of(token_ids)) == "ab"


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_piece_by_piece(text):
    assert "".join(piece.text for piece in pieces_of(ids_of(text))) == text


@settings(deadline=None)
@given(st.lists(st.integers(100_000, 100_255), max_size=30))
def test_any_bytes_end_up_as_the_plain_decoding(token_ids):
    """Bytes that are no characters become U+FFFD in both forms alike."""
    known = [i for i in token_ids if TOKENIZER.id_to_token(i) is not None]
    joined = "".join(piece.text for piece in pieces_of(known))
    assert joined == TOKENIZER.decode(known)


def test_a_stop_string_over_token_borders_is_held_back_and_not_shown():
    pieces = pieces_of(ids_of("a helpful STOP image"), ["STOP"])
    assert pieces[-1].stop == "STOP"
    assert "".join(piece.text for piece in pieces) == "a helpful "
    assert not any("S" in piece.text for piece in pieces)


def test_the_start_of_a_stop_string_that_comes_to_nothing_is_shown():
    pieces = pieces_of(ids_of("STO and ST"), ["STOP"])
    assert pieces[-1].stop is None
    assert "".join(piece.text for piece in pieces) == "STO and ST"
    assert pieces[-1].text == "ST"


def test_the_earliest_of_several_stop_strings_wins():
    stops = StopStrings(["world", "lo wo"])
    piece = stops.push("hello world")
    assert (piece.text, piece.stop) == ("hel", "lo wo")


def reference_cut(text, stops):
    """Text before the first stop string that is complete, character by character."""
    for end in range(len(text) + 1):
        hits = [text[:end].index(stop) for stop in stops if stop in text[:end]]
        if hits:
            return text[: min(hits)]
    return text


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_like_a_search_in_the_whole_text(chunks, stops):
    cutter = StopStrings(stops)
    shown = ""
    for chunk in chunks:
        for character in chunk:
            piece = cutter.push(character)
            shown += piece.text
            if piece.stop is not None:
                assert shown == reference_cut("".join(chunks), stops)
                return
    assert shown + cutter.flush() == "".join(chunks) == reference_cut("".join(chunks), stops)


def growing(stops=()):
    request = AddRequest(request_id="r", prompt_token_ids=[1, 2, 3], max_tokens=10)
    processor = Processor(TOKENIZER, None, [EOT])
    return AnswerStream(request, stops, processor, READER)


def output(token_ids, finish_reason=None, stop_token_id=None):
    return SequenceOutput(
        request_id="r",
        token_ids=token_ids,
        finish_reason=finish_reason,
        stop_token_id=stop_token_id,
    )


def test_the_end_of_turn_counts_and_has_no_text():
    text, finish = growing().take(output([*ids_of("What"), EOT], "stop"))
    assert text == TextDelta("What")
    assert (finish.reason, finish.stop_reason, finish.usage.completion_tokens) == ("stop", None, 2)
    assert finish.usage.prompt_tokens == 3


def test_a_stop_token_of_the_requests_is_named_and_not_shown():
    token_ids = ids_of("What is")
    (text, finish) = growing().take(output(token_ids, "stop", token_ids[-1]))
    assert text == TextDelta("What")
    assert finish.stop_reason == token_ids[-1]


def test_a_stop_string_ends_the_count_at_the_token_that_completes_it():
    token_ids = ids_of("What is in this image?")
    events = growing(["in th"]).take(output(token_ids))
    assert events == [TextDelta("What is "), Finish("stop", "in th", events[-1].usage)]
    assert events[-1].usage.completion_tokens == 4


def test_held_text_is_shown_when_the_answer_ends_by_length():
    answer = growing(["image!"])
    assert answer.take(output(ids_of("What image"))) == [TextDelta("What ")]
    text, finish = answer.take(output(ids_of("?"), "length"))
    assert text == TextDelta("image?")
    assert (finish.reason, finish.stop_reason) == ("length", None)


def test_an_end_of_message_is_told_from_an_end_of_turn():
    assert growing().take(output([128008], "stop"))[-1].is_end_of_message
    assert not growing().take(output([EOT], "stop"))[-1].is_end_of_message


def test_a_request_that_the_engine_aborted_is_an_error():
    with pytest.raises(InternalError):
        growing().take(output([], "abort"))


@settings(deadline=None)
@given(st.lists(st.integers(100_000, 100_255) | st.sampled_from([EOT, 128008]), max_size=30))
def test_special_tokens_that_are_shown_read_as_in_the_plain_decoding(token_ids):
    known = [i for i in token_ids if TOKENIZER.id_to_token(i) is not None]
    text = Detokenizer(TOKENIZER, {EOT, 128008}, shows_special=True)
    joined = "".join(map(text.push, known)) + text.flush()
    assert joined == TOKENIZER.decode(known, skip_special_tokens=False)
