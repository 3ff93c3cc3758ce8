from geomjax.data.image_store import ImageStore
from geomjax.data.overlap import (
    Duplicate,
    Overlap,
    find_duplicates,
    find_overlap,
    fingerprint,
    without,
)
from geomjax.data.prompts import Example, Message

LONG = " ".join(f"w{i}" for i in range(20))


def examples(*prompts):
    return [Example(prompt, "1", i) for i, prompt in enumerate(prompts, start=1)]


def test_duplicates_are_equal_prompts_and_images():
    image = ImageStore().keep(b"x")
    found = find_duplicates(
        [
            Example("a", "1", 1),
            Example("a", "2", 2),
            Example("a", "1", 3, (image,)),
            Example("a ", "1", 4),
            Example((Message("user", "a"),), "1", 5),
            Example("a", "1", 6, (ImageStore().keep(b"x"),)),
            Example("a", "1", 7),
        ]
    )
    assert found == [
        Duplicate(1, 0, same_answer=False),
        Duplicate(5, 2, same_answer=True),
        Duplicate(6, 0, same_answer=True),
    ]


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not():
    suites = {"aime": examples("other words here", LONG)}
    words = LONG.split()
    shared = " ".join(words[3:16])
    train = examples(
        f"So: {shared}, and on",
        " ".join(words[3:15]),
        f"{' '.join(words[:6])} x {' '.join(words[6:])}",
        shared.upper().replace(" ", " , "),
    )
    assert find_overlap(train, suites) == [
        Overlap(0, "aime", 2, shared),
        Overlap(2, "aime", 2, " ".join(words[6:19])),
        Overlap(3, "aime", 2, shared),
    ]
    assert [e.line for e in without(train, find_overlap(train, suites))] == [2]


def test_short_problems_are_found_whole():
    suites = {"amc": examples("What is 1+1?"), "empty": examples("?")}
    train = examples("Now, what is 1 + 1", "What is 1+2?", "!")
    assert find_overlap(train, suites) == [Overlap(0, "amc", 1, "what is 1 1")]


def test_wording_is_no_overlap():
    wording = "Please reason step by step, and put your final answer within \\boxed{}."
    suites = {"aime": examples(f"Find {LONG} and m+n.\n{wording}")}
    train = examples(f"Count the sheep; give m+n.\n{wording}", f"{LONG}\n{wording}")
    assert len(find_overlap(train, suites)) == 2
    assert [o.index for o in find_overlap(train, suites, wording=[wording])] == [1]


def test_only_the_users_turns_of_a_conversation_count():
    suites = {"aime": examples(LONG)}
    train = [
        Example((Message("system", LONG), Message("user", "hi")), None, 1),
        Example((Message("user", LONG),), None, 2),
    ]
    assert [o.index for o in find_overlap(train, suites)] == [1]


def test_a_fingerprint_changes_with_all_that_is_trained_on():
    base = Example("a", "1", 1, (ImageStore().keep(b"x"),))
    other = [
        base._replace(prompt="b"),
        base._replace(answer="2"),
        base._replace(answer=None),
        base._replace(images=(ImageStore().keep(b"y"),)),
        base._replace(images=()),
    ]
    found = {fingerprint([each]) for each in (base, *other)}
    assert len(found) == 6
    assert fingerprint([base._replace(line=9)]) == fingerprint([base])
    assert fingerprint([base, other[0]]) != fingerprint([other[0], base])
    # Kept in runs: it must not change from release to release.
    assert fingerprint([base]) == "449bc9521fd748fc10543e8500aa9b7f"
