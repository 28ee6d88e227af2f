"""One damaged input file of each kind; `make soak` damages hundreds."""
import pytest
from soak import damage


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, small_frames):
    """Good files of all kinds, in the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("inputs"))
        patch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **options: None)  # the slowest part
        damage.write_inputs()
        yield


@pytest.mark.parametrize("number, kind", list(enumerate(sorted(damage.KINDS), 1000000)))
def test_a_damaged_file_ends_in_a_clear_line_or_does_no_harm(inputs, number, kind):
    outcome, way = damage.run_case(kind, number)
    # The older state and the images themselves are another way to continue.
    expected = [damage.FINISHED] if kind in ("newest state", "cached frames") else [damage.FINISHED, damage.CLEAR_LINE]
    assert outcome in expected, f"{way}: {outcome}"
