from router_models.prompt import MAX_CHARS, Prompt, Turn


def _conversation(*texts: str) -> Prompt:
    turns = [Turn("system", "be brief")]
    for text in texts:
        turns += [Turn("user", text), Turn("assistant", "fine")]
    return Prompt(tuple(turns[:-1]))


def test_a_single_message_is_the_text() -> None:
    assert Prompt.from_text("prove it").text == "prove it"


def test_earlier_turns_of_the_user_belong_to_the_request() -> None:
    assert _conversation("prove Fermat's theorem", "ok do it").text == "prove Fermat's theorem\nok do it"
    assert _conversation("a", "b").last_user_text == "b"


def test_the_oldest_turns_go_first_when_there_is_too_much() -> None:
    text = _conversation("x" * MAX_CHARS, "y" * 100, "now").text
    assert len(text) <= MAX_CHARS + 2
    assert text.endswith("y" * 100 + "\nnow")
    assert text.startswith("x" * 100)


def test_of_one_long_message_both_ends_are_kept() -> None:
    text = Prompt.from_text("begin" + "-" * 50_000 + "end").text
    assert len(text) == MAX_CHARS
    assert text.startswith("begin")
    assert text.endswith("end")


def test_a_request_without_a_user_is_empty() -> None:
    assert Prompt((Turn("system", "hello"),)).text == ""
