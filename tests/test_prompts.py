"""Template sets, label lists, label embeddings."""

import hashlib

import numpy as np
import pytest

from groupvit_common.errors import InputError
from groupvit_common.prompts import (
    TEMPLATE_SETS,
    Label,
    average_embedding,
    get_templates,
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


@pytest.mark.parametrize("bad", ["nine", 9, "", [], ["no place"], ["{} and {}"], [3]])
def test_bad_templates(bad):
    with pytest.raises(InputError):
        get_templates(bad)


def test_prompts_are_all_words_in_all_templates_and_braces_in_a_word_stay():
    label = Label("couch", ("sofa {}",))
    assert label.prompts(("a {}.", "the {}.")) == ("a couch.", "the couch.", "a sofa {}.", "the sofa {}.")


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
