import pytest

from trainers.storage.folders import partial_folder, replacing_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "model"
    with replacing_folder(folder) as partial:
        (partial / "old").touch()
        assert not folder.exists()
    with pytest.raises(ZeroDivisionError), replacing_folder(folder) as partial:
        (partial / "half").touch()
        1 / 0  # noqa: B018
    assert names(folder) == ["old"]
    assert names(partial_folder(folder)) == ["half"]  # what a killed program leaves
    with replacing_folder(folder) as partial:
        (partial / "new").touch()
    assert names(folder) == ["new"] and names(folder.parent) == ["model"]
