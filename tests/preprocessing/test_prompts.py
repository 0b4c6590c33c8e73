"""Template sets, label lists, label embeddings."""

import hashlib

import numpy as np
import pytest

from groupvit_common.errors import InputError
from groupvit_common.preprocessing.prompts import (
    TEMPLATE_SETS,
    Label,
    average_embedding,
    get_templates,
    label_embedding,
    parse_labels,
    read_labels,
)


@pytest.mark.parametrize(("name", "number"), [("one", 1), ("seven", 7), ("eighty", 80)])
def test_template_sets_hold_as_many_different_sentences_as_they_say(name, number):
    templates = get_templates(name)
    assert templates == get_templates(number) == get_templates(str(number)) == TEMPLATE_SETS[name]
    assert len(set(templates)) == number
    assert all(t.count("{}") == 1 and "*" not in t for t in templates)


def test_the_small_sets_are_part_of_the_large_one():
    assert set(get_templates(1)) < set(get_templates(80))
    assert set(get_templates(7)) < set(get_templates(80))


def test_some_of_the_eighty():
    eighty = get_templates(80)
    for known in ("the {} in a video game.", "a jpeg corrupted photo of the {}.", "a photo of many {}."):
        assert known in eighty


def test_the_eighty_are_the_published_ones():
    # Digest of the published list, sorted, one sentence a line.
    digest = hashlib.sha256("\n".join(sorted(get_templates(80))).encode()).hexdigest()
    assert digest == "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"


def test_own_templates():
    assert get_templates("an x-ray of a {}") == ("an x-ray of a {}",)
    assert get_templates(["{}", "my {}"]) == ("{}", "my {}")


@pytest.mark.parametrize("bad", ["nine", 9, "", [], ["no place"], ["{} and {}"], [3], None, 1.5])
def test_bad_templates(bad):
    with pytest.raises(InputError):
        get_templates(bad)


def test_prompts_are_all_words_in_all_templates_and_braces_in_a_word_stay():
    label = Label("couch", ("sofa {}",))
    assert label.prompts(("a {}.", "the {}.")) == (("a couch.", "the couch."), ("a sofa {}.", "the sofa {}."))


def test_a_definition_is_used_as_it_is():
    label = Label("dog", ("puppy",), ("an animal that barks, mostly",))
    assert label.words == ("dog", "puppy")
    assert label.prompts(("a {}.",)) == (("a dog.",), ("a puppy.",), ("an animal that barks, mostly",))


def test_labels_from_a_string():
    labels = parse_labels(" cat, couch,remote   control ,")
    assert labels == (Label("cat"), Label("couch"), Label("remote control"))


def test_labels_from_a_sequence_may_have_synonyms():
    assert parse_labels(["cat", "couch, sofa", Label("Hund", ("dog",))]) == (
        Label("cat"),
        Label("couch", ("sofa",)),
        Label("Hund", ("dog",)),
    )


def test_labels_from_a_file(tmp_path):
    path = tmp_path / "étiquettes.txt"
    path.write_bytes("\ufeff# what to look for\r\ncat\r\n\r\n  couch, sofa,\r\n   # more\r\nélan\r\n".encode())
    assert read_labels(path) == (Label("cat"), Label("couch", ("sofa",)), Label("élan"))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("couch|sofa, cat", (Label("couch", ("sofa",)), Label("cat"))),
        (
            ' dog | puppy |"an animal,  that | barks" , cat',
            (Label("dog", ("puppy",), ("an animal, that | barks",)), Label("cat")),
        ),
        ('dog | "it barks" | hound, "no, ", ""', None),
        (
            '12" record, 5" and 7" tape, O"Brien, 5"',
            (Label('12" record'), Label('5" and 7" tape'), Label('O"Brien'), Label('5"')),
        ),
        ("|cat||, ,dog|", (Label("cat"), Label("dog"))),
    ],
)
def test_synonyms_and_definitions_in_a_string(text, labels):
    if labels is None:
        with pytest.raises(InputError, match="a definition needs a name before it"):
            parse_labels(text)
    else:
        assert parse_labels(text) == labels


def test_synonyms_and_definitions_in_a_line_and_in_a_mapping(tmp_path):
    dog = Label("dog", ("puppy", "hound"), ("an animal, that barks",))
    assert parse_labels(['dog, puppy | hound, "an animal, that barks"', "cat"]) == (dog, Label("cat"))
    mapping = {"dog": ["dog", "puppy", '"an animal, that barks"', "hound"], "cat": ()}
    assert parse_labels(mapping) == (dog, Label("cat"))
    assert parse_labels({"couch": "sofa"}) == (Label("couch", ("sofa",)),)
    (tmp_path / "words.txt").write_text('dog, puppy, "an animal, that barks", hound\n')
    assert read_labels(tmp_path / "words.txt") == (dog,)


@pytest.mark.parametrize("bad", ['dog | "it barks', 'dog | "it" barks', 'dog | "it barks", "', {"dog": ['"it']}])
def test_quotes_that_do_not_end(bad):
    with pytest.raises(InputError, match="a definition stands between double quotes"):
        parse_labels(bad)


