from drafting.protocol import SOURCES, Draft, Verdict


def test_the_first_tokens_of_a_draft_keep_their_beliefs() -> None:
    draft = Draft((5, 6, 7), (0.9, 0.5, 0.1))
    assert draft.first(2) == Draft((5, 6), (0.9, 0.5))
    assert draft.first(0) == Draft()
    assert draft.first(9) == draft


def test_a_sequences_first_tokens_are_not_decoded() -> None:
    assert not Verdict(0, [1, 2, 3, 9], num_prompt_tokens=3, num_new=1).was_decoding
    assert Verdict(0, [1, 2, 3, 9, 8], num_prompt_tokens=3, num_new=1).was_decoding
    assert Verdict(0, [1, 2, 3, 9, 8, 7], num_prompt_tokens=3, num_new=2).was_decoding
    assert not Verdict(0, [1, 2, 3, 9, 8], num_prompt_tokens=3, num_new=2).was_decoding


def test_sources_are_distinct() -> None:
    assert len(set(SOURCES)) == len(SOURCES) == 4
