"""Classification of a set against images that are classified one by one."""

import io
import tarfile

import numpy as np
import pytest

from groupvit_common.errors import InputError
from groupvit_common.evaluation.classification import evaluate_classification
from groupvit_common.evaluation.datasets.classification import open_classification_set
from groupvit_common.evaluation.protocols import ProtocolSettings
from groupvit_common.evaluation.run import RunOptions
from tests.support.evaluation import Killed, stop_after


def test_classification_against_each_image(torch_base, classes, tmp_path):
    """Probabilities of many images are those of single ones in either backend: tests/segmentation/test_segmenter.py."""
    data = open_classification_set(str(classes))
    assert (data.words, data.split, len(data)) == (("cat", "couch", "cat", "dog"), "val", 12)
    segmenter = ProtocolSettings(templates="seven").segmenter(torch_base, 5)
    with pytest.raises(Killed):
        evaluate_classification(segmenter, data, RunOptions(folder=tmp_path, progress=stop_after(10)))
    result = evaluate_classification(segmenter, data, RunOptions(folder=tmp_path))
    assert (result.images, result.timed) == (12, 2)
    first = among = 0
    for sample in data:
        likely = segmenter.classify(sample.image())
        ranked = sorted(range(4), key=lambda i: -likely[data.words[i]])
        first += ranked[0] == sample.truth
        among += sample.truth in ranked[:5]
    assert result.scores() == {"top1": first / 12, "top5": among / 12}
    assert [each["images"] for each in result.by_class()] == [3, 3, 3, 3]


def test_shards_say_the_same_as_folders(torch_base, classes, tmp_path):
    data = open_classification_set(str(classes))
    for shard in range(2):
        with tarfile.open(tmp_path / f"val-{shard:02d}.tar", "w") as tar:
            for number, sample in list(enumerate(data))[shard::2]:
                buffer = io.BytesIO()
                sample.image().save(buffer, format="png")
                for suffix, content in (("png", buffer.getvalue()), ("cls", str(sample.truth).encode())):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (tmp_path / "classnames.txt").write_text("cat\ncouch\ncat\ndog\n")
    packed = open_classification_set(f"{tmp_path}/val-{{00..01}}.tar")
    segmenter = ProtocolSettings().segmenter(torch_base, 4)
    results = [evaluate_classification(segmenter, each) for each in (data, packed)]
    np.testing.assert_array_equal(results[0].first, results[1].first)
    assert results[0].scores() == results[1].scores()
    (tmp_path / "classnames.txt").write_text("cat\ncouch\n")
    with pytest.raises(InputError, match=r"is of class '\d', but .*classnames\.txt names classes 0 to 1"):
        open_classification_set(f"{tmp_path}/val-*.tar")