@pytest.mark.parametrize(
    "bad",
    ['dog "an animal"', 'cat, dog "an animal, that barks"', ['dog"an animal"'], {"dog": 'puppy "an animal" | hound'}],
)
def test_a_definition_without_a_separator_before_it(bad):
    with pytest.raises(
        InputError, match=r'put \| before a definition: (dog|puppy) \| "an animal(, that barks)?" instead'
    ):
        parse_labels(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "labels must be text .*, got None"),
        (5, "labels must be text .*, got 5"),
        ({"cat": None}, "what else 'cat' is called must be text or a list of texts, .* got None"),
        ({"cat": 5}, "what else 'cat' is called .* got 5"),
        ({"cat": ["tom", 5]}, r"what else 'cat' is called .* got \['tom', 5\]"),
    ],
)
def test_labels_of_another_type(bad, message):
    with pytest.raises(InputError, match=message):
        parse_labels(bad)


@pytest.mark.parametrize("bad", ['dog | ""', {"dog": ['" "']}])
def test_an_empty_definition(bad):
    with pytest.raises(InputError, match="an empty word"):
        parse_labels(bad)


def test_templates_from_a_file(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("# mine\na photo of a {}.\n\n  the {} in the snow \n")
    assert get_templates(path) == get_templates(str(path)) == ("a photo of a {}.", "the {} in the snow")
    path.write_text("a photo\n")
    with pytest.raises(InputError, match=r"exactly once.* in .*sentences\.txt"):
        get_templates(path)
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match=r"no templates in .*sentences\.txt"):
        get_templates(path)
    with pytest.raises(InputError, match="text file"):
        get_templates(tmp_path / "missing.txt")


def test_a_labels_words_have_the_same_say_whatever_the_number_of_prompts():
    rng = np.random.default_rng(1)
    words = [rng.normal(size=(count, 8)) for count in (3, 3, 1)]
    unit = [embeds / np.linalg.norm(embeds, axis=1, keepdims=True) for embeds in words]
    mean = sum(embeds.mean(axis=0) for embeds in unit)
    np.testing.assert_allclose(label_embedding(words), mean[None] / np.linalg.norm(mean), rtol=1e-12)
    np.testing.assert_allclose(
        label_embedding(words, "max"), [average_embedding(embeds) for embeds in words], rtol=1e-12
    )
    raw = sum(embeds.mean(axis=0) for embeds in words)
    np.testing.assert_allclose(label_embedding(words, "mean", False), raw[None] / np.linalg.norm(raw), rtol=1e-12)
    # Without definitions it is the mean over all prompts.
    np.testing.assert_allclose(label_embedding(words[:2])[0], average_embedding(np.concatenate(words[:2])), rtol=1e-12)


@pytest.mark.parametrize("empty", ["", " , ,", [], ["", " "]])
def test_no_labels(empty):
    with pytest.raises(InputError, match="no labels"):
        parse_labels(empty)


@pytest.mark.parametrize("twice", ["cat, dog, Cat", ["couch, sofa", "sofa"], ["cat, cat"], "a  b, a b"])
def test_a_word_may_stand_once(twice):
    with pytest.raises(InputError, match="given twice"):
        parse_labels(twice)


def test_a_label_must_be_text():
    with pytest.raises(InputError, match="int"):
        parse_labels(["cat", 3])


def test_label_files_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="cannot read the label file"):
        read_labels(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="cannot read the label file"):
        read_labels(tmp_path)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_labels(binary)
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n")
    with pytest.raises(InputError, match="no labels in"):
        read_labels(empty)


def test_average_embedding_gives_every_prompt_the_same_say():
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(5, 8))
    mean = average_embedding(prompts)
    np.testing.assert_allclose(np.linalg.norm(mean), 1, rtol=1e-12)
    # The length of a prompt's embedding carries no weight, and one prompt is its own mean.
    np.testing.assert_allclose(average_embedding(prompts * np.array([[1], [2], [30], [0.1], [5]])), mean, rtol=1e-12)
    np.testing.assert_allclose(average_embedding(prompts[:1]), prompts[0] / np.linalg.norm(prompts[0]), rtol=1e-12)


def test_commas_and_bars_of_other_scripts_separate_too():
    assert [label.name for label in parse_labels("猫，狗、鳥،x")] == ["猫", "狗", "鳥", "x"]
    assert parse_labels("cat｜kitten，dog") == parse_labels("cat | kitten, dog")


@pytest.mark.parametrize("labels", ["cat; couch", "cat；couch", "cat\ncouch\n", "cat;couch;"])
def test_labels_that_are_separated_otherwise_are_told(labels):
    with pytest.raises(InputError, match=r"separated by commas, not by .*'cat, couch'"):
        parse_labels(labels)
    assert len(parse_labels([labels])) == 1
    assert [label.name for label in parse_labels("cat\n, couch\n")] == ["cat", "couch"]


def test_spaces_between_words_may_be_many():
    # In time that grows with their number, not with its square: this would take an hour.
    assert parse_labels("remote" + " " * 1_000_000 + "control")[0].name == "remote control"


@pytest.mark.parametrize("pair", [("caf\u00e9", "cafe\u0301"), ("\u00c5", "\u212b"), ("Cat", "cAT")])
def test_one_word_in_two_codings_is_one_word(pair):
    with pytest.raises(InputError, match="is given twice"):
        parse_labels(pair)


def test_words_that_are_different_in_lower_case_are_different():
    assert len(parse_labels(["Masse", "Ma\u00dfe"])) == 2
